"""The resolution floor: the rate below which the shape of a measure is not known."""

from __future__ import annotations

import numpy as np

from spectralshell.shells.measure import EnergyBounds

_POINTS_PER_OCTAVE = 2
# Bounds half as far apart as the energy of the octave above: a smooth measure reaches this near
# 40 λ_max/m², inside the known range of 10 to 80.
_WIDTH_PER_OCTAVE_ENERGY = 0.5
# Where the spectrum has a gap the octave is empty; a thousandth of all the energy is then fine.
_WIDTH_PER_TOTAL = 1e-3
# The noise bounds one product; the eigenvalues of a rounded null space reach a little further.
_NOISE_MARGIN = 2.0


def noise_floor(noise: float, lambda_max: float, n: int) -> float:
    """Lowest rate that rounding leaves meaningful, for a spectrum known completely.

    Parameters
    ----------
    noise : float
        Norm bound of the operator's rounding error, 1/τ.
    lambda_max : float
        Largest eigenvalue, 1/τ.
    n : int
        Dimension of M; a dense eigensolver in float64 is accurate to about n ε λ_max.

    Returns
    -------
    float
        The floor, 1/τ, at most ``lambda_max``.

    Examples
    --------
    >>> noise_floor(6e-7, 1.0, 640)  # float32 products
    1.2e-06
    """
    rounding = n * float(np.finfo(np.float64).eps) * lambda_max
    return min(max(_NOISE_MARGIN * noise, rounding), lambda_max)


def quadrature_floor(bounds: EnergyBounds, total: float, lambda_max: float, lowest: float) -> float:
    """Lowest rate above which a Gauss quadrature determines the energy of an octave.

    Test points stand at every half octave below ``lambda_max``, whatever the shell ratio is. A
    point is resolved if the bounds of the energy below it (without their allowance for rounding)
    are closer than half the energy of the octave above it, or than a thousandth of all energy.
    The floor is the lowest point that has only resolved points above it.

    Parameters
    ----------
    bounds : object with a method ``unwidened``
        Bounds of the cumulative energy.
    total : float
        ½‖e‖².
    lambda_max : float
        Largest Ritz value, 1/τ.
    lowest : float
        The noise floor, below which there is nothing to find.

    Returns
    -------
    float
        The floor, 1/τ, between ``lowest`` and ``lambda_max``.

    Notes
    -----
    For a smooth measure the floor falls as λ_max/m² with the number m of Lanczos steps; isolated
    eigenvalues are resolved far below that. It costs one evaluation of the bounds at about
    2 log₂(λ_max/lowest) points.
    """
    if total <= 0.0 or not 0.0 < lowest < lambda_max:
        return lowest
    n_points = 1 + int(np.ceil(_POINTS_PER_OCTAVE * np.log2(lambda_max / lowest)))
    points = lambda_max * 2.0 ** (-np.arange(1, n_points + 1) / _POINTS_PER_OCTAVE)
    lower, upper = bounds.unwidened(points)
    above = np.full(_POINTS_PER_OCTAVE, total)
    middle = np.concatenate([above, 0.5 * (lower + upper)])
    octave = middle[:-_POINTS_PER_OCTAVE] - middle[_POINTS_PER_OCTAVE:]
    allowed = np.maximum(_WIDTH_PER_OCTAVE_ENERGY * octave, _WIDTH_PER_TOTAL * total)
    failed = np.flatnonzero(upper - lower > allowed)
    n_resolved = int(failed[0]) if failed.size else n_points
    return max(float(points[n_resolved - 1]) if n_resolved else lambda_max, lowest)
