"""The density per unit ln λ that a partition into shells stands for, and its score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spectralshell.estimators.energies_below import energies_below
from spectralshell.parameter_checks import check_sample_weight
from spectralshell.shells import SpectralMeasure

# Share of the uniform density in the mixture: an empty shell then costs ln(100) and not infinity.
_UNIFORM_SHARE = 0.01


@dataclass(frozen=True)
class ShellDensity:
    """Piecewise-constant density of energy per unit ln λ on a window.

    Parameters
    ----------
    edges : ndarray of shape (n_bins + 1,)
        Window ends and the shell edges between them, 1/τ.
    density : ndarray of shape (n_bins,)
        Per unit ln λ, integrating to 1.
    """

    edges: np.ndarray
    density: np.ndarray

    @classmethod
    def from_measures(
        cls,
        measures: Sequence[SpectralMeasure],
        shell_edges: np.ndarray,
        window: tuple[float, float],
    ) -> ShellDensity:
        """Fit to the energies of training measures, averaged over them.

        Parameters
        ----------
        measures : sequence of SpectralMeasure
            Training measures.
        shell_edges : ndarray
            Edges of the partition; those outside the window do not matter.
        window : (float, float)
            Rates that count, both ends included.

        Returns
        -------
        ShellDensity
            Uniform if the measures have no energy in the window. Without bins, so that every score
            is NaN, if the window is a single rate: nothing was resolved below it.
        """
        lo, hi = window
        if not lo < hi:
            return cls(edges=np.array([lo]), density=np.empty(0))
        inside = shell_edges[(shell_edges > lo) & (shell_edges < hi)]
        edges = np.concatenate([[lo], inside, [np.nextafter(hi, np.inf)]])
        widths = np.diff(np.log(edges))
        energies = np.diff(energies_below(measures, edges)).mean(axis=0)
        total = energies.sum()
        uniform = 1.0 / widths.sum()
        shares = energies / total if total > 0.0 else widths * uniform
        density = (1.0 - _UNIFORM_SHARE) * shares / widths + _UNIFORM_SHARE * uniform
        return cls(edges=edges, density=density)

    def score(self, measures: Sequence[SpectralMeasure], sample_weight: Any = None) -> float:
        """Energy-weighted mean log-density of the nodes inside the window.

        Parameters
        ----------
        measures : sequence of SpectralMeasure
            Held-out measures.
        sample_weight : array-like of shape (n_measures,), optional
            Weight of each measure.

        Returns
        -------
        float
            In nats; NaN where no node inside the window has energy.
        """
        weights = check_sample_weight(sample_weight, len(measures))
        log_density = np.log(self.density)
        total = gain = 0.0
        for measure, weight in zip(measures, weights, strict=True):
            inside = (measure.nodes >= self.edges[0]) & (measure.nodes < self.edges[-1])
            energy = weight * measure.weights[inside]
            shell = np.searchsorted(self.edges, measure.nodes[inside], side="right") - 1
            total += energy.sum()
            gain += energy @ log_density[shell]
        return float(gain / total) if total > 0.0 else float("nan")
