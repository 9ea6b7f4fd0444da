"""Energies of many measures below the same edges, evaluated together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spectralshell.krylov import CumulativeBounds, evaluate_together
from spectralshell.shells import SpectralMeasure, cumulative_energies


def energies_below(measures: Sequence[SpectralMeasure], edges: np.ndarray) -> np.ndarray:
    """Energy strictly below each edge, as `SpectralMeasure.estimate` gives it.

    Parameters
    ----------
    measures : sequence of SpectralMeasure
        At least one.
    edges : ndarray of shape (k,)
        Positive and non-decreasing.

    Returns
    -------
    ndarray of shape (n_measures, k)
        A row does not depend on the other measures. Bounds remember their edges, so that a fold
        or a second fit evaluates nothing again.
    """
    evaluate_together([bounds for _, bounds in _quadratures(measures)], edges)
    return cumulative_energies(measures, edges)


def null_energies(measures: Sequence[SpectralMeasure]) -> np.ndarray:
    """Energy below each measure's own noise, as `SpectralMeasure.null` gives it.

    Parameters
    ----------
    measures : sequence of SpectralMeasure
        At least one.

    Returns
    -------
    ndarray of shape (n_measures,)
    """
    noisy = [(m.noise, bounds) for m, bounds in _quadratures(measures) if m.noise > 0.0]
    evaluate_together([bounds for _, bounds in noisy], [[noise] for noise, _ in noisy])
    return np.array([m.null for m in measures])


def _quadratures(
    measures: Sequence[SpectralMeasure],
) -> list[tuple[SpectralMeasure, CumulativeBounds]]:
    return [
        (m, m.bounds) for m in measures if isinstance(m.bounds, CumulativeBounds) and not m.counted
    ]
