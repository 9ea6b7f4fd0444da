"""
From a training run to shell energies and a tail slope
======================================================

A small network learns scikit-learn's digits. We take snapshots of its training, measure how the
error is spread over the spectrum of the tangent kernel, and fit the tail.
"""

# %%
# Snapshots
# ---------
# Each snapshot is one state of the network on one batch. All states meet the same disjoint probe
# batches: differences between batches are what the intervals come from.

import matplotlib.pyplot as plt

from spectralshell.datasets import load_digits_trajectory

X = load_digits_trajectory(n_snapshots=4, n_batches=6, batch_size=16, hidden=(32,), max_iter=500)
len(X), sorted({snapshot.tau for snapshot in X})

# %%
# Energies
# --------
# One pipeline measures and fits. The measurement does not depend on the shell ratio ``q``, and the
# snapshots remember it, so everything below costs no further products with the kernel.

from sklearn.pipeline import make_pipeline

from spectralshell import (
    GRSDTailFitter,
    ShellEnergyDisplay,
    ShellEnergyEstimator,
    TailFitDisplay,
)

pipe = make_pipeline(ShellEnergyEstimator(q=1.5), GRSDTailFitter()).fit(X)
estimator, fitter = pipe[0], pipe[-1]
print(f"solver: {estimator.solver_}, products: {estimator.n_matvecs_}")
print(f"{estimator.n_shells_} shells from {estimator.edges_[0]:.3g} to {estimator.edges_[-1]:.3g}")

# %%
# Learning removes the energy at large rates first. What is left at late times sits at small rates.

ShellEnergyDisplay.from_estimator(pipe).plot()
plt.show()

# %%
# The frame behind the figure has one row per snapshot and shell, with certified bounds:

columns = ["tau", "batch", "lambda_lo", "energy", "energy_lower", "energy_upper", "resolved"]
estimator.shells_[columns].groupby("tau").head(4)

# %%
# The tail
# --------
# One slope for all times, one amplitude and one cutoff for each. Read the status before the slope.

print(f"b = {fitter.b_:.2f}, interval {fitter.b_interval_[0]:.2f} to {fitter.b_interval_[1]:.2f}")
print(f"window: {fitter.window_[0]:.3g} to {fitter.window_[1]:.3g}")
print(f"status: {fitter.status_}")

# %%
# The default window runs up to the largest eigenvalue. But the figure has a gap near λ = 1: a few
# large eigenvalues stand apart from the bulk, and no power law runs through a gap. So we fit the
# bulk, in a window of our own.

window = (0.02, 0.6)
bulk = make_pipeline(ShellEnergyEstimator(q=1.5), GRSDTailFitter(window=window)).fit(X)
bulk[-1].frame_

# %%

TailFitDisplay.from_estimator(bulk, X).plot()
plt.show()

# %%
# Four models of the same window. The template has to beat the cutoff of a frozen kernel,
# exp(−κλ), and a curved lognormal, before anybody may speak of more than a slope. Here it does not.

bulk[-1].comparison_

# %%
# Does it depend on the shells?
# -----------------------------
# The same window with other shell ratios. If the spread over ``q`` is larger than the interval, the
# spread is what to quote.

for q in (1.25, 1.5, 2.0):
    other = make_pipeline(ShellEnergyEstimator(q=q), GRSDTailFitter(window=window)).fit(X)[-1]
    lower, upper = other.b_interval_
    print(f"q = {q}: b = {other.b_:.2f}, interval {lower:.2f} to {upper:.2f}, {other.status_}")

# %%
# What this does not show: this small network has no clean power-law tail, as the statuses say. A
# slope in a window is a fact about this error on these batches. It is not evidence of transport
# between scales, and it is not a constant of the network.
