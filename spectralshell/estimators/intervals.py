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
    """Half-width of the jackknife-t interval and the jackknife standard error.

    Parameters
    ----------
    replicates : ndarray of shape (1 + n_batches, ...)
        The full estimate, then one per batch left out.
    confidence : float
        Nominal coverage.

    Returns
    -------
    half_width, standard_error : float or ndarray
        From Student's t with n_batches − 1 degrees of freedom.

    Examples
    --------
    >>> sample = np.array([1.0, 2.0, 4.0, 5.0])
    >>> left_out = (sample.sum() - sample) / 3
    >>> half, error = jackknife_t(np.append(sample.mean(), left_out), 0.95)
    >>> bool(np.isclose(error, sample.std(ddof=1) / 2))  # the mean's own standard error
    True
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
    """Return the ends of {θ: sse(θ) ≤ threshold} around the minimum.

    Parameters
    ----------
    squares : callable
        sse at an array of θ.
    best : float
        Where the minimum is.
    threshold : float
        As :func:`profile_threshold` gives.
    bounds : tuple of float
        Range of θ.

    Returns
    -------
    lower, upper : float
        Infinite where the profile stays below the threshold up to the bound.

    Examples
    --------
    >>> lower, upper = profile_interval(lambda t: (t - 1.0) ** 2, 1.0, 0.25, (-3.0, 8.0))
    >>> round(lower, 4), round(upper, 4)
    (0.5, 1.5)
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
