"""Decay under a frozen kernel: every mode on its own, g² ∝ e^(−2λτ).

The null model that a tail must be told apart from ("Renormalizable spectral-shell dynamics",
Section 7.3, v = 0). From ε0 = A λ^−s it gives A λ^−s e^(−2λτ), which for s = 2 is exactly the tail
template with b = 2 and κ = 2τ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralshell.dynamics.shell_integrals import check_edges, log_shell_average
from spectralshell.parameter_checks import check_finite

Floats = NDArray[np.float64]


def lazy_loss(eigenvalues: ArrayLike, energies: ArrayLike, tau: ArrayLike) -> Any:
    """Return Σ w e^(−2λτ), the loss of a discrete measure under a frozen kernel.

    Parameters
    ----------
    eigenvalues : array-like of float, shape (m,)
        Rates λ, unit 1/τ.
    energies : array-like of float, shape (m,)
        Energies w = ½g² at time 0.
    tau : float or array-like of float
        Elapsed effective training time.

    Returns
    -------
    float or ndarray of float64
        Of the shape of ``tau``.

    Raises
    ------
    ValueError
        If shapes disagree or a value is not finite.

    Examples
    --------
    >>> lazy_loss([0.0, 1.0], [0.25, 0.5], 0.0)
    0.75
    """
    rates, weights = _vector("eigenvalues", eigenvalues), _vector("energies", energies)
    if rates.shape != weights.shape:
        raise ValueError(
            f"energies must have the shape of eigenvalues, got {weights.shape} and {rates.shape}."
        )
    elapsed = check_finite("tau", tau)
    loss = np.exp(-2.0 * elapsed[..., None] * rates) @ weights
    return float(loss) if elapsed.ndim == 0 else loss


def lazy_density(lam: ArrayLike, tau: ArrayLike, amplitude: ArrayLike, s: ArrayLike) -> Any:
    """Return A λ^−s e^(−2λτ), the density that a power law has under a frozen kernel.

    Parameters
    ----------
    lam : array-like of float
        Positive rates.
    tau, amplitude, s : array-like of float
        Elapsed time ≥ 0, A ≥ 0 and initial slope; all broadcast.

    Returns
    -------
    float or ndarray of float64

    Examples
    --------
    >>> round(float(lazy_density(2.0, 0.0, 8.0, 3.0)), 12)
    1.0
    """
    rates, elapsed = check_finite("lam", lam), _non_negative("tau", tau)
    if (rates <= 0.0).any():
        raise ValueError(f"lam must be positive, got {lam!r}; drop the null space.")
    slope, size = check_finite("s", s), _non_negative("amplitude", amplitude)
    return (size * np.exp(-slope * np.log(rates) - 2.0 * rates * elapsed))[()]


def lazy_shell_energies(
    edges: ArrayLike, tau: ArrayLike, amplitude: ArrayLike, s: ArrayLike
) -> Floats:
    """Return the shell energies ∫ A λ^−s e^(−2λτ) dλ of a power law under a frozen kernel.

    Parameters
    ----------
    edges : array-like of float, shape (n_shells + 1,)
        Positive and increasing; two edges make a window.
    tau, amplitude, s : array-like of float
        Elapsed time ≥ 0, A ≥ 0 and initial slope; they broadcast to a shape S.

    Returns
    -------
    ndarray of float64, shape S + (n_shells,)

    Notes
    -----
    By `log_shell_average`, so uniform in s and τ.

    Examples
    --------
    >>> lazy_shell_energies([1.0, 2.0, 4.0], 0.0, 1.0, 2.0).round(12).tolist()
    [0.5, 0.25]
    """
    limits = check_edges(edges)
    size = _non_negative("amplitude", amplitude)
    averages = log_shell_average(limits, s, 2.0 * _non_negative("tau", tau), 1.0)
    return size[..., None] * np.exp(averages) * np.diff(limits)


def _vector(name: str, values: ArrayLike) -> Floats:
    array = check_finite(name, values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (m,), got {array.shape}.")
    return array


def _non_negative(name: str, values: ArrayLike) -> Floats:
    array = check_finite(name, values)
    if (array < 0.0).any():
        raise ValueError(f"{name} must be >= 0, got {values!r}.")
    return array
