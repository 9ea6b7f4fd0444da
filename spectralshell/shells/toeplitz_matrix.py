"""How far a shell coupling is from depending on the shell offset alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


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

    Parameters
    ----------
    usable : array-like of bool, shape (n_shells,)
        The spectrum reaches from the first to the last of these.
    window_shells : int
        Shells per window; where the spectrum has fewer, it is one window.

    Returns
    -------
    list of ShellWindow
        Empty without a usable shell.

    Examples
    --------
    >>> [(w.first, w.centrality) for w in sliding_windows([True] * 5, 3)]
    [(2, 0.0), (1, 1.0), (0, 0.0)]
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
    """Return the position of the most central window, the upper of two; None without one.

    Examples
    --------
    >>> most_central(sliding_windows([True] * 6, 3))
    1
    """
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
