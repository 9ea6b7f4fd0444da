"""
Choosing q, and reading the bounds
==================================

Lanczos with few steps against the exact spectrum: what the bounds promise, where the resolution
ends, how a false peak looks, and how to choose the shell ratio.
"""

# %%
# The bounds contain the truth
# ----------------------------
# The batches are small, so the exact spectrum is at hand to check against.

import matplotlib.pyplot as plt
import numpy as np
import torch

from spectralshell import ShellEnergyEstimator
from spectralshell.datasets import load_digits_trajectory

X = load_digits_trajectory(n_snapshots=2, n_batches=6, batch_size=16, hidden=(32,), max_iter=400)
last = [snapshot for snapshot in X if snapshot.tau == X[-1].tau]

(exact,) = ShellEnergyEstimator(solver="exact").spectral_measures(last[:1])
(coarse,) = ShellEnergyEstimator(solver="lanczos", n_steps=15).spectral_measures(last[:1])
(fine,) = ShellEnergyEstimator(solver="lanczos", n_steps=60).spectral_measures(last[:1])

edges = np.geomspace(1e-5 * exact.lambda_max, exact.lambda_max, 200)
truth = exact.cumulative(edges)[1]

figure, ax = plt.subplots(layout="constrained")
ax.plot(edges, truth, color="black", label="exact")
for measure, color, steps in ((coarse, "C1", 15), (fine, "C0", 60)):
    lower, middle, upper = measure.cumulative(edges)
    ax.fill_between(edges, lower, upper, color=color, alpha=0.3, label=f"bounds, {steps} steps")
    inside = (lower <= truth) & (truth <= upper)
    print(f"{steps} steps: the truth is inside at {inside.sum()} of {len(edges)} edges")
ax.set(xscale="log", xlabel="λ  (1/τ)", ylabel="energy below λ  (units of the loss)")
ax.legend()
plt.show()

# %%
# The bounds are wide where the Ritz values are far apart: at small λ. There Lanczos has sample
# points, not a spectrum.
#
# A false peak
# ------------
# Take a density that is flat in ln λ: no peak at all. Bin the nodes of the quadrature rule as if
# they were the spectrum, and a peak appears. It moves when the number of steps changes.

from spectralshell.krylov import gauss, lanczos

n = 2000
rates = np.geomspace(1e-6, 1.0, n)


def ritz_density(n_steps, bins):
    """Energy per unit ln λ of the Gauss rule after ``n_steps`` steps, binned."""
    diagonal = torch.from_numpy(rates)
    result = lanczos(lambda v: diagonal * v, torch.ones(n, dtype=torch.float64), n_steps)
    nodes, shares, _ = gauss(result.alpha, result.beta)
    energy, _ = np.histogram(nodes, bins=bins, weights=shares)
    return energy / np.log(bins[1] / bins[0])


bins = np.geomspace(1e-6, 1.01, 28)
figure, ax = plt.subplots(layout="constrained")
for n_steps, color in ((20, "C1"), (60, "C0")):
    ax.stairs(ritz_density(n_steps, bins), bins, color=color, label=f"{n_steps} steps")
    ax.axvline(10 / n_steps**2, color=color, linestyle=":")
ax.axhline(1 / np.log(1e6), color="black", linewidth=1, label="truth")
ax.set(xscale="log", xlabel="λ / λ max", ylabel="energy per unit ln λ")
ax.legend()
plt.show()

# %%
# The dotted lines are 10 λ_max/m². To the left of them the histogram shows the rule, not the
# measure. The estimator knows: its first edge lies at its resolution floor, shells with wide bounds
# are marked, and a profile that is largest next to the floor gets a warning.

import warnings

for n_steps in (15, 30, 60):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator = ShellEnergyEstimator(solver="lanczos", n_steps=n_steps, q=1.5).fit(last)
    shells = estimator.shells_[estimator.shells_["shell"].str.startswith("shell")]
    print(
        f"{n_steps} steps: floor {estimator.resolution_floor_:.3g}, {estimator.n_shells_} shells, "
        f"{shells['resolved'].mean():.0%} of the rows resolved, "
        f"warnings: {[warning.category.__name__ for warning in caught] or 'none'}"
    )

# %%
# Choosing q
# ----------
# The score is the log-likelihood of held-out batches under the fitted shells. Fine shells follow
# the noise of the training batches, coarse ones lose resolution. The rule takes the coarsest shells
# within one standard error of the best.

from sklearn.model_selection import GridSearchCV, GroupKFold

from spectralshell import largest_q_within_one_se

search = GridSearchCV(
    ShellEnergyEstimator(solver="exact"),
    {"q": [1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0]},
    cv=GroupKFold(n_splits=3),
    refit=largest_q_within_one_se,
)
search.fit(last, groups=[snapshot.batch for snapshot in last])
results = search.cv_results_
q = np.array(results["param_q"], dtype=float)

figure, ax = plt.subplots(layout="constrained")
ax.errorbar(
    q, results["mean_test_score"], results["std_test_score"] / np.sqrt(3), marker="o", capsize=3
)
ax.axvline(search.best_params_["q"], color="black", linestyle=":", label="chosen")
ax.set(xscale="log", xlabel="shell ratio q", ylabel="held-out log-likelihood  (nats)")
ax.set_xticks(q, [f"{value:g}" for value in q])
ax.minorticks_off()
ax.legend()
plt.show()
print(f"chosen: q = {search.best_params_['q']}")
