"""The tail template ε = A λ^−b exp(−κ λ^(b−1)): density, frontier, shell averages, loss.

A phenomenological form: "Renormalizable spectral-shell dynamics", eqs. (18) and (19), with κ = K τ
if the theory holds. It agrees with the exact density only to leading order, at b = 2 and K = 2/c
(see `exact_density`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expn

from spectralshell.dynamics.shell_integrals import (
    Floats,
    log_shell_average,
    log_shell_average_gradient,
)
from spectralshell.parameter_checks import check_finite, check_real, check_window

# Closer to b = 1 the closed form of the loss divides two vanishing numbers.
_CLOSED_FORM_FROM = 1e-4
# The closed form subtracts G at both ends; it is used where that costs at most two digits.
_LARGEST_RATIO = 0.99


def template_density(lam: ArrayLike, amplitude: ArrayLike, b: ArrayLike, kappa: ArrayLike) -> Any:
    """Return ε = A λ^−b exp(−κ λ^(b−1)), energy per unit λ.

    Parameters
    ----------
    lam : array-like of float
        Positive rates, unit 1/τ.
    amplitude, b, kappa : array-like of float
        A ≥ 0, tail slope, cutoff κ ≥ 0; all broadcast.

    Returns
    -------
    float or ndarray of float64

    Raises
    ------
    ValueError
        If a rate is not positive, A or κ negative, or anything is NaN.

    Notes
    -----
    "Renormalizable spectral-shell dynamics", eq. (19).

    Examples
    --------
    >>> round(float(template_density(2.0, 4.0, 2.0, 0.0)), 12)
    1.0
    """
    lam_, amplitude_, b_, kappa_ = _arrays(lam=lam, amplitude=amplitude, b=b, kappa=kappa)
    if (lam_ <= 0.0).any():
        raise ValueError(f"lam must be positive, got {lam!r}; drop the null space.")
    log_lam = np.log(lam_)
    with np.errstate(over="ignore"):
        exponent = -b_ * log_lam - kappa_ * np.exp((b_ - 1.0) * log_lam)
        density = amplitude_ * np.exp(exponent)
    return density[()]


def frontier(kappa: ArrayLike, b: ArrayLike) -> Any:
    """Return the resolution frontier λ* = κ^(−1/(b−1)), where the cutoff factor is 1/e.

    Parameters
    ----------
    kappa, b : array-like of float
        Cutoff κ ≥ 0 and tail slope; they broadcast.

    Returns
    -------
    float or ndarray of float64
        Unit 1/τ. Without a cutoff (κ = 0) inf for b > 1, and 0 for b < 1, where the cutoff
        suppresses low rates. NaN at b = 1: the cutoff is a constant factor there.

    Notes
    -----
    "Renormalizable spectral-shell dynamics", eq. (18).

    Examples
    --------
    >>> frontier([0.25, 0.0], 2.0).round(12).tolist()
    [4.0, inf]
    """
    kappa_, b_ = np.broadcast_arrays(*_arrays(kappa=kappa, b=b))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        position = np.exp(-np.log(kappa_) / (b_ - 1.0))
    return np.where(b_ == 1.0, np.nan, position)[()]


def template_shell_average(edges: ArrayLike, b: ArrayLike, kappa: ArrayLike) -> Floats:
    """Return the average of λ^−b exp(−κ λ^(b−1)) over each shell.

    Parameters
    ----------
    edges : array-like of float, shape (n_shells + 1,)
        Positive and increasing.
    b, kappa : array-like of float
        Tail slope and cutoff κ ≥ 0; they broadcast to a shape S.

    Returns
    -------
    ndarray of float64, shape S + (n_shells,)
        It underflows to 0 for large κ; `log_template_shell_average` does not.

    Examples
    --------
    >>> template_shell_average([1.0, 2.0, 4.0], 2.0, 0.0).round(12).tolist()
    [0.5, 0.125]
    """
    with np.errstate(over="ignore"):
        return np.exp(log_template_shell_average(edges, b, kappa))


def log_template_shell_average(edges: ArrayLike, b: ArrayLike, kappa: ArrayLike) -> Floats:
    """Return ln of `template_shell_average`, finite also where the average underflows.

    Parameters
    ----------
    edges, b, kappa
        As in `template_shell_average`.

    Returns
    -------
    ndarray of float64, shape S + (n_shells,)

    Notes
    -----
    Uniform in b, through b = 1, where the cutoff is the constant factor e^−κ. Accuracy and cost
    are those of `log_shell_average`.

    Examples
    --------
    >>> round(float(log_template_shell_average([1.0, 2.0], 1.0, 1e4)[0]), 6)
    -10000.366513
    """
    return log_shell_average(edges, b, kappa, np.asarray(b, dtype=np.float64) - 1.0)


def log_template_shell_average_slopes(
    edges: ArrayLike, b: ArrayLike, kappa: ArrayLike
) -> tuple[Floats, Floats, Floats]:
    """Return ln of the shell average and its derivatives by b and by κ.

    Parameters
    ----------
    edges, b, kappa
        As in `template_shell_average`.

    Returns
    -------
    value, d_b, d_kappa : ndarray of float64, shape S + (n_shells,)
        d_kappa is −⟨λ^(b−1)⟩ under the template; d_b counts b in the cutoff too.

    Examples
    --------
    >>> value, d_b, d_kappa = log_template_shell_average_slopes([1.0, 3.0], 1.0, 0.5)
    >>> round(float(d_kappa[0]), 12)
    -1.0
    """
    power = np.asarray(b, dtype=np.float64) - 1.0
    gradient = log_shell_average_gradient(edges, b, kappa, power)
    return gradient.value, gradient.d_b + gradient.d_power, gradient.d_kappa


def template_loss(
    window: tuple[float, float], amplitude: ArrayLike, b: float, kappa: ArrayLike
) -> Any:
    """Return the energy that the template has in a window, its loss.

    Parameters
    ----------
    window : (float, float)
        0 < λ_lo < λ_hi. The loss over all λ does not exist for b ≥ 1: it diverges at 0.
    amplitude, kappa : array-like of float
        A ≥ 0 and κ ≥ 0; they broadcast.
    b : float
        Tail slope.

    Returns
    -------
    float or ndarray of float64
        A/(b−1)·[G(X_lo) − G(X_hi)] with G(X) = e^(−κX)/X − κ E1(κX) = E2(κX)/X, X = λ^(b−1).

    Notes
    -----
    It replaces eqs. (21) and (22) of "Renormalizable spectral-shell dynamics", whose algebra does
    not stand. Where |b − 1| < 1e-4, or G differs so little between the ends that the difference
    would lose digits, the integral is done by quadrature.

    Examples
    --------
    >>> round(float(template_loss((1.0, 2.0), 1.0, 2.0, 0.0)), 12)
    0.5
    """
    limits = check_window("window", window)
    if limits is None:
        raise TypeError("window must be a pair (lambda_lo, lambda_hi), got None.")
    slope = check_real("b", b)
    amplitude_, kappa_ = np.broadcast_arrays(*_arrays(amplitude=amplitude, kappa=kappa))
    with np.errstate(over="ignore", under="ignore"):
        ends = np.exp((slope - 1.0) * np.log(limits))
    if abs(slope - 1.0) < _CLOSED_FORM_FROM or not (np.isfinite(ends).all() and ends.min() > 0.0):
        return (amplitude_ * _loss_by_quadrature(limits, slope, kappa_))[()]
    at_lo, at_hi = (expn(2, kappa_ * end) / end for end in ends)
    small, large = np.minimum(at_lo, at_hi), np.maximum(at_lo, at_hi)
    closed = (at_lo - at_hi) / (slope - 1.0)
    cancels = small > _LARGEST_RATIO * large
    if cancels.any():
        closed = np.where(cancels, _loss_by_quadrature(limits, slope, kappa_), closed)
    return (amplitude_ * closed)[()]


def _loss_by_quadrature(limits: tuple[float, float], b: float, kappa: Floats) -> Floats:
    average = template_shell_average(limits, b, kappa)[..., 0]
    return average * (limits[1] - limits[0])


def _arrays(**named: ArrayLike) -> list[Floats]:
    arrays = []
    for name, value in named.items():
        values = check_finite(name, value)
        if name in ("amplitude", "kappa") and (values < 0.0).any():
            raise ValueError(f"{name} must be >= 0, got {value!r}.")
        arrays.append(values)
    return arrays
