"""What shell couplings look like when nothing is arranged by shell: permuted entries of V."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralshell.parameter_checks import check_integer
from spectralshell.shells.coupling import (
    NORMALIZATIONS,
    CouplingRule,
    ShellCouplings,
    ShellModes,
    assign_modes,
    check_couplings,
    normalized_entries,
    shell_means,
    sum_by,
)
from spectralshell.shells.partition import ShellPartition

Floats = NDArray[np.float64]

# Sums in another order differ by rounding; a tie counts against the observation.
_TIE = 1e-9


@dataclass(frozen=True, eq=False)
class PairEntries:
    """The distinct normalised entries of V between the modes of some shells.

    Parameters
    ----------
    off : ndarray of shape (m (m − 1) / 2,)
        Entries of pairs of different modes.
    on : ndarray of shape (m,)
        Entries V_uu.
    modes : ShellModes
        The m modes.
    rule : CouplingRule
        How couplings are made of them.
    """

    off: Floats
    on: Floats
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

    Entries of pairs and entries V_uu are permuted apart, as in `permuted_couplings`, and scaled
    back to the λ of their new places.
    """
    entries = PairEntries.of(V, eigenvalues, modes, rule)
    upper = np.diag(0.5 * generator.permutation(entries.on))
    upper[np.triu_indices(entries.on.size, 1)] = generator.permutation(entries.off)
    scale = eigenvalues[modes.modes] ** NORMALIZATIONS[rule.normalization]
    return np.asarray((upper + upper.T) * scale[:, None] * scale)


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
