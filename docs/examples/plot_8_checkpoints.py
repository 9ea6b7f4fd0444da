"""
The checkpoints of a Trainer
============================

A Trainer of transformers leaves a folder for each checkpoint. Two lines read them as snapshots,
with the effective time that its logs tell.
"""

# %%
# A run
# -----
# Any run will do. This one trains a GPT-2 of a few thousand weights on sequences that go up in
# steps of one or two, for some seconds. Nothing in it is there for the measurement, except
# ``logging_steps=1``: it lets the logs tell the rate of every step.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

VOCABULARY, LENGTH = 16, 8


def sequence(index):
    """Return tokens that go up by one or two from a start, as a data set of a Trainer has them."""
    tokens = (
        index % VOCABULARY + (1 + index // VOCABULARY % 2) * torch.arange(LENGTH)
    ) % VOCABULARY
    return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
)
out = tempfile.TemporaryDirectory()
arguments = TrainingArguments(
    out.name,
    max_steps=60,
    save_steps=20,
    logging_steps=1,
    per_device_train_batch_size=8,
    learning_rate=0.01,
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,
    report_to=[],
    log_level="error",
)
trainer = Trainer(model=model, args=arguments, train_dataset=[sequence(i) for i in range(64)])
trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks if "Print" in str(type(c))))
trainer.train()
sorted(path.name for path in Path(out.name).iterdir())

# %%
# The snapshots
# -------------
# Each token of the probe batch is predicted from those before it, so the targets are the tokens
# moved by one.

from spectralshell.runs import TrainingRun

rows = torch.stack([sequence(index)["input_ids"] for index in (0, 18)])
probe_batches = [({"input_ids": rows[:, :-1]}, rows[:, 1:])]

run = TrainingRun.from_checkpoints(f"{out.name}/checkpoint-*", model)
X = run.snapshots(probe_batches)

run.states[["step", "tau", "bytes"]]

# %%
# The rates fall linearly, so τ does not grow with the steps alone.

run.history[["step", "tau", "lr", "loss"]].iloc[::20]

# %%
# The measure
# -----------
# Each state is read from its folder when it is measured.

from spectralshell import ShellEnergyDisplay, ShellEnergyEstimator

estimator = ShellEnergyEstimator(q=4.0, residual="cross-entropy", solver="exact").fit(X)
ShellEnergyDisplay.from_estimator(estimator).plot()
plt.show()

# %%
# The error that is left, by τ:

estimator.transform(X).sum(axis=1)

# %%

out.cleanup()
