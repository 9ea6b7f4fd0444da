"""
A run of transformers.Trainer
=============================

A callback records a Trainer: one line. Here a tiny network on synthetic data, with warm-up and
accumulated gradients.
"""

# %%
# The model and the data
# ----------------------
# Any model that a Trainer takes: it returns its loss and its outputs.

import tempfile

import matplotlib.pyplot as plt
import torch
from transformers import Trainer, TrainingArguments

generator = torch.Generator().manual_seed(0)
x = torch.randn(256, 6, generator=generator)
data = [{"x": row, "labels": row[:2].prod()[None]} for row in x]


class Network(torch.nn.Module):
    """A perceptron that computes its loss where it is given labels."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )

    def forward(self, x, labels=None):
        """Return outputs, or the loss and them."""
        outputs = self.layers(x)
        if labels is None:
            return outputs
        return {"loss": torch.nn.functional.mse_loss(outputs, labels), "logits": outputs}


# %%
# Training
# --------
# The callback is the line.

from spectralshell.runs.callbacks.transformers import TrainingRecorderCallback

torch.manual_seed(0)
model, place = Network(), tempfile.mkdtemp()
arguments = TrainingArguments(
    output_dir=f"{place}/out",
    max_steps=120,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    warmup_steps=20,
    logging_steps=10,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=data,
    callbacks=[TrainingRecorderCallback(f"{place}/run")],
)
result = trainer.train()

# %%
# Effective time
# --------------
# τ is the sum of the rates that the steps used. The rate of the first step of a warm-up is 0.

from spectralshell.runs import TrainingRun

run = TrainingRun(f"{place}/run", model)
fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
run.history.plot("step", "lr", ax=axes[0], legend=False, ylabel="lr")
run.history.plot("step", "tau", ax=axes[1], legend=False, ylabel="τ")
plt.show()

# %%
# Measured
# --------

from spectralshell import ShellEnergyEstimator

probes = [
    ({"x": x[start : start + 32]}, x[start : start + 32, :2].prod(1, keepdim=True))
    for start in (0, 32)
]
ShellEnergyEstimator(q=4.0, n_steps=30).fit(run.snapshots(probes)).transform(
    run.snapshots(probes)
).groupby("tau").sum().tail(3)
