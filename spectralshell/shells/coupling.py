"""Shell couplings: how strongly a moving kernel couples the modes of one shell to another's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralshell.parameter_checks import check_integer, check_option
from spectralshell.shells.measure import finite_vector
from spectralshell.shells.partition import ShellPartition

Floats = NDArray[np.float64]

NORMALIZATIONS = {"sqrt": 0.5, "product": 1.0, "raw": 0.0}
"""Power of λ_u λ_v that the entries of V are divided by."""
REDUCERS = ("mean-square", "rms", "mean-abs")
DIAGONALS = ("block", "modes", "pairs")

# V comes from two products with its basis; more asymmetry than this is another matrix.
_ASYMMETRY = 1e-6


@dataclass(frozen=True)
class CouplingRule:
    """How entries of V become shell couplings; see `shell_coupling` for the parameters."""

    normalization: str = "sqrt"
    reducer: str = "mean-square"
    diagonal: str = "block"
    min_modes: int = 3

    def __post_init__(self) -> None:
        check_option("normalization", self.normalization, tuple(NORMALIZATIONS))
        check_option("reducer", self.reducer, REDUCERS)
        check_option("diagonal", self.diagonal, DIAGONALS)
        check_integer("min_modes", self.min_modes, low=1)

    @property
    def scale_free_slope(self) -> float:
        """Slope of ln K_αα against ln λ where dM scales as M does: V_uv ∝ √(λ_u λ_v)."""
        return self.scale_free_mean_slope * (2.0 if self.reducer == "mean-square" else 1.0)

    @property
    def scale_free_mean_slope(self) -> float:
        """The same for the mean of V_uu, where no reducer enters."""
        return 1.0 - 2.0 * NORMALIZATIONS[self.normalization]

    def size(self, entries: Floats) -> Floats:
        """Return what is averaged over a pair of shells: the square, or the absolute value."""
        return np.asarray(np.abs(entries) if self.reducer == "mean-abs" else entries**2)

    def reduce(self, off: Floats, on: Floats, counts: Floats) -> Floats:
        """Return K from sums of sizes over pairs of different modes and over single modes.

        Parameters
        ----------
        off : ndarray of shape (..., n_shells, n_shells)
            Sums over ordered pairs u ≠ v.
        on : ndarray of shape (..., n_shells)
            Sums over u = v.
        counts : ndarray of shape (n_shells,)
            Modes per shell; 0 masks a shell.
        """
        n_pairs = counts[:, None] * counts
        total = off.copy()
        inner = np.arange(counts.size)
        if self.diagonal == "block":
            total[..., inner, inner] += on
        elif self.diagonal == "modes":
            total[..., inner, inner] = on
            n_pairs[inner, inner] = counts
        else:
            n_pairs[inner, inner] = counts * (counts - 1.0)
        mean = np.divide(total, n_pairs, out=np.full(total.shape, np.nan), where=n_pairs > 0)
        return np.asarray(np.sqrt(mean) if self.reducer == "rms" else mean)


@dataclass(frozen=True, eq=False)
class ShellModes:
    """Which modes enter the statistic, and the shell of each.

    Parameters
    ----------
    modes : ndarray of int, shape (m,)
        Positions of the modes, ordered by shell.
    shells : ndarray of int, shape (m,)
        Shell of each, ascending.
    counts : ndarray of float, shape (n_shells,)
        Modes per shell, 0 in masked shells.
    log_lambda : ndarray of shape (n_shells,)
        Mean ln λ of the modes, NaN in masked shells.
    """

    modes: NDArray[np.intp]
    shells: NDArray[np.intp]
    counts: Floats
    log_lambda: Floats

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Shells with enough modes."""
        return np.asarray(self.counts > 0)


@dataclass(frozen=True, eq=False)
class ShellCouplings:
    """Couplings of one matrix, or of a stack of them.

    Parameters
    ----------
    coupling : ndarray of shape (..., n_shells, n_shells)
        K_αβ, NaN in masked shells.
    signed_mean : ndarray of shape (..., n_shells)
        Mean over the shell of the normalised V_uu, which keeps its sign.
    modes : ShellModes
    """

    coupling: Floats
    signed_mean: Floats
    modes: ShellModes


def shell_coupling(
    V: ArrayLike,
    eigenvalues: ArrayLike,
    partition: ShellPartition,
    *,
    normalization: str = "sqrt",
    reducer: str = "mean-square",
    diagonal: str = "block",
    min_modes: int = 3,
    mask: ArrayLike | None = None,
) -> Floats:
    """Return the coupling K_αβ between shells from the coupling V between modes.

    Parameters
    ----------
    V : array-like of shape (k, k) or (..., k, k)
        Uᵀ (dM/dt) U, symmetric, unit 1/τ² (1/τ per unit of whatever dM is differentiated by); or a
        stack of such matrices.
    eigenvalues : array-like of shape (k,)
        λ of the modes, 1/τ, in any order. Modes below the first edge do not count; those above the
        last edge count in the last shell.
    partition : ShellPartition
    normalization : {"sqrt", "product", "raw"}, default="sqrt"
        Divide V_uv by √(λ_u λ_v), by λ_u λ_v, or by nothing. A kernel that moves in proportion to
        itself, dM = aM, has the same coupling at all scales only under ``"sqrt"``.
    reducer : {"mean-square", "rms", "mean-abs"}, default="mean-square"
        Average over the pairs of modes of two shells. All are free of the arbitrary signs of the
        eigenvectors; the first two do not change with a rotation inside a shell either, if its
        modes share one λ.
    diagonal : {"block", "modes", "pairs"}, default="block"
        What K_αα averages over: all pairs of modes of the shell, u = v included (a rotation leaves
        it alone); u = v, the drift of eigenvalues; u ≠ v, the rotation of eigenvectors.
    min_modes : int, default=3
        Shells with fewer modes are masked.
    mask : array-like of bool, shape (k,), optional
        Modes to use, for example the converged ones; all by default.

    Returns
    -------
    ndarray of shape (..., n_shells, n_shells)
        Symmetric, non-negative; NaN in the rows and columns of masked shells. In the units of
        V² / (λ_u λ_v) by default: 1/τ².

    Raises
    ------
    ValueError
        If shapes disagree, a value is not finite, V is not symmetric, or an option is unknown.

    Notes
    -----
    Takes O(k² n_shells) operations and O(k²) memory for each matrix. Section 7.3 and Appendix B.6
    of "When Does Learning Renormalize?", where V is not normalised: a raw K whose diagonal grows
    with λ is not Toeplitz, so the paper's two claims exclude each other.

    Examples
    --------
    >>> eigenvalues = 2.0 ** np.arange(0, 4, 0.25)
    >>> shells = ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=4)
    >>> V = np.diag(3.0 * eigenvalues)  # dM = 3 M
    >>> np.allclose(shell_coupling(V, eigenvalues, shells, diagonal="modes"), 9.0 * np.eye(4))
    True
    """
    rule = CouplingRule(normalization, reducer, diagonal, min_modes)
    return couple_shells(V, eigenvalues, partition, rule, mask).coupling


