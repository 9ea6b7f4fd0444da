"""
The checkpoints of a Trainer
============================

A Trainer of transformers leaves a folder for each checkpoint. Two lines read them as snapshots,
with the effective time that its logs tell.
"""

# %%
# A run
# -----
# Any run will do. This one trains a small model on sequences that go up in steps of one or two, for
# some seconds. Nothing in it is there for the measurement, except ``logging_steps=1``: it lets the
# logs tell the rate of every step.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments

VOCABULARY, LENGTH = 16, 8


def sequence(index):
    """Return tokens that go up by one or two from a start, as a data set of a Trainer has them."""
    start, rise = index % VOCABULARY, 1 + index // VOCABULARY % 2
    tokens = (start + rise * torch.arange(LENGTH)) % VOCABULARY
    return {"input_ids": tokens[:-1], "labels": tokens[1:]}


class NextToken(torch.nn.Module):
    """Predict the next token from the last two."""

    def __init__(self, width=16):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, width)
        self.mix = torch.nn.Linear(2 * width, width)
        self.head = torch.nn.Linear(width, VOCABULARY)

    def forward(self, input_ids, labels=None):
        """Return logits, with the loss where labels are given, as a Trainer asks for it."""
        x = self.embedding(input_ids)
        previous = functional.pad(x, (0, 0, 1, 0))[:, :-1]
        logits = self.head(torch.tanh(self.mix(torch.cat([x, previous], dim=-1))))
        if labels is None:
            return logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


torch.manual_seed(0)
model = NextToken()
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
# Four probe batches of four sequences each; each token counts as a sample.

from spectralshell.runs import TrainingRun

rows = [[sequence(index) for index in range(start, 64, 16)] for start in (0, 5, 9, 14)]
probe_batches = [
    (
        {"input_ids": torch.stack([r["input_ids"] for r in part])},
        torch.stack([r["labels"] for r in part]),
    )
    for part in rows
]

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

estimator = ShellEnergyEstimator(q=2.0, residual="cross-entropy", solver="exact").fit(X)
ShellEnergyDisplay.from_estimator(estimator).plot()
plt.show()

# %%
# The error that is left, by τ:

estimator.transform(X).sum(axis=1).groupby("tau").mean()

# %%

out.cleanup()
