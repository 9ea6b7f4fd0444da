"""What a tail fit works on: the usable taus and shells, their logarithms and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectralshell.estimators.tail_data import ROUNDING, BatchedEnergies, ShellLayout
from spectralshell.estimators.tail_intervals import moderated_weights
from spectralshell.estimators.tail_models import ShellGrid, shell_grid


@dataclass(frozen=True)
class TailProblem:
    """Data of one fit; replicate 0 is the full sample, then one batch is left out.

    Attributes
    ----------
    data : BatchedEnergies
        Usable taus and shells only.
    n_shells : ndarray of shape (all n_taus,)
        Usable shells of every tau of the input.
    used : ndarray of bool, shape (all n_taus,)
        Which taus are fitted.
    shells : ndarray of bool, shape (all n_shells,)
        Which shells are fitted.
    means : ndarray of shape (n_taus, n_shells)
        Mean energies of the full sample.
    log_density, weights : ndarray of shape (n_replicates, n_taus, n_shells)
        ln of mean energy over width, and inverse variances; weight 0 leaves a point out.
    grid : ShellGrid
        Quadrature of the shells.
    log_lambda : ndarray of shape (n_shells,)
        ln of the geometric midpoints.
    """

    data: BatchedEnergies
    n_shells: np.ndarray
    used: np.ndarray
    shells: np.ndarray
    means: np.ndarray
    log_density: np.ndarray
    weights: np.ndarray
    grid: ShellGrid
    log_lambda: np.ndarray

    @property
    def n_points(self) -> int:
        """Number of (tau, shell) points in the fit."""
        return int((self.weights[0] > 0).sum())

    @property
    def n_taus(self) -> int:
        """Number of fitted taus."""
        return self.means.shape[0]

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return self.data.n_batches


def usable_points(
    data: BatchedEnergies, layout: ShellLayout, window: tuple[float, float]
) -> np.ndarray:
    """Return which (tau, shell) may be fitted: whole, resolved, in the window, not empty."""
    means = data.replicates()[0][0]
    if np.isnan(window[0]):
        return np.zeros(means.shape, dtype=bool)
    return layout.whole_shells(window) & (means > ROUNDING * data.totals[:, None])


def build_problem(
    data: BatchedEnergies,
    layout: ShellLayout,
    window: tuple[float, float],
    min_shells: int,
) -> TailProblem | None:
    """Assemble the fit, or None where no tau has ``min_shells`` usable shells."""
    usable = usable_points(data, layout, window)
    used = usable.sum(axis=1) >= min_shells
    if not used.any():
        return None
    shells = usable[used].any(axis=0)
    batches = data.present[used].any(axis=0)
    part = BatchedEnergies(
        data.taus[used],
        data.energies[np.ix_(used, batches, shells)],
        data.present[np.ix_(used, batches)],
        data.totals[used],
    )
    kept = usable[np.ix_(used, shells)]
    means, counts = part.replicates()
    full_weights = moderated_weights(part, means[0], kept)
    share = counts / counts[0]
    weights = np.where(means > 0, full_weights * share[..., None], 0.0)
    lower, upper = layout.edges[:-1][shells], layout.edges[1:][shells]
    density = np.where(weights > 0, means / (upper - lower), 1.0)
    return TailProblem(
        data=part,
        n_shells=usable.sum(axis=1),
        used=used,
        shells=shells,
        means=means[0],
        log_density=np.log(density),
        weights=weights,
        grid=shell_grid(lower, upper),
        log_lambda=0.5 * (np.log(lower) + np.log(upper)),
    )
