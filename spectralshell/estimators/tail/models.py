"""The densities that a tail is compared with, and their quadrature over shells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Quadrature nodes per unit of ln λ: shells of ratio 2 get 6 nodes, of ratio 4 get 12.
NODES_PER_LOG = 8.5

MIN_NODES = 4

# A cutoff exp(−κ λ^p) with a smaller |p| is a power law over any window that data cover.
DEGENERATE = 0.05


@dataclass(frozen=True)
class TailModel:
    """One family of densities, named as in ``comparison_``.

    Parameters
    ----------
    name : str
        Its name.
    kind : {"power", "template", "exponential", "lognormal", "free"}
        Which base and cutoff it has.
    bounds : tuple of float
        Range of the profiled parameter θ.
    n_coarse : int
        Points of the first grid over the range.
    """

    name: str
    kind: str
    bounds: tuple[float, float] = (-3.0, 8.0)
    n_coarse: int = 67


POWER_LAW = TailModel("power law", "power", bounds=(-60.0, 60.0), n_coarse=25)

TEMPLATE = TailModel("power law, template cutoff", "template")

EXPONENTIAL = TailModel("power law, exp(-kappa lambda)", "exponential", n_coarse=23)

LOGNORMAL = TailModel("lognormal", "lognormal", bounds=(0.0, 4.0), n_coarse=17)

FREE_POWER = TailModel("power law, free cutoff power", "free", bounds=(-4.0, 7.0), n_coarse=45)


@dataclass(frozen=True)
class ShellGrid:
    """Quadrature nodes of the shells of a fit, in x = ln(λ / λ_ref).

    Attributes
    ----------
    x : ndarray of shape (n_shells, n_nodes)
        Gauss-Legendre nodes of each shell; the reference is the top edge, so x <= 0.
    log_weights : ndarray of shape (n_shells, n_nodes)
        ln of the weights of the mean over λ: quadrature weight times λ over the shell width.
    log_reference : float
        ln λ_ref.
    span : float
        ln of the last over the first edge.
    """

    x: np.ndarray
    log_weights: np.ndarray
    log_reference: float
    span: float


def shell_grid(lower: np.ndarray, upper: np.ndarray) -> ShellGrid:
    """Quadrature in ln λ over each shell [lower, upper).

    Parameters
    ----------
    lower, upper : ndarray of shape (n_shells,)
        Positive edges of the shells, which need not be contiguous.

    Returns
    -------
    ShellGrid

    Examples
    --------
    >>> grid = shell_grid(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    >>> bool(np.allclose(np.exp(grid.log_weights).sum(axis=1), 1.0))
    True
    """
    log_lower, log_upper = np.log(lower), np.log(upper)
    length = log_upper - log_lower
    n_nodes = max(MIN_NODES, int(np.ceil(NODES_PER_LOG * length.max())))
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    log_lambda = log_lower[:, None] + 0.5 * length[:, None] * (1.0 + nodes)
    reference = float(log_upper.max())
    # ∫ ε dλ / width = ∫ ε λ d(ln λ) / width
    log_weights = (
        np.log(0.5 * length[:, None] * weights) + log_lambda - np.log(upper - lower)[:, None]
    )
    return ShellGrid(
        log_lambda - reference, log_weights, reference, float(reference - log_lower.min())
    )


def box_cox(x: np.ndarray, power: np.ndarray) -> np.ndarray:
    """Return (e^(power x) − 1)/power, and x where the power is zero."""
    safe = np.where(power == 0.0, 1.0, power)
    # Above 700 the exponential overflows; such a density is zero to any precision anyway.
    return np.where(power == 0.0, x, np.expm1(np.minimum(safe * x, 700.0)) / safe)


def box_cox_derivative(x: np.ndarray, power: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the derivative of :func:`box_cox` in the power, given its value."""
    near = np.abs(power) < 1e-5  # where the quotient would cancel
    safe = np.where(near, 1.0, power)
    exact = (x * np.exp(np.minimum(safe * x, 700.0)) - value) / safe
    return np.where(near, 0.5 * x * x, exact)
