"""The resolution floor: the rate below which the shape of a measure is not known."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_POINTS_PER_OCTAVE = 2
# A bound half as wide as the energy of the octave above it: for a smooth measure after m
# Lanczos steps this is reached near 40 λ_max/m², inside the known range of 10 to 80.
_WIDTH_PER_OCTAVE_ENERGY = 0.5
# Where the spectrum has a gap the octave is empty; a thousandth of all the energy is then fine.
_WIDTH_PER_TOTAL = 1e-3
# Between a rate at the rounding error and one well above it.
_NOISE_MARGIN = 2.0


class EnergyBounds(Protocol):
    """Anything that bounds the energy below given rates."""

    def at(self, edges: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper bounds of the energy strictly below each edge."""


def resolution_floor(bounds: EnergyBounds, total: float, lambda_max: float, noise: float) -> float:
    """Lowest rate above which the certified bounds determine the energy of an octave.

    Test points stand at every half octave below ``lambda_max``, whatever the shell ratio is. A
    point is resolved if the bounds of the energy below it are narrower than half the energy of
    the octave above it, or than a thousandth of all energy. The floor is the lowest point that
    has only resolved points above it.

    Parameters
    ----------
    bounds : object with a method ``at``
        Certified bounds of the cumulative energy.
    total : float
        ½‖e‖².
    lambda_max : float
        Largest (Ritz) eigenvalue, 1/τ.
    noise : float
        Norm bound of the operator's rounding error, 1/τ; the floor is at least twice that.

    Returns
    -------
    float
        The floor, 1/τ; 0 for a measure without energy or rates.

    Notes
    -----
    For a smooth measure the floor falls as λ_max/m² with the number m of Lanczos steps; isolated
    eigenvalues are resolved far below that. It costs one evaluation of the bounds at about
    2 log₂(λ_max/noise) points.
    """
    if lambda_max <= 0.0 or total <= 0.0:
        return 0.0
    lowest = max(_NOISE_MARGIN * noise, np.finfo(float).tiny)
    if lowest >= lambda_max:
        return lambda_max
    n_points = 1 + int(np.ceil(_POINTS_PER_OCTAVE * np.log2(lambda_max / lowest)))
    points = lambda_max * 2.0 ** (-np.arange(1, n_points + 1) / _POINTS_PER_OCTAVE)
    lower, upper = bounds.at(points[::-1])
    lower, upper = lower[::-1], upper[::-1]
    middle = np.concatenate([np.full(_POINTS_PER_OCTAVE, total), 0.5 * (lower + upper)])
    octave = middle[:-_POINTS_PER_OCTAVE] - middle[_POINTS_PER_OCTAVE:]
    allowed = np.maximum(_WIDTH_PER_OCTAVE_ENERGY * octave, _WIDTH_PER_TOTAL * total)
    failed = np.flatnonzero(upper - lower > allowed)
    n_resolved = failed[0] if failed.size else len(points)
    floor = points[n_resolved - 1] if n_resolved else lambda_max
    return float(max(floor, lowest))
