"""Confidence intervals: jackknife-t over batches, and profile likelihood."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

# Each bracket shrinks the ends of a profile interval 32-fold.
N_BRACKETS = 4
N_BRACKET_POINTS = 33


def jackknife_t(
    replicates: np.ndarray, confidence: float
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Half-width of the jackknife-t interval (n_batches − 1 degrees of freedom), standard error.

    ``replicates`` has shape (1 + n_batches, ...): the full estimate, then each batch left out.
    """
    left_out = replicates[1:]
    n = len(left_out)
    error = np.sqrt((n - 1) / n * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
    return stats.t.ppf(0.5 + confidence / 2.0, n - 1) * error, error


def profile_threshold(sse: float, n_points: int, n_parameters: int, confidence: float) -> float:
    """Sum of squares at the ends of a profile-likelihood interval (F form, variance unknown)."""
    freedom = n_points - n_parameters
    if freedom < 1:
        return np.inf
    return sse * (1.0 + stats.f.ppf(confidence, 1, freedom) / freedom)


def profile_interval(
    squares: Callable[[np.ndarray], np.ndarray],
    best: float,
    threshold: float,
    bounds: tuple[float, float],
) -> tuple[float, float]:
    """Return the ends of {θ: squares(θ) ≤ threshold} around the minimum at ``best``.

    An end is infinite where the profile stays below the threshold up to the bound.
    """

    def crossing(far: float) -> float:
        near = best
        for _ in range(N_BRACKETS):
            theta = np.linspace(near, far, N_BRACKET_POINTS)
            above = np.flatnonzero(squares(theta[1:]) > threshold)
            if above.size == 0:
                return float(far)
            near, far = theta[above[0]], theta[above[0] + 1]
        return 0.5 * float(near + far)

    ends = crossing(bounds[0]), crossing(bounds[1])
    return (
        -np.inf if ends[0] == bounds[0] else ends[0],
        np.inf if ends[1] == bounds[1] else ends[1],
    )
