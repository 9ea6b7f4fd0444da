"""Laws of the loss in time: exponents of the transport model, and the model v = c0 λ/t."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralshell.parameter_checks import check_real

Floats = NDArray[np.float64]


def loss_exponent(a: float, b: float, c: float) -> float:
    """Return p of L ∝ t^−p under the drift v = −c λ^b, from ε0 ∝ λ^(a−1) at λ → 0.

    Parameters
    ----------
    a : float
        Positive exponent of the initial cumulative energy, ∫_0^λ ε0 ∝ λ^a.
    b : float
        Exponent of the drift.
    c : float
        Its constant speed, ≥ 0; with c = 0 the kernel is frozen and the exponent is a.

    Returns
    -------
    float
        0 for b < 2: energy reaches low rates faster than it is dissipated, and L goes to a
        plateau. min(a, 2/c) at b = 2, with a factor ln t where they are equal. a for b > 2: the
        drift at low rates is too slow to matter.

    Raises
    ------
    ValueError
        If ``a`` is not positive or ``c`` negative.

    Notes
    -----
    Replaces eq. (22) of "Renormalizable spectral-shell dynamics", L ∝ τ^−(b−2)/(b−1), which does
    not follow from its own steps. From L = ∫ ε0(λ0) e^−Φ dλ0 along characteristics.

    Examples
    --------
    >>> loss_exponent(1.5, 1.6, 1.0), loss_exponent(1.5, 2.0, 2.0), loss_exponent(1.5, 3.0, 2.0)
    (0.0, 1.0, 1.5)
    """
    a = check_real("a", a, low=0.0, low_open=True)
    b = check_real("b", b)
    c = check_real("c", c, low=0.0)
    if c == 0.0 or b > 2.0:
        return a
    return 0.0 if b < 2.0 else min(a, 2.0 / c)


def log_drift_characteristic(lambda_0: ArrayLike, t: ArrayLike, *, c0: float, t0: float) -> Any:
    """Return where a rate drifts to under v = c0 λ/t: λ = λ0 (t/t0)^c0.

    Parameters
    ----------
    lambda_0 : array-like of float
        Positive rates at time ``t0``.
    t : array-like of float
        Positive times; broadcasts.
    c0 : float
        Speed of the drift in ln λ per ln t, above −1.
    t0 : float
        Positive time at which the rates were ``lambda_0``.

    Returns
    -------
    float or ndarray of float64

    Notes
    -----
    "When does learning renormalize?", Theorem 1 and Lemma 1: a model of its own with b = 1.

    Examples
    --------
    >>> round(float(log_drift_characteristic(1.0, 4.0, c0=0.5, t0=1.0)), 12)
    2.0
    """
    rates, time, c0, t0 = _check(lambda_0, t, c0, t0)
    return (rates * (time / t0) ** c0)[()]


def log_drift_density(
    lam: ArrayLike,
    t: ArrayLike,
    initial_density: Callable[[Floats], ArrayLike],
    *,
    c0: float,
    t0: float,
) -> Any:
    """Return ε(λ, t) under v = c0 λ/t and dissipation 2λ.

    Parameters
    ----------
    lam : array-like of float
        Positive rates at time t.
    t : array-like of float
        Times ≥ ``t0``; broadcasts.
    initial_density : callable
        ε at time ``t0``, applied to an array of positive rates.
    c0, t0 : float
        As in `log_drift_characteristic`.

    Returns
    -------
    float or ndarray of float64
        ε0(λ0) (λ0/λ) exp(−2 (λt − λ0 t0)/(1 + c0)) with λ0 = λ (t/t0)^−c0.

    Notes
    -----
    "When does learning renormalize?", the drift of Theorem 1 in the balance of the first paper.

    Examples
    --------
    >>> round(float(log_drift_density(0.5, 3.0, np.ones_like, c0=0.0, t0=1.0)), 12)  # e^−2, frozen
    0.135335283237
    """
    rates, time, c0, t0 = _check(lam, t, c0, t0)
    if (time < t0).any():
        raise ValueError(f"t must be >= t0={t0!r}, got {t!r}; the model runs forward from t0.")
    compression = (time / t0) ** -c0
    action = 2.0 * (rates * time - rates * compression * t0) / (1.0 + c0)
    initial = np.asarray(initial_density(rates * compression), dtype=np.float64)
    return (initial * compression * np.exp(-action))[()]


def log_drift_frontier(t: ArrayLike, *, c0: float) -> Any:
    """Return the frontier λ* = (1 + c0)/(2t) of the model v = c0 λ/t.

    Parameters
    ----------
    t : array-like of float
        Positive times, long after the start.
    c0 : float
        Above −1.

    Returns
    -------
    float or ndarray of float64
        The rate at which dissipation has reduced the density by 1/e.

    Examples
    --------
    >>> float(log_drift_frontier(5.0, c0=1.0))
    0.2
    """
    _, time, c0, _ = _check(1.0, t, c0, 1.0)
    return ((1.0 + c0) / (2.0 * time))[()]


def log_drift_loss_exponent(a: float, c0: float) -> float:
    """Return p of L ∝ t^−p under v = c0 λ/t, from ε0 ∝ λ^(a−1) at λ → 0: p = a (1 + c0).

    Parameters
    ----------
    a : float
        Positive exponent of the initial cumulative energy.
    c0 : float
        Above −1.

    Returns
    -------
    float

    Examples
    --------
    >>> log_drift_loss_exponent(1.5, 1.0)
    3.0
    """
    a = check_real("a", a, low=0.0, low_open=True)
    return a * (1.0 + check_real("c0", c0, low=-1.0, low_open=True))


def _check(
    lam: ArrayLike, t: ArrayLike, c0: float, t0: float
) -> tuple[Floats, Floats, float, float]:
    named = {"lam": lam, "t": t}
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in named.items()}
    for name, values in arrays.items():
        if not (np.isfinite(values).all() and (values > 0.0).all()):
            raise ValueError(f"{name} must be finite and positive, got {named[name]!r}.")
    c0 = check_real("c0", c0, low=-1.0, low_open=True)
    return arrays["lam"], arrays["t"], c0, check_real("t0", t0, low=0.0, low_open=True)
