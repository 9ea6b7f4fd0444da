"""How far rounding may move energy across an edge.

The computed recurrence is the exact one of an operator M̃ with ‖M̃ - M‖ <= η. A spectral
projector at an edge a is not a continuous function of M, but one may give way by δ: with P the
projector of M on λ >= a and P̃ that of M̃ on λ < a - δ, ‖P P̃‖ <= κ = η/δ (Davis and Kahan; 1.6 η/δ
is used, which holds in any relative position of the spectra and leaves room for the rounding of the
start vector and of the quadrature itself). Writing sin²θ for the share of the energy of M below a,
and sin²θ̃ for that of M̃ below a - δ,

    sin θ̃ <= sin θ + κ cos θ,   hence   θ >= arcsin(sin θ̃ / √(1 + κ²)) - arctan κ,

which is never weaker than sin θ >= sin θ̃ - κ and much tighter for the upper bound of a small
energy. The upper bound is the same statement about the energy above a + δ. Every δ gives a valid
bound, so the best of many is taken.

Source: C. Davis and W. M. Kahan, "The rotation of eigenvectors by a perturbation III" (1970).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rotated_down(below: Array, rest: Array, kappa: Array, slack: Array | float = 0.0) -> Array:
    """Smallest share sin²θ with sin θ̃ <= sin θ + κ cos θ; ``below`` + ``rest`` = 1."""
    cos2, sin2 = 1.0 / (1.0 + kappa**2), kappa**2 / (1.0 + kappa**2)
    angle = np.arctan2(np.sqrt(below * cos2), np.sqrt(rest + below * sin2))
    return np.asarray(np.sin(np.maximum(angle - np.arctan(kappa) - slack, 0.0)) ** 2)


def rotated_up(below: Array, rest: Array, kappa: Array, slack: Array | float = 0.0) -> Array:
    """Largest share sin²θ with cos θ̃ <= cos θ + κ sin θ; ``below`` + ``rest`` = 1."""
    cos2, sin2 = 1.0 / (1.0 + kappa**2), kappa**2 / (1.0 + kappa**2)
    angle = np.arctan2(np.sqrt(below + rest * sin2), np.sqrt(rest * cos2))
    return np.asarray(np.sin(np.minimum(angle + np.arctan(kappa) + slack, np.pi / 2)) ** 2)
