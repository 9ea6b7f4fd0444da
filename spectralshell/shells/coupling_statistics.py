"""Statistics of shell couplings: Toeplitz part and residual, offsets, the diagonal's power laws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from spectralshell.parameter_checks import check_real
from spectralshell.shells.coupling import CouplingRule, couple_shells
from spectralshell.shells.partition import ShellPartition
from spectralshell.statuses import (
    FEWER_THAN_TWO_SHELLS,
    TWO_SHELLS,
    ZERO_COUPLING,
    join_statuses,
    sign_differs,
    without_coupling,
)

Floats = NDArray[np.float64]

DIAGONAL_ROWS = ("coupling", "signed_mean")

# Scatter of this size is rounding of logarithms: relative to the values, absolute near ln 1 = 0.
_ROUNDING = 1e-12


def toeplitz_part(K: ArrayLike) -> Floats:
    """Return T(K), the nearest Toeplitz matrix: every entry replaced by its diagonal's mean.

    Parameters
    ----------
    K : array-like of shape (..., n, n)
        NaN entries are masked, and left out of the means.

    Returns
    -------
    ndarray of shape (..., n, n)
        Without a gap wherever the diagonal holds a number; NaN on diagonals that hold none.

    Examples
    --------
    >>> toeplitz_part([[1.0, 5.0], [5.0, 3.0]]).tolist()
    [[2.0, 5.0], [5.0, 2.0]]
    """
    matrices = _check_square(K)
    n = matrices.shape[-1]
    known = ~np.isnan(matrices)
    values = np.where(known, matrices, 0.0)
    part = np.full(matrices.shape, np.nan)
    for offset in range(1 - n, n):
        sums = np.trace(values, offset=offset, axis1=-2, axis2=-1)
        counts = np.trace(known, offset=offset, axis1=-2, axis2=-1)
        mean = np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)
        rows = np.arange(max(-offset, 0), n - max(offset, 0))
        part[..., rows, rows + offset] = np.asarray(mean)[..., None]
    return part


def toeplitz_residual(K: ArrayLike) -> Floats | float:
    """Return ‖K − T(K)‖_F / ‖K‖_F: 0 for a coupling that depends on the shell offset alone.

    Parameters
    ----------
    K : array-like of shape (..., n, n)
        Shell couplings; NaN entries are masked and do not count.

    Returns
    -------
    float or ndarray of shape (...)
        Between 0 and 1; 0 where K is zero, and trivially for a single shell. NaN where no entry is
        known.

    Raises
    ------
    ValueError
        If K is not square or holds infinity.

    Notes
    -----
    The residual falls with the number of shells and rises with their noise: compare it with the
    same number under a null, never alone. Section 7.3 of "When Does Learning Renormalize?".

    Examples
    --------
    >>> toeplitz_residual([[2.0, 1.0], [1.0, 2.0]])
    0.0
    >>> toeplitz_residual([[1.0, np.nan, 0.5], [np.nan] * 3, [0.5, np.nan, 1.0]])
    0.0
    """
    matrices = _check_square(K)
    known = ~np.isnan(matrices)
    # Scaled by the largest entry, so that squares of small couplings do not underflow.
    largest = np.where(known, np.abs(matrices), 0.0).max(axis=(-2, -1), keepdims=True, initial=0.0)
    scaled = matrices / np.where(largest > 0.0, largest, 1.0)
    gap = np.where(known, scaled - toeplitz_part(scaled), 0.0)
    norm = np.linalg.norm(np.where(known, scaled, 0.0), axis=(-2, -1))
    ratio = np.linalg.norm(gap, axis=(-2, -1)) / np.where(norm > 0.0, norm, 1.0)
    residual = np.where(known.any(axis=(-2, -1)), ratio, np.nan)
    return float(residual) if residual.ndim == 0 else residual


def offset_kernel(K: ArrayLike) -> pd.DataFrame:
    """Return the coupling by shell offset |α − β|, with its spread.

    Parameters
    ----------
    K : array-like of shape (n, n)
        Symmetric; NaN entries are masked.

    Returns
    -------
    DataFrame
        One row per offset 0 … n − 1: ``offset, coupling`` (mean), ``spread`` (standard deviation
        over the pairs of shells at this offset, NaN for fewer than two), ``n_pairs``.

    Examples
    --------
    >>> offset_kernel([[1.0, 5.0], [5.0, 3.0]])["coupling"].tolist()
    [2.0, 5.0]
    """
    matrix = _check_square(K)
    rows = []
    for offset in range(matrix.shape[-1]):
        entries = np.diagonal(matrix, offset)
        entries = entries[~np.isnan(entries)]
        mean = entries.mean() if entries.size else np.nan
        spread = entries.std(ddof=1) if entries.size > 1 else np.nan
        rows.append((offset, mean, spread, entries.size))
    return pd.DataFrame(rows, columns=["offset", "coupling", "spread", "n_pairs"])


def intra_inter_ratio(K: ArrayLike) -> Floats | float:
    """Return the mean of K_αα over the mean of K_αβ, α ≠ β.

    Parameters
    ----------
    K : array-like of shape (..., n, n)
        Shell couplings; NaN entries are masked.

    Returns
    -------
    float or ndarray of shape (...)
        0 where K is zero, infinite where only the diagonal is not, NaN with fewer than two shells.

    Notes
    -----
    Noise has a ratio above 1 too, as V_uu of a random symmetric matrix is twice as large as V_uv in
    the mean square: compare with a null.

    Examples
    --------
    >>> intra_inter_ratio([[4.0, 1.0], [1.0, 2.0]])
    3.0
    """
    matrices = _check_square(K)
    inner = np.eye(matrices.shape[-1], dtype=bool)
    within = _mean_known(matrices, inner)
    between = _mean_known(matrices, ~inner)
    ratio = np.divide(
        within,
        between,
        out=np.where(within > 0.0, np.inf, 0.0),
        where=between > 0.0,
    )
    ratio = np.where(np.isnan(within) | np.isnan(between), np.nan, ratio)
    return float(ratio) if ratio.ndim == 0 else ratio


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
    zero = [_is_zero(row, log_lambda) for row in values]
    frame.loc[zero, ["slope", "slope_lower", "slope_upper", "r2"]] = 0.0
    return frame


def _status(values: Floats, log_lambda: Floats) -> str:
    if _is_zero(values, log_lambda):
        return ZERO_COUPLING
    known, phrases = _known(values, log_lambda), []
    n_zero, n_fitted = int((known == 0.0).sum()), int((known != 0.0).sum())
    if n_zero:
        phrases.append(without_coupling(n_zero))
    if n_fitted < 2:
        phrases.append(FEWER_THAN_TWO_SHELLS)
    elif n_fitted == 2:
        phrases.append(TWO_SHELLS)
    n_minor = min(int((known < 0.0).sum()), int((known > 0.0).sum()))
    if n_minor:
        phrases.append(sign_differs(n_minor, n_fitted))
    return join_statuses(phrases)


def _is_zero(values: Floats, log_lambda: Floats) -> bool:
    known = _known(values, log_lambda)
    return bool(known.size and not known.any())


def _known(values: Floats, log_lambda: Floats) -> Floats:
    return values[np.isfinite(values) & np.isfinite(log_lambda)]


def log_sizes(values: Floats) -> Floats:
    """Return ln |value|, NaN for zeros and masked shells."""
    there = np.abs(values) > 0.0
    return np.log(np.abs(values), out=np.full(values.shape, np.nan), where=there)


@dataclass(frozen=True, eq=False)
class LineFit:
    """Least squares of y on x: a number each, or an array over a stack of y."""

    slope: Floats  # NaN for fewer than two points
    half_width: Floats  # of the slope's confidence interval; infinite for two points
    r2: Floats  # 1 for a constant that the line meets
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


@dataclass(frozen=True)
class ShellWindow:
    """Consecutive shells [first, stop), and how central they are: 0 at an edge, 1 in the middle."""

    first: int
    stop: int
    centrality: float

    @property
    def shells(self) -> slice:
        """The shells, to index with."""
        return slice(self.first, self.stop)


def sliding_windows(usable: ArrayLike, window_shells: int) -> list[ShellWindow]:
    """Return all windows of consecutive shells, from the upper spectral edge to the lower one.

    They slide from the last usable shell to the first; fewer than ``window_shells`` are one window.
    """
    shells = np.flatnonzero(np.asarray(usable, dtype=bool))
    if not shells.size:
        return []
    start, stop = int(shells[0]), int(shells[-1]) + 1
    width = min(window_shells, stop - start)
    last = stop - width
    windows = []
    for first in range(last, start - 1, -1):
        from_edge = min(first - start, last - first)
        middle = (last - start) / 2.0
        windows.append(ShellWindow(first, first + width, from_edge / middle if middle else 1.0))
    return windows


def most_central(windows: list[ShellWindow]) -> int | None:
    """Return the position of the most central window, the upper of two; None without one."""
    if not windows:
        return None
    return int(np.argmax([window.centrality for window in windows]))


def _check_square(K: ArrayLike) -> Floats:
    matrices = np.asarray(K, dtype=np.float64)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"K must have shape (..., n, n), got {matrices.shape}.")
    if np.isinf(matrices).any():
        raise ValueError("K holds infinity, expected couplings or NaN for masked ones.")
    return matrices


def _mean_known(matrices: Floats, where: NDArray[np.bool_]) -> Floats:
    known = where & ~np.isnan(matrices)
    sums = np.where(known, matrices, 0.0).sum(axis=(-2, -1))
    counts = known.sum(axis=(-2, -1))
    return np.asarray(
        np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)
    )
