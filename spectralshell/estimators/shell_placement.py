"""Where the shells begin and end, from the training snapshots' measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from spectralshell.shells import ShellPartition, SpectralMeasure

# Energy that rounding may leave on eigenvalues of a null space.
_NEGLIGIBLE_SHARE = 1e-12


@dataclass(frozen=True)
class PlacedShells:
    """A partition and what it was placed by.

    Parameters
    ----------
    partition : ShellPartition
        From the lowest occupied shell above the floor to the one that holds ``lambda_max``.
    floor : float
        Resolution floor, 1/τ.
    lambda_max : float
        Largest eigenvalue of the measures, 1/τ.
    range : tuple of float
        From the floor to the largest eigenvalue; both ``lambda_0`` where M is zero.
    """

    partition: ShellPartition
    floor: float
    lambda_max: float
    range: tuple[float, float]


def place_shells(
    measures: Sequence[SpectralMeasure], *, q: float, lambda_0: float, floor: str | float
) -> PlacedShells:
    """Place shells between the resolution floor and the largest eigenvalue.

    Parameters
    ----------
    measures : sequence of SpectralMeasure
        Training measures.
    q, lambda_0 : float
        Ratio and anchor of the shells.
    floor : "auto" or float
        The highest floor of the measures, or a given one.

    Returns
    -------
    PlacedShells
        The first edge is at or above the floor. Empty shells at the start are dropped.

    Raises
    ------
    ValueError
        If a given floor is not below the largest eigenvalue.
    """
    lambda_max = max(m.lambda_max for m in measures)
    lowest = max(m.floor for m in measures) if isinstance(floor, str) else float(floor)
    if not isinstance(floor, str) and 0.0 < lambda_max <= lowest:
        raise ValueError(
            f"floor must lie below the largest eigenvalue, {lambda_max:.6g}, got {floor!r}; "
            "lower it or leave floor='auto'."
        )
    # A kernel that is zero has no rates to place shells by; one shell at lambda_0 is legal.
    top = lambda_max if lambda_max > 0.0 else lambda_0
    bottom = min(lowest, top) if lowest > 0.0 else top
    partition = ShellPartition.covering(bottom, top, q=q, lambda_0=lambda_0)
    return PlacedShells(
        _without_empty_start(partition, measures), lowest, lambda_max, (bottom, top)
    )


def _without_empty_start(
    partition: ShellPartition, measures: Sequence[SpectralMeasure]
) -> ShellPartition:
    lowest = np.inf
    for measure in measures:
        lowest = _lowest_rate(measure, partition.edges[0], lowest)
        if lowest < partition.edges[1]:  # nothing is dropped, whatever the others hold
            break
    first = int(partition.index(lowest)) if np.isfinite(lowest) else 0
    return replace(partition, first=partition.first + first, n_shells=partition.n_shells - first)


def _lowest_rate(measure: SpectralMeasure, start: float, end: float) -> float:
    """Return the lowest node in [start, end) at which energy has gathered, or else ``end``."""
    first, last = measure.nodes.searchsorted([start, end])
    gathered = measure.weights[first:last].cumsum() > _NEGLIGIBLE_SHARE * measure.total
    found = gathered.argmax() if gathered.size else 0
    return float(measure.nodes[first + found]) if gathered.any() else end
