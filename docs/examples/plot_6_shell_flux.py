"""
Which way energy moves between shells
=====================================

While a network learns, its kernel changes: eigenvalues drift and modes turn. Both move error energy
between the shells of the spectrum. We measure that flux on digits, compare it with what training
really did, and say what it does not show.
"""

# %%
# Fluxes along gradient flow
# --------------------------
# The estimator takes the same snapshots as the others. ``flux_down`` is the energy per τ that
# passes a shell edge from above to below, if the parameters follow the gradient of this batch.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from spectralshell import ShellFluxDisplay, ShellFluxEstimator
from spectralshell.datasets import load_digits_trajectory

X = load_digits_trajectory(n_snapshots=4, n_batches=4, batch_size=16, hidden=(32,), max_iter=300)
estimator = ShellFluxEstimator(floor=4e-3).fit(X)
print(f"solver: {estimator.solver_}, {estimator.n_shells_} shells")

# %%
# At first energy falls to smaller eigenvalues. At the last time it climbs in the mean, but the
# batches do not agree on it. The right panel takes one time apart: most of the flux is drift of
# eigenvalues, the rest is rotation of modes.

ShellFluxDisplay.from_estimator(estimator).plot()
plt.show()

# %%
# What one shell gains another loses. The sums are zero to rounding:

balance = estimator.balance_
balance.groupby(["tau", "batch"])["transfer"].sum().abs().max()

# %%
# The velocity
# ------------
# ``velocity_fit_`` fits v = ±c λ^b for all times together and for each. The sign is tested over
# batches; ``sign`` is 0 where it cannot be told.

columns = ["scope", "tau", "sign", "p_value", "b", "b_lower", "b_upper", "status"]
estimator.velocity_fit_[columns].round(3)

# %%
# A slope near 1 proves nothing: couplings that are noise in proportion to √(λ_u λ_v) have it too.

# %%
# Is transfer local?
# ------------------
# The share of all exchange by the distance of the shells, averaged over batches. Distance 0 is the
# exchange with the null shell. Neighbours carry most of it here. Soft edges count some exchange
# within a shell as one between neighbours.

shares = estimator.locality_.pivot_table("share", "distance", "tau")
shares.head(5).round(3)

# %%
# Shells two or more apart carry a tenth to a fifth in this small perceptron. In the deeper networks
# of :doc:`the study </studies/residual>` they carry more, and along random directions as well.

shares.loc[2:].sum().round(2)

# %%
# Gradient flow against what training did
# ---------------------------------------
# ``trajectory_`` compares two fluxes over every interval between snapshots: the predicted one, and
# the one that the balance leaves, ΔE/Δτ + D below each edge. Small steps and short intervals:

short = load_digits_trajectory(
    n_snapshots=4, n_batches=2, batch_size=12, hidden=(32,), learning_rate=0.01, max_iter=8
)


def errors(trajectory):
    """Return the distance of prediction and measurement for every interval, relative."""
    found = {}
    for end, rows in trajectory.groupby("tau_end"):
        gap = np.linalg.norm(rows["measured"] - rows["predicted"])
        found[end] = round(float(gap / np.linalg.norm(rows["measured"])), 2)
    return found


flow = ShellFluxEstimator(floor=4e-3).fit(short)
errors(flow.trajectory_)

# %%
# Gradient flow on a batch misses more than half, and the status says why: training followed the
# gradient of other images.

flow.trajectory_["status"].value_counts().index[0]

# %%
# So we give the estimator the way that the parameters really took, from the states before and after
# each time. It may be that of any optimiser.

states = {snapshot.tau: snapshot.load_state() for snapshot in short}
taus = sorted(states)
moves = {}
for i, tau in enumerate(taus):
    before, after = taus[max(i - 1, 0)], taus[min(i + 1, len(taus) - 1)]
    moves[tau] = {
        name: (states[after][name] - states[before][name]) / (after - before)
        for name in states[tau]
    }

along = ShellFluxEstimator(floor=4e-3, direction=lambda snapshot: moves[snapshot.tau]).fit(short)
errors(along.trajectory_)

# %%
# Both figures, edge by edge, averaged over batches, for the first interval:

fig, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for name, fitted, marker in (("gradient flow", flow, "s"), ("the way taken", along, "o")):
    first = fitted.trajectory_.query("tau_start == 0").groupby("edge")
    ax.plot(first["predicted"].mean(), marker=marker, markersize=4.5, label=f"predicted, {name}")
ax.plot(first["measured"].mean(), "k--", linewidth=1.2, label="measured, the way taken")
ax.set(
    xscale="log", xlabel=r"edge $\lambda$  (1/$\tau$)", ylabel=r"$J_\downarrow$  (energy / $\tau$)"
)
ax.legend(fontsize="small")
plt.show()

# %%
# Gates
# -----
# The network has GELU units. With ReLU in their place the kernel jumps where the input of a unit
# changes sign, and the exact derivative does not see it; a ``GateWarning`` says so. Forty short
# steps of gradient descent on one batch:

import warnings
from itertools import pairwise

import torch

from spectralshell import make_snapshots
from spectralshell.warning_categories import GateWarning

images, labels = short[0].inputs, short[0].targets
target = torch.nn.functional.one_hot(labels, 10).double()
layers = torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
model = torch.nn.Sequential(*layers).double()
model.load_state_dict(short[0].load_state())

rate, steps, gates = 0.0005, [], []
optimizer = torch.optim.SGD(model.parameters(), lr=rate)
for step in range(41):
    steps += make_snapshots(model, [(images, labels)], tau=step * rate)
    gates.append(model[0](images) > 0)
    loss = 0.5 * (target - model(images)).square().sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with warnings.catch_warnings():
    warnings.simplefilter("ignore", GateWarning)
    jumping = ShellFluxEstimator(floor=4e-3).fit(steps)

found = pd.DataFrame({"distance": errors(jumping.trajectory_).values()})
found["flips"] = [int((before != after).sum()) for before, after in pairwise(gates)]
found.groupby("flips")["distance"].agg(["count", "min", "max"])

# %%
# Without a flip the prediction is good to one per cent. One gate of 384 that flips within a step,
# and it misses the whole flux. A difference sees flips within its own step, but not those of one
# training run: for such a network, believe ``measured``.

# %%
# What this does not show: the sign of the flux belongs to this network, these batches and this
# time. Nothing here is a cascade, and no power law of the velocity is implied by a straight line
# over two decades.
