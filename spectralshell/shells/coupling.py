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

# Sums in another order differ by rounding; a tie counts against the observation.
_TIE = 1e-9


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


def permuted_couplings(
    V: ArrayLike,
    eigenvalues: ArrayLike,
    partition: ShellPartition,
    *,
    n_null: int = 20,
    generator: np.random.Generator,
    normalization: str = "sqrt",
    reducer: str = "mean-square",
    diagonal: str = "block",
    min_modes: int = 3,
    mask: ArrayLike | None = None,
) -> Floats:
    """Return shell couplings of V with its normalised entries permuted.

    Parameters
    ----------
    V : array-like of shape (k, k)
        As in `shell_coupling`.
    eigenvalues, partition, normalization, reducer, diagonal, min_modes, mask
        As in `shell_coupling`.
    n_null : int, default=20
        Number of permutations.
    generator : numpy.random.Generator
        Where all randomness comes from.

    Returns
    -------
    ndarray of shape (n_null, n_shells, n_shells)
        Each has the same modes per shell, the same entries between different modes and the same
        V_uu as the observed one, each in random places; only modes of shells that are not masked
        take part.

    Raises
    ------
    TypeError, ValueError
        As `shell_coupling`; if ``generator`` is not a numpy Generator, or V is a stack.

    Notes
    -----
    If the entries are exchangeable, off-diagonal and diagonal apart, any statistic of the
    couplings is distributed as under these permutations, whatever the tails of the entries: see
    `permutation_p_value`. Takes O(k²) time and memory for each permutation.

    Examples
    --------
    >>> eigenvalues = 2.0 ** np.arange(0, 4, 0.25)
    >>> shells = ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=4)
    >>> V = np.diag(eigenvalues)  # dM = M: normalised, all V_uu are 1 and nothing can move
    >>> null = permuted_couplings(V, eigenvalues, shells, n_null=2, diagonal="modes",
    ...                           generator=np.random.default_rng(0))
    >>> np.allclose(null, np.eye(4))
    True
    """
    check_integer("n_null", n_null, low=0)
    if not isinstance(generator, np.random.Generator):
        raise TypeError(
            f"generator must be a numpy.random.Generator, got {type(generator).__name__}; pass "
            "numpy.random.default_rng(seed)."
        )
    rule = CouplingRule(normalization, reducer, diagonal, min_modes)
    rates, matrix = check_couplings(V, eigenvalues)
    if matrix.ndim != 2:
        raise ValueError(f"V must be one matrix, got shape {matrix.shape}; permute each alone.")
    modes = assign_modes(rates, partition, min_modes, mask)
    return PairEntries.of(matrix, rates, modes, rule).permuted(n_null, generator).coupling


def permutation_p_value(observed: float, null: ArrayLike) -> float:
    """Return the one-sided p-value (1 + #{null ≤ observed}) / (1 + n_null).

    Parameters
    ----------
    observed : float
        Statistic of the data; small values are the interesting ones, as a small residual is.
    null : array-like of float, shape (n_null,)
        The statistic under the null; NaN counts as small. Ties, up to rounding, count.

    Returns
    -------
    float
        Between 1/(1 + n_null) and 1. NaN if the observation is NaN.

    Examples
    --------
    >>> permutation_p_value(0.1, [0.3, 0.4, 0.05, 0.2])
    0.4
    """
    values = np.asarray(null, dtype=np.float64).ravel()
    if np.isnan(observed):
        return float("nan")
    tie = _TIE * abs(observed) if np.isfinite(observed) else 0.0
    smaller = ~(values > observed + tie)
    return (1.0 + int(smaller.sum())) / (1.0 + values.size)


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
        """Return K from sums of sizes over ordered pairs u ≠ v, ``off``, and over u = v, ``on``.

        Of shapes (..., n_shells, n_shells) and (..., n_shells); a count of 0 modes masks a shell.
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
    """Which modes enter the statistic, and the shell of each."""

    modes: NDArray[np.intp]  # positions of the modes, ordered by shell
    shells: NDArray[np.intp]  # shell of each, ascending
    counts: Floats  # modes per shell, 0 in masked shells
    log_lambda: Floats  # mean ln λ of the modes of each shell, NaN in masked shells

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Shells with enough modes."""
        return np.asarray(self.counts > 0)


