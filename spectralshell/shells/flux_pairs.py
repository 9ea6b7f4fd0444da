"""Sums over pairs of modes behind the fluxes, without an array of shells × modes × modes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from spectralshell.shells.soft_shells import SoftShells

Floats = NDArray[np.float64]
Places = NDArray[np.intp]

_CHUNK = 1 << 15  # close pairs at a time: a few MB for each edge


class PairTerms:
    """The terms g_u g_v V_uv of ½ Σ_uv g_u g_v V_uv c[λ_u, λ_v], sorted by how they are divided.

    Pairs further apart than the width of an edge are divided by λ_u − λ_v once, for all shells;
    for close pairs every edge has its own divided difference. Modes so far below the first edge
    that every weight of theirs is 0 or 1 exchange nothing with each other.

    Parameters
    ----------
    rates : ndarray of shape (k,)
        Eigenvalues, ascending.
    products : ndarray of shape (k, k)
        g_u g_v V_uv, symmetric.
    shells : SoftShells
    """

    def __init__(self, rates: Floats, products: Floats, shells: SoftShells) -> None:
        self.rates = rates
        self.shells = shells
        self.below, self.above = shells.below(rates), shells.above(rates)
        self.products = products
        first = int(np.count_nonzero(self.above[0] == 0.0))
        ends = np.searchsorted(rates, rates * np.exp(shells.sigma), side="right")
        ends[:first] = 0  # they have no close pairs
        self._low, self._high = _pairs_within(np.arange(rates.size), ends)
        self._far = self._divide_far_pairs(first)

    def edge_fluxes(self) -> tuple[Floats, Floats]:
        """Return the parts of the flux through each edge with u = v and with u ≠ v."""
        drift = 0.5 * self.shells.slope_below(self.rates) @ np.diagonal(self.products)
        return drift, self._far_fluxes() + self._close_fluxes()

    def pair_flux(self, weights: Floats) -> Floats:
        """Return F_αβ, what shell α gains from shell β; ``weights`` has shape (n_shells + 1, k)."""
        far = weights @ self._far @ weights.T
        size = len(weights)
        close = np.zeros((size, size))
        for low, high, products in self._close_pairs():
            close += (self._weight_differences(low, high) * products) @ weights[:, high].T
        slopes = _edges_to_shells(self.shells.slope_below(self.rates))
        close += (0.5 * slopes * np.diagonal(self.products)) @ weights.T
        return 0.5 * (far - far.T) + (close - close.T)

    def _divide_far_pairs(self, first: int) -> Floats:
        gaps = self.rates[:, None] - self.rates
        gaps[:first, :first] = np.inf
        gaps[self._low, self._high] = np.inf
        gaps[self._high, self._low] = np.inf
        np.fill_diagonal(gaps, np.inf)
        quotients: Floats = self.products / gaps
        return quotients

    def _far_fluxes(self) -> Floats:
        # c = 1 below an edge, 0 above it, plus a part near it. The first is a sum over the pairs
        # that straddle the edge, so nothing large cancels; the second a sum over the modes near it.
        nearby = np.where(self.below < 0.5, self.below, -self.above)
        around: Floats = nearby @ self._far.sum(axis=1)
        splits = np.count_nonzero(self.below >= 0.5, axis=1)
        straddling = [self._far[:split, split:].sum() for split in splits]
        fluxes: Floats = around + np.array(straddling)
        return fluxes

    def _close_fluxes(self) -> Floats:
        fluxes = np.zeros(len(self.below))
        for low, high, products in self._close_pairs():
            fluxes += self._edge_differences(low, high) @ products
        return fluxes

    def _close_pairs(self) -> Iterator[tuple[Places, Places, Floats]]:
        for start in range(0, self._low.size, _CHUNK):
            low, high = self._low[start : start + _CHUNK], self._high[start : start + _CHUNK]
            yield low, high, self.products[low, high]

    def _edge_differences(self, low: Places, high: Places) -> Floats:
        """Return c_k[λ_u, λ_v] of close pairs, shape (n_edges, n_pairs)."""
        u, v = self.rates[low], self.rates[high]
        edges = range(len(self.below))
        return np.array([self.shells.difference_below(edge, u, v) for edge in edges])

    def _weight_differences(self, low: Places, high: Places) -> Floats:
        return _edges_to_shells(self._edge_differences(low, high))


def _edges_to_shells(below: Floats) -> Floats:
    """Turn what holds for c_k at the edges into what holds for w_α of null and the shells."""
    return np.diff(below, axis=0, prepend=0.0, append=0.0)


def _pairs_within(starts: Places, ends: Places) -> tuple[Places, Places]:
    """Return the pairs (u, v) of positions with u < v < ends[u]."""
    counts = np.maximum(ends - starts - 1, 0)
    low = np.repeat(starts, counts)
    offsets = np.arange(low.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return low, low + 1 + offsets
