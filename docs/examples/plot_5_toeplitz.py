"""
Do shells couple alike at every scale?
======================================

As a network learns, its tangent kernel moves and couples the shells of its spectrum. A theory of
power laws wants this coupling to depend on the distance between shells alone. We measure it on a
small network, and ask the same of noise and of random directions before we believe anything.
"""

# %%
# Measure
# -------
# Four batches of the state in the middle of training: differences between the batches are what the
# intervals come from.

import matplotlib.pyplot as plt

from spectralshell import ToeplitzDiagnostic, ToeplitzDisplay
from spectralshell.datasets import load_digits_trajectory

X = load_digits_trajectory(n_snapshots=3, n_batches=4, batch_size=10, hidden=(16,), max_iter=300)
taus = sorted({snapshot.tau for snapshot in X})
middle = [snapshot for snapshot in X if snapshot.tau == taus[1]]

diagnostic = ToeplitzDiagnostic(n_null=10, random_state=0).fit(middle)
print(f"residual {diagnostic.toeplitz_residual_:.2f}, p = {diagnostic.p_value_:.2f}")
print(f"status: {diagnostic.status_}")

# %%
# Look
# ----
# Above, the coupling and its Toeplitz part in the same colours; grey shells have fewer than three
# modes. Below, the residual in windows of six shells over the bands of both nulls, and the diagonal
# against λ.

ToeplitzDisplay.from_estimator(diagnostic).plot()
plt.show()

# %%
# Read the nulls first
# --------------------
# Each statistic stands beside what permuted entries and random directions give, with p-values on
# the side that the theory claims. A small residual, a large ratio or a large share of neighbours
# says something only where the nulls do not have it as well.

columns = ["value", "lower", "upper", "permutation_median", "permutation_p"]
diagnostic.statistics_[[*columns, "random_median", "random_p"]].round(2)

# %%
# Most of the flux between shells joins neighbours, as the theory says. But it divides by the
# distance of eigenvalues, so that permuted entries do much the same:

diagnostic.locality_[["distance", "share", "permutation_median", "random_median"]].head(4).round(3)

# %%
# Drift and rotation apart
# ------------------------
# A block of the diagonal holds the drift of eigenvalues and the rotation of modes. The drift is the
# larger part here, so what the block shows depends on how many modes share a shell. The couplings
# are remembered, so other choices cost no further products.

for diagonal in ("block", "modes", "pairs"):
    other = ToeplitzDiagnostic(n_null=10, random_state=0, diagonal=diagonal).fit(middle)
    slope = other.diagonal_.loc["coupling"]
    print(
        f"{diagonal:6} residual {other.toeplitz_residual_:.2f} (p = {other.p_value_:.2f}), slope "
        f"{slope['slope']:.2f} [{slope['slope_lower']:.2f}, {slope['slope_upper']:.2f}]"
    )

# %%
# Along training
# --------------
# `transform` gives one row per snapshot.

rows = diagnostic.transform([snapshot for snapshot in X if snapshot.batch < 2])
rows[["toeplitz_residual", "permutation_residual", "permutation_p", "random_p", "n_modes"]].round(2)

# %%
# What this does not show: one network, one data set, 100 modes. Whether residual networks differ
# from plain ones is asked on real images in :doc:`the study </studies/residual>`.