@dataclass(frozen=True, eq=False)
class ShellCouplings:
    """Couplings of one matrix, or of a stack of them."""

    coupling: Floats  # K_αβ, shape (..., n_shells, n_shells), NaN in masked shells
    signed_mean: Floats  # mean over the shell of the normalised V_uu, which keeps its sign
    modes: ShellModes


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
    counts[counts < min(min_modes, eigenvalues.size + 1)] = 0.0
    kept = np.flatnonzero(used & (counts[shells] > 0.0))
    kept = kept[np.argsort(shells[kept], kind="stable")]
    logs = sum_by(shells[kept], np.log(eigenvalues[kept]), partition.n_shells)
    return ShellModes(kept, shells[kept], counts, shell_means(logs, counts))


@dataclass(frozen=True, eq=False)
class PairEntries:
    """The distinct normalised entries of V between the m modes of some shells."""

    off: Floats  # entries of pairs of different modes, shape (m (m − 1) / 2,)
    on: Floats  # entries V_uu, shape (m,)
    modes: ShellModes
    rule: CouplingRule

    @classmethod
    def of(
        cls, V: Floats, eigenvalues: Floats, modes: ShellModes, rule: CouplingRule
    ) -> PairEntries:
        """Take the entries of one symmetric matrix."""
        W = normalized_entries(V, eigenvalues, modes, rule)
        return cls(W[np.triu_indices(len(W), 1)], np.diagonal(W).copy(), modes, rule)

    def within(self, shells: slice) -> PairEntries:
        """Return the entries between modes of consecutive shells alone; others are masked."""
        chosen = np.zeros(self.modes.counts.size, dtype=bool)
        chosen[shells] = True
        kept = chosen[self.modes.shells]
        rows, columns = np.triu_indices(kept.size, 1)
        modes = ShellModes(
            self.modes.modes[kept],
            self.modes.shells[kept],
            np.where(chosen, self.modes.counts, 0.0),
            np.where(chosen, self.modes.log_lambda, np.nan),
        )
        return PairEntries(self.off[kept[rows] & kept[columns]], self.on[kept], modes, self.rule)

    def permuted(self, n_null: int, generator: np.random.Generator) -> ShellCouplings:
        """Return the couplings of ``n_null`` matrices with the same entries in other places.

        Entries of pairs and entries V_uu are permuted apart, and matrices stay symmetric.
        """
        n_shells = self.modes.counts.size
        rows, columns = np.triu_indices(self.on.size, 1)
        pair = self.modes.shells[rows] * n_shells + self.modes.shells[columns]
        off_sizes = self.rule.size(self.off)
        off = np.empty((n_null, n_shells * n_shells))
        signed, on = np.empty((n_null, n_shells)), np.empty((n_null, n_shells))
        for draw in range(n_null):
            moved = generator.permutation(off_sizes)
            off[draw] = sum_by(pair, moved, n_shells * n_shells)
            diagonal = generator.permutation(self.on)
            signed[draw] = sum_by(self.modes.shells, diagonal, n_shells)
            on[draw] = sum_by(self.modes.shells, self.rule.size(diagonal), n_shells)
        square = off.reshape(n_null, n_shells, n_shells)
        both = square + square.swapaxes(-1, -2)  # the lower triangle, and each pair in both orders
        counts = self.modes.counts
        return ShellCouplings(
            self.rule.reduce(both, on, counts), shell_means(signed, counts), self.modes
        )


def permuted_matrix(
    V: Floats,
    eigenvalues: Floats,
    modes: ShellModes,
    rule: CouplingRule,
    generator: np.random.Generator,
) -> Floats:
    """Return V between the chosen modes with its normalised entries permuted, shape (m, m).

    Pairs and V_uu are permuted apart, and scaled back to the λ of their new places.
    """
    entries = PairEntries.of(V, eigenvalues, modes, rule)
    upper = np.diag(0.5 * generator.permutation(entries.on))
    upper[np.triu_indices(entries.on.size, 1)] = generator.permutation(entries.off)
    scale = eigenvalues[modes.modes] ** NORMALIZATIONS[rule.normalization]
    return np.asarray((upper + upper.T) * scale[:, None] * scale)


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
