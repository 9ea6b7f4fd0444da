"""One snapshot's couplings in shells: as observed, permuted, and along random directions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectralshell.estimators.mode_couplings import ModeCouplings
from spectralshell.estimators.shell_placement import PlacedShells, place_shells
from spectralshell.estimators.toeplitz_statistics import ShellSummary
from spectralshell.shells import ShellPartition, SoftShells, SpectralMeasure
from spectralshell.shells.coupling import CouplingRule, ShellModes, assign_modes, couple_shells
from spectralshell.shells.coupling_nulls import PairEntries, permuted_matrix
from spectralshell.shells.flux_pairs import PairTerms
from spectralshell.shells.toeplitz_matrix import ShellWindow

Floats = NDArray[np.float64]

# Streams of the generator, so that no null depends on which others are drawn.
_WHOLE, _WINDOW, _FLUX = range(3)


@dataclass(frozen=True, eq=False)
class SnapshotShells:
    """The couplings of one snapshot in given shells, and what they would be without structure.

    Parameters
    ----------
    couplings : ModeCouplings
        The measurement; only its resolved modes count.
    partition : ShellPartition
    rule : CouplingRule
        How couplings are made of entries.
    seed : int
        Of the permutations; with the snapshot's batch and name it decides all of them. Snapshots of
        different times share them, since successive couplings of a batch are nearly the same.
    """

    couplings: ModeCouplings
    partition: ShellPartition
    rule: CouplingRule
    seed: int

    @property
    def source(self) -> tuple[Any, Any]:
        """Batch and name: what the snapshots of one trajectory share."""
        return self.couplings.batch, self.couplings.name

    def n_permuted(self, window: ShellWindow | None = None) -> tuple[int, ...]:
        """Return how many modes have their entries permuted, for couplings and for fluxes.

        In a window there are no fluxes.
        """
        if window is not None:
            return (int(self.modes.counts[window.shells].sum()),)
        return self.modes.modes.size, self._all_modes.modes.size

    @cached_property
    def modes(self) -> ShellModes:
        """Modes of the shells with enough of them."""
        m = self.couplings
        return assign_modes(m.eigenvalues, self.partition, self.rule.min_modes, m.resolved)

    @cached_property
    def observed(self) -> ShellSummary:
        """Along the direction."""
        return self._summary(self.couplings.couplings)

    @cached_property
    def random(self) -> ShellSummary:
        """Along random directions of the same norm, one draw each."""
        return stack_summaries([self._summary(V) for V in self.couplings.random_couplings])

    def permuted(self, n_null: int, *, with_flux: bool = True) -> ShellSummary:
        """Return the couplings, and the fluxes if wanted, with the entries of V in random places.

        Entries between the modes of usable shells are permuted for the couplings, those between
        all resolved modes for the fluxes. Without fluxes, the couplings are the same.
        """
        m = self.couplings
        drawn = self._entries.permuted(n_null, self._generator(_WHOLE))
        flux = np.zeros((n_null, self.partition.n_shells))
        if with_flux:
            modes, draws = self._all_modes, self._generator(_FLUX)
            for draw in range(n_null):
                V = permuted_matrix(m.couplings, m.eigenvalues, modes, self.rule, draws)
                flux[draw] = self._flux_sizes(V)
        return ShellSummary(drawn.coupling, drawn.signed_mean, self.modes.log_lambda, flux)

    def permuted_within(self, window: ShellWindow, n_null: int) -> Floats:
        """Return the couplings of one window with its entries permuted, (n_null, W, W)."""
        generator = self._generator(_WINDOW, window.first, window.stop)
        drawn = self._entries.within(window.shells).permuted(n_null, generator).coupling
        return drawn[:, window.shells, window.shells]

    @cached_property
    def _entries(self) -> PairEntries:
        m = self.couplings
        return PairEntries.of(m.couplings, m.eigenvalues, self.modes, self.rule)

    @cached_property
    def _all_modes(self) -> ShellModes:
        return assign_modes(self.couplings.eigenvalues, self.partition, 1, self.couplings.resolved)

    def _summary(self, V: Floats) -> ShellSummary:
        m = self.couplings
        found = couple_shells(V, m.eigenvalues, self.partition, self.rule, m.resolved)
        rows = self._all_modes.modes
        flux = self._flux_sizes(V[np.ix_(rows, rows)])
        return ShellSummary(found.coupling, found.signed_mean, found.modes.log_lambda, flux)

    def _flux_sizes(self, V: Floats) -> Floats:
        """Return Σ |F_αβ| by distance between shells, from V between all resolved modes."""
        rows = self._all_modes.modes
        order = np.argsort(self.couplings.eigenvalues[rows], kind="stable")
        rates = self.couplings.eigenvalues[rows][order]
        g = self.couplings.amplitudes[rows][order]
        soft = SoftShells(self.partition)
        terms = PairTerms(rates, np.outer(g, g) * V[np.ix_(order, order)], soft)
        exchanged = np.abs(terms.pair_flux(soft.weights(rates))[1:, 1:])
        distances = range(self.partition.n_shells)
        return np.array([np.trace(exchanged, distance) for distance in distances])

    def _generator(self, *stream: int) -> np.random.Generator:
        labels = repr(self.source)
        digest = hashlib.sha256(labels.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little"), *stream])


def stack_summaries(summaries: Sequence[ShellSummary]) -> ShellSummary:
    """Return summaries of one snapshot as one with a draw each."""
    return ShellSummary(
        np.stack([s.coupling for s in summaries]),
        np.stack([s.signed_mean for s in summaries]),
        summaries[0].log_lambda,
        np.stack([s.flux for s in summaries]),
    )


def place_coupling_shells(
    measured: Sequence[ModeCouplings], *, q: float, lambda_0: float
) -> PlacedShells:
    """Place shells from the lowest resolved mode of any snapshot to the largest eigenvalue."""
    counted = [_counting_measure(couplings) for couplings in measured]
    return place_shells(counted, q=q, lambda_0=lambda_0, floor="auto")


def _counting_measure(couplings: ModeCouplings) -> SpectralMeasure:
    nodes = couplings.eigenvalues[couplings.resolved]
    return SpectralMeasure(
        nodes,
        np.ones(nodes.size),
        total=float(nodes.size),
        lambda_max=couplings.lambda_max,
        floor=couplings.floor,
        noise=couplings.noise,
    )