def couple_shells(
    V: ArrayLike,
    eigenvalues: ArrayLike,
    partition: ShellPartition,
    rule: CouplingRule,
    mask: ArrayLike | None = None,
) -> ShellCouplings:
    """Return `shell_coupling` with the signed means and the modes behind them."""
    rates, matrices = check_couplings(V, eigenvalues)
    modes = assign_modes(rates, partition, rule.min_modes, mask)
    W = normalized_entries(matrices, rates, modes, rule)
    sizes = rule.size(W)
    diagonal = np.arange(modes.modes.size)
    on = sizes[..., diagonal, diagonal].copy()
    sizes[..., diagonal, diagonal] = 0.0
    member = _membership(modes)
    off = member.T @ sizes @ member
    coupling = rule.reduce(off, on @ member, modes.counts)
    signed = shell_means(W[..., diagonal, diagonal] @ member, modes.counts)
    return ShellCouplings(coupling, signed, modes)


def check_couplings(V: ArrayLike, eigenvalues: ArrayLike) -> tuple[Floats, Floats]:
    """Return eigenvalues and exactly symmetric matrices as float64; raise on other input."""
    rates = finite_vector("eigenvalues", eigenvalues)
    matrices = np.asarray(V, dtype=np.float64)
    if matrices.ndim < 2 or matrices.shape[-2:] != (rates.size, rates.size):
        raise ValueError(
            f"V must have shape (..., {rates.size}, {rates.size}) like eigenvalues, got "
            f"{matrices.shape}; pass Uᵀ (dM/dt) U in the same basis."
        )
    if not np.isfinite(matrices).all():
        raise ValueError("V holds NaN or infinity, expected finite values; check the derivative.")
    transposed = matrices.swapaxes(-1, -2)
    largest = np.abs(matrices).max(initial=0.0)
    if np.abs(matrices - transposed).max(initial=0.0) > _ASYMMETRY * largest:
        raise ValueError(
            "V must be symmetric, as dM/dt is, but V and its transpose differ by more than "
            f"{_ASYMMETRY:g} of its largest entry; pass (V + V.T) / 2 if that is rounding."
        )
    return rates, 0.5 * (matrices + transposed)


def assign_modes(
    eigenvalues: Floats, partition: ShellPartition, min_modes: int, mask: ArrayLike | None = None
) -> ShellModes:
    """Return the modes of all shells that have at least ``min_modes`` of them."""
    shells = partition.index(eigenvalues)
    used = shells >= 0
    if mask is not None:
        chosen = np.asarray(mask)
        if chosen.dtype != np.bool_ or chosen.shape != eigenvalues.shape:
            raise ValueError(
                f"mask must be boolean with shape {eigenvalues.shape}, one entry per mode, got "
                f"{chosen.dtype} with shape {chosen.shape}."
            )
        used &= chosen
    counts = np.bincount(shells[used], minlength=partition.n_shells).astype(np.float64)
    counts[counts < min_modes] = 0.0
    kept = np.flatnonzero(used & (counts[shells] > 0.0))
    kept = kept[np.argsort(shells[kept], kind="stable")]
    logs = sum_by(shells[kept], np.log(eigenvalues[kept]), partition.n_shells)
    return ShellModes(kept, shells[kept], counts, shell_means(logs, counts))


def normalized_entries(
    V: Floats, eigenvalues: Floats, modes: ShellModes, rule: CouplingRule
) -> Floats:
    """Return V between the chosen modes, divided by the power of λ_u λ_v that the rule names."""
    rows = modes.modes
    scale = eigenvalues[rows] ** -NORMALIZATIONS[rule.normalization]
    return np.asarray(V[..., rows[:, None], rows] * scale[:, None] * scale)


def shell_means(sums: Floats, counts: Floats) -> Floats:
    """Return sums per shell divided by the number of modes, NaN where there is none."""
    there = np.broadcast_to(counts > 0, sums.shape)
    return np.asarray(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=there))


def sum_by(places: NDArray[np.intp], values: Floats, size: int) -> Floats:
    """Return the sums of the values that share a place, shape (size,)."""
    return np.bincount(places, weights=values, minlength=size).astype(np.float64, copy=False)


def _membership(modes: ShellModes) -> Floats:
    return np.asarray(modes.shells[:, None] == np.arange(modes.counts.size), dtype=np.float64)
