"""
A recorded training loop
========================

A plain loop with three more lines gives a run on disk: effective time of every step, and states
eight to a decade. Then we look at where the error sits while the network learns.
"""

# %%
# The loop
# --------
# AdamW with a warm-up. The recorder reads the rate that each step used; the import, the ``with``
# and ``log`` are what it takes.

import tempfile

import matplotlib.pyplot as plt
import torch

from spectralshell.runs import TrainingRecorder, TrainingRun

generator = torch.Generator().manual_seed(0)
x = torch.randn(512, 8, generator=generator)
y = torch.sin(x[:, :1]) + 0.3 * x[:, 1:2] * x[:, 2:3]

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
).double()
x, y = x.double(), y.double()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1.0))
directory = tempfile.mkdtemp()

with TrainingRecorder(model, optimizer, directory) as recorder:
    for _ in range(1000):
        rows = torch.randint(512, (32,), generator=generator)
        loss = (model(x[rows]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder.log(loss=loss)
        warm_up.step()

# %%
# The run
# -------
# One row for each step; states are read from disk when they are measured.

run = TrainingRun(directory, model)
run.history.tail(3)

# %%

run.states[["step", "tau", "bytes"]].tail(3)

# %%
# Shells over effective time
# --------------------------
# Four probe batches, the same at every τ.

from spectralshell import ShellEnergyDisplay, ShellEnergyEstimator

probes = list(zip(x.split(32), y.split(32), strict=True))[:4]
estimator = ShellEnergyEstimator(q=4.0, n_steps=40).fit(
    run.snapshots(probes, steps=[0, 10, 100, 1000])
)
ShellEnergyDisplay.from_estimator(estimator).plot()
plt.show()
