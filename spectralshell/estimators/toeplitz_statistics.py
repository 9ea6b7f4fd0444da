"""What is read off shell couplings, its null and its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralshell.estimators.tail_intervals import jackknife_t
from spectralshell.shells import intra_inter_ratio, permutation_p_value, toeplitz_residual
from spectralshell.shells.diagonal_scaling import fit_line, log_sizes

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
NULL_BAND = (0.05, 0.95)
"""Quantiles of the null that frames and displays show as its band."""

ALTERNATIVES = {
    "toeplitz_residual": "less",
    "coupling_slope": "two-sided",
    "coupling_r2": "greater",
    "signed_slope": "two-sided",
    "signed_r2": "greater",
    "intra_inter_ratio": "greater",
    "adjacent_share": "greater",
}
"""The statistics, and on which side of a null the papers' claims put them."""

_TIE = 1e-9
_RESIDUALS = ("toeplitz_residual", "windows")
# Positive and skewed, so their intervals are made in logarithms.
_LOGARITHMIC = (*_RESIDUALS, "intra_inter_ratio", "diagonal", "kernel")
_SHARES = ("coupling_r2", "signed_r2", "adjacent_share", "shares")


@dataclass(frozen=True, eq=False)
class ShellSummary:
    """Couplings and fluxes between shells: what may be averaged over snapshots.

    Parameters
    ----------
    coupling : ndarray of shape (..., n_shells, n_shells)
        K_αβ, NaN in masked shells.
    signed_mean : ndarray of shape (..., n_shells)
        Mean of the normalised V_uu of each shell.
    log_lambda : ndarray of shape (n_shells,)
        Mean ln λ of its modes.
    flux : ndarray of shape (..., n_shells)
        Σ |F_αβ| by distance |α − β|.
    """

    coupling: Floats
    signed_mean: Floats
    log_lambda: Floats
    flux: Floats

    @classmethod
    def mean(cls, summaries: Sequence[ShellSummary]) -> ShellSummary:
        """Return the mean over snapshots of what each has; NaN where none has it."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: mean_known([getattr(s, name) for s in summaries]) for name in names})

    def statistics(self) -> dict[str, Floats]:
        """Return every statistic, one number or one for each draw."""
        inner = np.diagonal(self.coupling, axis1=-2, axis2=-1)
        drift = fit_line(self.log_lambda, log_sizes(self.signed_mean))
        size = fit_line(self.log_lambda, log_sizes(inner))
        values = {
            "toeplitz_residual": toeplitz_residual(self.coupling),
            "coupling_slope": size.slope,
            "coupling_r2": size.r2,
            "signed_slope": drift.slope,
            "signed_r2": drift.r2,
            "intra_inter_ratio": intra_inter_ratio(self.coupling),
            "adjacent_share": adjacent_share(self.flux),
        }
        zero = self.is_zero()
        return {name: np.where(zero, 0.0, value) for name, value in values.items()}

    def is_zero(self) -> NDArray[np.bool_]:
        """Whether there are couplings and all of them are zero, for each draw."""
        known = ~np.isnan(self.coupling)
        zero = ~(known & (self.coupling != 0.0)).any(axis=(-2, -1))
        return np.asarray(zero & known.any(axis=(-2, -1)))


def mean_known(values: Sequence[Floats]) -> Floats:
    """Return the mean over the first axis of what is not NaN, NaN where nothing is.

    Examples
    --------
    >>> mean_known([np.array([1.0, np.nan]), np.array([3.0, np.nan])]).tolist()
    [2.0, nan]
    """
    stack = np.stack(values)
    known = ~np.isnan(stack)
    counts = known.sum(axis=0)
    sums = np.where(known, stack, 0.0).sum(axis=0)
    return np.asarray(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))


def shares(flux: Floats) -> Floats:
    """Return sizes by distance as shares of their sum, 0 where nothing flows."""
    total = flux.sum(axis=-1, keepdims=True)
    there = np.broadcast_to(total != 0.0, flux.shape)  # unknown ones stay so
    return np.asarray(np.divide(flux, total, out=np.zeros(flux.shape), where=there))


def adjacent_share(flux: Floats) -> Floats:
    """Return the share of the flux between neighbouring shells; NaN for a single shell."""
    if flux.shape[-1] < 2:
        return np.full(flux.shape[:-1], np.nan)
    return shares(flux)[..., 1]


def null_p_value(observed: float, null: Floats, alternative: str) -> float:
    """Return the p-value of an observation under a null on the side that a claim names.

    Parameters
    ----------
    observed : float
    null : ndarray of shape (n_draws,)
    alternative : {"less", "greater", "two-sided"}

    Returns
    -------
    float
        (1 + number of draws at least as extreme) / (1 + n_draws), extreme being small, large, or
        far from the median of draws and observation together: if these are exchangeable, so are
        their distances, and no p-value is below 1 / (1 + n_draws). NaN if the observation is NaN or
        no draw is a number.

    Examples
    --------
    >>> null_p_value(5.0, np.arange(4.0), "greater")
    0.2
    >>> null_p_value(-5.0, np.arange(4.0), "two-sided")
    0.2
    """
    if np.isnan(observed) or np.isnan(null).all():
        return float("nan")
    if alternative == "less":
        return permutation_p_value(observed, null)
    if alternative == "greater":
        return permutation_p_value(-observed, -null)
    # Sums in another order differ by rounding, which must not decide who is farther.
    tied = np.isclose(null, observed, rtol=_TIE, atol=0.0)
    pooled = np.append(np.where(tied, observed, null), observed)
    middle = np.nanmedian(pooled)
    with np.errstate(invalid="ignore"):
        gaps = np.where(pooled == middle, 0.0, np.abs(pooled - middle))
    return permutation_p_value(-gaps[-1], -gaps[:-1])


def null_columns(prefix: str, observed: Floats, null: Floats, alternative: str) -> dict[str, Any]:
    """Return the median, band and p-values of a null over its draws, as columns of a frame.

    Parameters
    ----------
    prefix : str
        Name of the null.
    observed : ndarray of shape (n_rows,)
    null : ndarray of shape (n_draws, n_rows)
    alternative : str
        As in `null_p_value`.
    """
    # Infinite draws are ordered, not interpolated between.
    lower, upper = np.quantile(null, NULL_BAND, axis=0, method="inverted_cdf")
    p = [null_p_value(value, null[:, row], alternative) for row, value in enumerate(observed)]
    return {
        f"{prefix}_median": np.median(null, axis=0),
        f"{prefix}_lower": lower,
        f"{prefix}_upper": upper,
        f"{prefix}_p": p,
    }


def jackknife(
    batches: Sequence[Any], evaluate: Callable[[Sequence[int]], dict[str, Floats]]
) -> dict[str, tuple[Floats, Floats]] | None:
    """Return a jackknife interval over batches for everything that ``evaluate`` gives.

    Parameters
    ----------
    batches : sequence
        What each snapshot is resampled with: its batch and name.
    evaluate : callable
        From positions of snapshots to named arrays.

    Returns
    -------
    dict of name to (lower, upper), or None
        None with fewer than two batches. Ends of positive quantities are positive, those of
        shares between 0 and 1.
    """
    labels = list(dict.fromkeys(batches))
    if len(labels) < 2:
        return None
    everything = list(range(len(batches)))
    left_out = [[i for i in everything if batches[i] != label] for label in labels]
    replicates = [evaluate(chosen) for chosen in (everything, *left_out)]
    return {
        name: _interval(name, np.stack([found[name] for found in replicates]))
        for name in replicates[0]
    }


def _interval(name: str, replicates: Floats) -> tuple[Floats, Floats]:
    logarithmic = name in _LOGARITHMIC
    usable = np.isfinite(replicates) & ((replicates > 0.0) | (not logarithmic))
    safe = np.where(usable, replicates, 1.0)
    scale = np.log(safe) if logarithmic else safe
    half, _ = jackknife_t(scale, CONFIDENCE)
    half = np.where(usable.all(axis=0), half, np.nan)
    if logarithmic:
        lower, upper = safe[0] * np.exp(-half), safe[0] * np.exp(half)
        return lower, np.minimum(upper, 1.0) if name in _RESIDUALS else upper
    lower, upper = replicates[0] - half, replicates[0] + half
    return (np.maximum(lower, 0.0), np.minimum(upper, 1.0)) if name in _SHARES else (lower, upper)
