"""Soft shells: a smooth partition of unity over the eigenvalues, for balances that are exact.

A hard shell's energy jumps when an eigenvalue crosses its edge, so no flux balances it at that
instant. Soft shells weigh every mode by w_α(λ), smooth in ln λ, with Σ_α w_α = 1; their energies
½⟨e, w_α(M) e⟩ are differentiable, and the derivative of w_α(M) is a divided difference of w_α.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erfc

from spectralshell.parameter_checks import check_real
from spectralshell.shells.partition import NULL, ShellPartition

Floats = NDArray[np.float64]

SOFTNESS = 0.25
# Twelve nodes integrate a Gaussian over one of its widths to rounding, also far in its tails.
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(12)
_NODES, _NODE_WEIGHTS = 0.5 * (_NODES + 1.0), 0.5 * _NODE_WEIGHTS


@dataclass(frozen=True)
class SoftShells:
    """Smooth weights w_α(λ) of the null shell and the shells of a partition; they add up to one.

    Parameters
    ----------
    partition : ShellPartition
        Where the shells are.
    softness : float, default=0.25
        Width σ of an edge in units of ln q: a mode within about σ of an edge, in ln λ, belongs to
        both of its shells. Small values come close to hard shells.

    Raises
    ------
    TypeError, ValueError
        If ``softness`` is not a positive number.

    Notes
    -----
    With c_k(λ) = ½ erfc((ln λ − ln edge_k)/(√2 σ)), the smooth form of "λ lies below edge k", the
    null shell has the weight c_0, shell α c_(α+1) − c_α, and the last shell what is left, so that
    energy above the last edge counts in it, as in hard shells. Modes with λ ≤ 0 are null. All
    derivatives of c_k vanish as λ → 0.

    Examples
    --------
    >>> shells = SoftShells(ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=2))
    >>> shells.edges.tolist()  # nothing is above the last edge, so no flux crosses it
    [1.0, 2.0]
    >>> shells.weights([-1.0, 0.1, 1.0, 9.0]).round(6).tolist()
    [[1.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.499968, 0.0], [0.0, 0.0, 3.2e-05, 1.0]]
    """

    partition: ShellPartition
    softness: float = SOFTNESS

    def __post_init__(self) -> None:
        softness = check_real("softness", self.softness, low=0.0, low_open=True)
        object.__setattr__(self, "softness", softness)

    @property
    def sigma(self) -> float:
        """Width of every edge in ln λ."""
        return self.softness * math.log(self.partition.q)

    @property
    def edges(self) -> Floats:
        """Edges that energy can cross: all but the last, shape (n_shells,), unit 1/τ."""
        return self.partition.edges[:-1]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights: ``null`` and those of the shells."""
        return (NULL, *self.partition.names)

    def below(self, lam: ArrayLike) -> Floats:
        """Return c_k(λ), the share of each rate that lies below each edge.

        Parameters
        ----------
        lam : array-like of float, shape (m,)
            Rates; those at 0 and below lie below every edge.

        Returns
        -------
        ndarray of float64, shape (n_edges, m)
        """
        return 0.5 * erfc(self._distances(_vector(lam)))

    def above(self, lam: ArrayLike) -> Floats:
        """Return 1 − c_k(λ) without cancellation, shape (n_edges, m)."""
        return 0.5 * erfc(-self._distances(_vector(lam)))

    def weights(self, lam: ArrayLike) -> Floats:
        """Return w_α(λ) of the null shell and the shells, each with its own relative accuracy.

        Parameters
        ----------
        lam : array-like of float, shape (m,)

        Returns
        -------
        ndarray of float64, shape (1 + n_shells, m)
            Non-negative; columns add up to 1.
        """
        rates = _vector(lam)
        below, above = self.below(rates), self.above(rates)
        # Of the two differences that are equal, the one between the smaller numbers.
        inner = np.where(below[1:] < 0.5, below[1:] - below[:-1], above[:-1] - above[1:])
        return np.concatenate([below[:1], inner, above[-1:]])

    def slope_below(self, lam: ArrayLike) -> Floats:
        """Return c_k'(λ), shape (n_edges, m): never positive, and 0 for λ ≤ 0. Unit τ."""
        rates = _vector(lam)
        positive = rates > 0.0
        bell = self._bell(self._distances(rates))
        return -np.divide(bell, rates, out=np.zeros_like(bell), where=positive)

    def difference_below(self, edge: int, lam: ArrayLike, other: ArrayLike) -> Floats:
        """Return the divided differences (c_k(λ) − c_k(μ))/(λ − μ) at one edge.

        Parameters
        ----------
        edge : int
            Position k of the edge.
        lam, other : array-like of float, shape (p,)
            Pairs of rates, in any order.

        Returns
        -------
        ndarray of float64, shape (p,)
            c_k'(λ) where λ = μ. Unit τ.

        Notes
        -----
        Pairs closer than σ in ln λ are integrated: the mean of c_k' by twelve Gauss–Legendre
        nodes. The quotient of the others takes the side of the edge with the smaller numbers.
        """
        u, v = np.broadcast_arrays(_vector(lam), _vector(other))
        low, high = np.minimum(u, v), np.maximum(u, v)
        quotients = np.zeros(low.shape)
        close = (low > 0.0) & (high <= low * math.exp(self.sigma))
        quotients[close] = self._mean_slope(edge, low[close], high[close])
        apart = ~close & (high > 0.0)
        lows, highs = low[apart], high[apart]
        z_low, z_high = self._distances(lows, edge)[0], self._distances(highs, edge)[0]
        upper = 0.5 * (erfc(z_high) - erfc(z_low))
        lower = 0.5 * (erfc(-z_low) - erfc(-z_high))
        quotients[apart] = np.where(z_low > 0.0, upper, lower) / (highs - lows)
        return quotients

    def density_at_edges(self, lam: ArrayLike, energies: ArrayLike) -> Floats:
        """Return the energy per unit λ at each edge, smoothed as the shells are.

        Parameters
        ----------
        lam, energies : array-like of float, shape (m,)
            Rates and the energies ½g² there.

        Returns
        -------
        ndarray of float64, shape (n_edges,)
            The derivative of the energy below an edge by the place of that edge, so flux and
            density are of the same weights and a common drift of all modes is recovered.
        """
        bell = self._bell(self._distances(_vector(lam)))
        return (bell @ np.asarray(energies, dtype=np.float64)) / self.edges

    def count_near(self, lam: ArrayLike) -> NDArray[np.int64]:
        """Return the number of rates within half a shell of each edge, in ln λ."""
        rates = _vector(lam)
        reach = math.sqrt(self.partition.q)
        near = (rates >= self.edges[:, None] / reach) & (rates <= self.edges[:, None] * reach)
        counts: NDArray[np.int64] = near.sum(axis=1, dtype=np.int64)
        return counts

    @cached_property
    def _log_edges(self) -> Floats:
        return np.log(self.edges)

    def _distances(self, rates: Floats, edge: int | None = None) -> Floats:
        """Return (ln λ − ln edge)/(√2 σ), −∞ for λ ≤ 0, one row for each edge or the one asked."""
        logs = np.full(rates.shape, -np.inf)
        np.log(rates, out=logs, where=rates > 0.0)
        edges = self._log_edges if edge is None else self._log_edges[edge : edge + 1]
        return (logs - edges[:, None]) / (math.sqrt(2.0) * self.sigma)

    def _bell(self, distances: Floats) -> Floats:
        """Return −dc/d ln λ, the Gaussian of width σ."""
        return np.exp(-(distances**2)) / (self.sigma * math.sqrt(2.0 * math.pi))

    def _mean_slope(self, edge: int, low: Floats, high: Floats) -> Floats:
        """Return the divided difference of close pairs, 0 < low ≤ high."""
        gap = np.log1p((high - low) / low)
        start = np.log(low) - self._log_edges[edge]
        points = start[:, None] + gap[:, None] * _NODES
        mean = self._bell(points / (math.sqrt(2.0) * self.sigma)) @ _NODE_WEIGHTS
        # Δ ln λ/Δλ tends to 1/λ.
        stretch = np.divide(gap, high - low, out=1.0 / low, where=high > low)
        return -mean * stretch


def _vector(values: ArrayLike) -> Floats:
    rates = np.asarray(values, dtype=np.float64)
    if rates.ndim != 1 or not np.isfinite(rates).all():
        raise ValueError(
            f"lam must hold finite rates in one dimension, got shape {rates.shape}; remove NaN "
            "and infinite eigenvalues."
        )
    return rates
