"""Variances over batches, jackknife-t and profile intervals, and the test of κ = 0."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special, stats

from spectralshell.estimators.tail_data import ROUNDING, BatchedEnergies

# Variances below this part of the median are zero by accident: identical or single batches.
SMALLEST_VARIANCE = 1e-6
# Relative accuracy of shell integrals; a cutoff that explains less explains rounding.
QUADRATURE = 1e-6
# Each bracket shrinks the ends of a profile interval 32-fold.
N_BRACKETS = 4
N_BRACKET_POINTS = 33


def relative_deviations(data: BatchedEnergies, means: np.ndarray) -> np.ndarray:
    """Influence of each batch on ln of the mean energy: (E_r / mean − 1), 0 where missing.

    Parameters
    ----------
    data : BatchedEnergies
        n_taus, n_batches, n_shells.
    means : ndarray of shape (n_taus, n_shells)
        Mean energies.

    Returns
    -------
    ndarray of shape (n_taus, n_batches, n_shells)
    """
    safe = np.where(means > 0, means, 1.0)[:, None]
    usable = data.present[..., None] & (means > 0)[:, None]
    return np.where(usable, data.energies / safe - 1.0, 0.0)


def moderated_weights(data: BatchedEnergies, means: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Inverse variances of ln of the mean energy, shrunk to a common value.

    With few batches a shell's own variance is a poor weight. It is replaced by its empirical-Bayes
    posterior mean, (d0 s0² + ν s²)/(d0 + ν), with prior s0² and degrees of freedom d0 from the
    scatter of the log-variances over shells [1]_: no scatter beyond that of a χ² gives equal
    weights.

    Parameters
    ----------
    data : BatchedEnergies
        The energies.
    means : ndarray of shape (n_taus, n_shells)
        Mean energies.
    usable : ndarray of bool, shape (n_taus, n_shells)
        Points of the fit; others get weight 0.

    Returns
    -------
    ndarray of shape (n_taus, n_shells)

    References
    ----------
    .. [1] G. K. Smyth, "Linear models and empirical Bayes methods for assessing differential
       expression in microarray experiments", Stat. Appl. Genet. Mol. Biol. 3 (2004), section 6.2.
    """
    counts = data.present.sum(axis=1)
    freedom = np.broadcast_to((counts - 1.0)[:, None], usable.shape)
    squares = (relative_deviations(data, means) ** 2).sum(axis=1)
    known = usable & (freedom > 0)
    variance = np.divide(squares, freedom, out=np.zeros(usable.shape), where=known)
    # Rounding of equal batches is no variance.
    if not known.any() or np.median(variance[known]) < ROUNDING**2:
        return usable.astype(float)
    variance = np.maximum(variance, SMALLEST_VARIANCE * np.median(variance[known]))
    nu = freedom[known] / 2.0
    logs = np.log(variance[known]) - special.digamma(nu) + np.log(nu)
    excess = logs.var(ddof=1) - special.polygamma(1, nu).mean() if logs.size > 1 else 0.0
    if excess > 0:
        d0 = 2.0 * _inverse_trigamma(excess)
        s0 = np.exp(logs.mean() + special.digamma(d0 / 2.0) - np.log(d0 / 2.0))
        variance = (d0 * s0 + freedom * np.where(known, variance, s0)) / (d0 + freedom)
    else:
        variance = np.full(usable.shape, np.exp(logs.mean()))
    return np.where(usable, np.maximum(counts, 1)[:, None] / variance, 0.0)


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


def no_cutoff_p_value(
    data: BatchedEnergies,
    means: np.ndarray,
    weights: np.ndarray,
    log_lambda: np.ndarray,
    improvement: float,
    sse: float,
) -> float:
    """P-value of κ = 0 from the improvement in weighted squares that a cutoff brings.

    Batches are the subjects of a repeated-measures design, so correlations between shells and
    between taus do no harm: the improvement is compared with the trace of the batch covariance over
    the contrasts that a cutoff can move (curvature of each tau, differences of slope between taus),
    with Greenhouse and Geisser's degrees of freedom [1]_. With one batch it is the F test on the
    residuals, which takes them as independent.

    Parameters
    ----------
    data : BatchedEnergies
        The energies.
    means, weights : ndarray of shape (n_taus, n_shells)
        Mean energies and weights of the fit.
    log_lambda : ndarray of shape (n_shells,)
        Where the shells are.
    improvement : float
        Weighted squares without minus with cutoff.
    sse : float
        Weighted squares with cutoff.

    Returns
    -------
    float

    References
    ----------
    .. [1] S. W. Greenhouse and S. Geisser, "On methods in the analysis of profile data",
       Psychometrika 24 (1959).
    """
    n_taus, n_points = len(means), int((weights > 0).sum())
    if improvement <= QUADRATURE**2 * weights.sum():
        return 1.0
    if data.n_batches == 1:
        freedom = n_points - 2 * n_taus - 1
        if freedom < 1 or sse <= 0:
            return 0.0 if sse <= 0 < improvement and freedom >= 1 else 1.0
        return float(stats.f.sf(improvement / n_taus / (sse / freedom), n_taus, freedom))
    contrasts = _cutoff_contrasts(np.sqrt(weights), log_lambda)
    counts = data.present.sum(axis=1)
    # Each batch's part in ln of the mean; n/(n−1) makes its sum of squares an unbiased variance.
    parts = relative_deviations(data, means) / counts[:, None, None]
    parts = parts * np.sqrt(counts / np.maximum(counts - 1.0, 1.0))[:, None, None]
    parts = (parts * np.sqrt(weights)[:, None]).transpose(1, 0, 2).reshape(data.n_batches, -1)
    covariance = (parts @ contrasts).T @ (parts @ contrasts)
    trace = np.trace(covariance)
    if trace <= ROUNDING**2 * weights.sum():
        return 0.0
    freedom = trace**2 / (covariance**2).sum()
    return float(stats.f.sf(improvement / trace, freedom, freedom * (data.n_batches - 1)))


def _cutoff_contrasts(root_weights: np.ndarray, log_lambda: np.ndarray) -> np.ndarray:
    """Orthonormal columns: what a cutoff can add to a power law of one slope, to second order."""
    n_taus, n_shells = root_weights.shape
    x = (log_lambda - log_lambda.mean()) / max(np.ptp(log_lambda), 1e-12)
    blocks = np.eye(n_taus)
    null = np.concatenate([np.kron(blocks, np.ones(n_shells)), np.tile(x, n_taus)[None]])
    full = np.concatenate([np.kron(blocks, x), np.kron(blocks, x**2)])
    root = root_weights.ravel()
    basis, _ = np.linalg.qr((null * root).T)
    rest = (full * root).T
    rest = rest - basis @ (basis.T @ rest)
    left, values, _ = np.linalg.svd(rest - basis @ (basis.T @ rest), full_matrices=False)
    return left[:, values > 1e-9 * values.max(initial=1e-300)]


def _inverse_trigamma(value: float) -> float:
    """Solve ψ'(x) = value by Newton's method on 1/ψ', which is nearly linear."""
    x = 0.5 + 1.0 / value
    for _ in range(50):
        trigamma = special.polygamma(1, x)
        step = trigamma * (1.0 - trigamma / value) / special.polygamma(2, x)
        x = x + step
        if abs(step) < 1e-8 * x:
            break
    return float(x)
