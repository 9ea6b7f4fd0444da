"""Power laws of the diagonal shell couplings against λ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from spectralshell.parameter_checks import check_real
from spectralshell.shells.coupling import CouplingRule, couple_shells
from spectralshell.shells.partition import ShellPartition

Floats = NDArray[np.float64]

DIAGONAL_ROWS = ("coupling", "signed_mean")

# Scatter of this size is rounding of logarithms: relative to the values, absolute near ln 1 = 0.
_ROUNDING = 1e-12

_ZERO = "zero coupling"


@dataclass(frozen=True, eq=False)
class LineFit:
    """Least squares of y on x: a number each, or an array over a stack of y.

    Parameters
    ----------
    slope, r2 : ndarray
        NaN for fewer than two points. R² of a constant that the line meets is 1.
    half_width : ndarray
        Of the confidence interval of the slope; infinite for two points.
    n_points : ndarray of int
        Finite pairs.
    """

    slope: Floats
    half_width: Floats
    r2: Floats
    n_points: NDArray[np.intp]


def fit_line(x: Floats, y: Floats, confidence: float = 0.95) -> LineFit:
    """Fit y = a + slope·x over the last axis, leaving out pairs that are not finite.

    The interval is Student's t on the residuals: it takes the points as independent.
    """
    known = np.isfinite(x) & np.isfinite(y)
    n = known.sum(axis=-1)
    safe = np.maximum(n, 1)

    def centred(values: Floats) -> Floats:
        mean = np.where(known, values, 0.0).sum(axis=-1) / safe
        return np.where(known, values - mean[..., None], 0.0)

    dx, dy = centred(np.broadcast_to(x, y.shape)), centred(y)
    sxx, syy, sxy = (dx**2).sum(-1), (dy**2).sum(-1), (dx * dy).sum(-1)
    enough = (n >= 2) & (sxx > 0.0)
    slope = np.divide(sxy, sxx, out=np.full(n.shape, np.nan), where=enough)
    sse = ((dy - np.where(enough, slope, 0.0)[..., None] * dx) ** 2).sum(-1)
    # The largest |y|, and at least 1, as y may be the logarithm of numbers near 1.
    scale = np.abs(np.where(known, y, 0.0)).max(axis=-1, initial=1.0)
    rounding = safe * (_ROUNDING * scale) ** 2
    varies = syy > rounding
    r2 = np.where(varies, 1.0 - sse / np.where(varies, syy, 1.0), 1.0)
    freedom = np.maximum(n - 2, 1)
    error = np.sqrt(sse / freedom / np.where(enough, sxx, 1.0))
    half = np.where(n > 2, stats.t.ppf(0.5 + confidence / 2.0, freedom) * error, np.inf)
    return LineFit(slope, np.where(enough, half, np.nan), np.where(enough, r2, np.nan), n)


def diagonal_scaling(
    V: ArrayLike,
    eigenvalues: ArrayLike,
    partition: ShellPartition,
    *,
    normalization: str = "sqrt",
    reducer: str = "mean-square",
    diagonal: str = "block",
    min_modes: int = 3,
    mask: ArrayLike | None = None,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Return the slopes of ln K_αα and of the signed mean of V_uu against ln λ.

    Parameters
    ----------
    V, eigenvalues, partition, normalization, reducer, diagonal, min_modes, mask
        As in `shell_coupling`.
    confidence : float, default=0.95
        Level of the intervals.

    Returns
    -------
    DataFrame
        Two rows, ``coupling`` (ln K_αα) and ``signed_mean`` (ln of the shell's mean of the
        normalised V_uu, which keeps its sign), with the columns ``slope, slope_lower,
        slope_upper, r2, n_shells, scale_free, status``. ``scale_free`` is the slope of a
        kernel that moves in proportion to itself: raw 2 for mean squares, else 1; normalised by
        the square root 0. Zero couplings give zeros and a status.

    Raises
    ------
    ValueError
        As `shell_coupling`, or if ``confidence`` is not between 0 and 1.

    Notes
    -----
    λ of a shell is the geometric mean of its modes. The interval is least squares over shells,
    which takes them as independent. R² measures scatter against the slope, so it is small where
    the slope is near 0, as it should be after normalisation. With ``diagonal="block"`` the slope
    also holds the change of the number of modes per shell, where V_uu outweighs V_uv. Section 7.4
    of "When Does Learning Renormalize?" expects slope 1 of K_αα, by its section 7.3 a raw mean of
    squares; slope 1 is that of their root and of the signed mean.

    Examples
    --------
    >>> eigenvalues = 2.0 ** np.arange(0, 6, 0.25)
    >>> shells = ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=6)
    >>> fits = diagonal_scaling(np.diag(3.0 * eigenvalues), eigenvalues, shells,
    ...                         normalization="raw", reducer="mean-square")
    >>> fits["slope"].round(9).tolist()  # dM = 3 M: a mean square has slope 2, not 1
    [2.0, 1.0]
    """
    check_real("confidence", confidence, low=0.0, high=1.0, low_open=True, high_open=True)
    rule = CouplingRule(normalization, reducer, diagonal, min_modes)
    found = couple_shells(V, eigenvalues, partition, rule, mask)
    if found.coupling.ndim != 2:
        raise ValueError(
            f"V must be one matrix, got shape {np.shape(V)}; call diagonal_scaling for each."
        )
    inner = np.diagonal(found.coupling)
    return scaling_frame(found.modes.log_lambda, inner, found.signed_mean, rule, confidence)


def scaling_frame(
    log_lambda: Floats, inner: Floats, signed: Floats, rule: CouplingRule, confidence: float
) -> pd.DataFrame:
    """Return the frame of `diagonal_scaling` from K_αα and the signed means of the shells."""
    values = np.stack([inner, signed])
    fit = fit_line(log_lambda, log_sizes(values), confidence)
    frame = pd.DataFrame(
        {
            "slope": fit.slope,
            "slope_lower": fit.slope - fit.half_width,
            "slope_upper": fit.slope + fit.half_width,
            "r2": fit.r2,
            "n_shells": fit.n_points,
            "scale_free": [rule.scale_free_slope, rule.scale_free_mean_slope],
            "status": [_status(row, log_lambda) for row in values],
        },
        index=pd.Index(DIAGONAL_ROWS, name="quantity"),
    )
    zero = frame["status"] == _ZERO
    frame.loc[zero, ["slope", "slope_lower", "slope_upper", "r2"]] = 0.0
    return frame


def log_sizes(values: Floats) -> Floats:
    """Return ln |value|, NaN for zeros and masked shells.

    Examples
    --------
    >>> log_sizes(np.array([-1.0, 0.0])).tolist()
    [0.0, nan]
    """
    there = np.abs(values) > 0.0
    return np.log(np.abs(values), out=np.full(values.shape, np.nan), where=there)


def _status(values: Floats, log_lambda: Floats) -> str:
    known = values[np.isfinite(values) & np.isfinite(log_lambda)]
    phrases = []
    if known.size and not known.any():
        return _ZERO
    n_zero, n_fitted = int((known == 0.0).sum()), int((known != 0.0).sum())
    if n_zero:
        phrases.append(f"{n_zero} shells without coupling left out")
    if n_fitted < 2:
        phrases.append("fewer than two shells")
    elif n_fitted == 2:
        phrases.append("two shells: no interval")
    n_minor = min(int((known < 0.0).sum()), int((known > 0.0).sum()))
    if n_minor:
        phrases.append(f"sign differs in {n_minor} of {n_fitted} shells")
    return "; ".join(phrases) or "ok"
