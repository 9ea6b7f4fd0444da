"""Checks of constructor and function parameters, with errors that name the remedy."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_array

# Draws of a null distribution: more would only take time, p-values are multiples of one over it.
MAX_DRAWS = 1_000_000


def check_real(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """Return ``value`` as a finite float inside a range, whose ends may be excluded.

    TypeError for what is no real number (booleans are none), ValueError outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r} of {_type_name(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    too_low = low is not None and (number <= low if low_open else number < low)
    too_high = high is not None and (number >= high if high_open else number > high)
    if not math.isfinite(number) or too_low or too_high:
        allowed = _describe_range(low, high, low_open, high_open)
        raise ValueError(
            f"{name} must be finite{allowed}, got {reprlib.repr(value)}; pass a value in range."
        )
    return number


def check_integer(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """Return ``value`` as an int inside the closed range; booleans and floats are a TypeError."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of {_type_name(value)}.")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        allowed = _describe_range(low, high, False, False)
        raise ValueError(f"{name} must be an integer{allowed}, got {reprlib.repr(value)}.")
    return number


def call_given(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call what was passed as the parameter ``name``; the ValueError of a failure names it."""
    try:
        return function(*arguments)
    except Exception as error:
        label = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"{name}: the callable {label!r} failed with {type(error).__name__}: {error}; call it "
            "on one case of your own to see why."
        ) from error


def check_option(name: str, value: Any, options: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``options``; the ValueError lists them."""
    if not isinstance(value, str) or value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}.")
    return value


def check_window(name: str, value: Any) -> tuple[float, float] | None:
    """Return a window ``(lambda_lo, lambda_hi)`` as floats, or None as it is.

    The ends are finite, positive and increasing, else ValueError; what is no pair is a TypeError.
    """
    if value is None:
        return None
    try:
        lo, hi = value
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be None or a pair (lambda_lo, lambda_hi), got {value!r}."
        ) from None
    lo = check_real(f"{name}[0]", lo, low=0.0, low_open=True)
    hi = check_real(f"{name}[1]", hi, low=0.0, low_open=True)
    if lo >= hi:
        raise ValueError(
            f"{name} must have lambda_lo < lambda_hi, got ({lo!r}, {hi!r}); swap the ends."
        )
    return lo, hi


def check_sample_weight(sample_weight: Any, n: int) -> np.ndarray:
    """Return ``n`` non-negative weights as floats, ones for None; else ValueError."""
    if sample_weight is None:
        return np.ones(n)
    weights = check_array(sample_weight, ensure_2d=False, dtype=float, input_name="sample_weight")
    if weights.shape != (n,) or (weights < 0).any():
        raise ValueError(
            f"sample_weight must hold {n} non-negative numbers, one per row of X, got shape "
            f"{weights.shape} with minimum {weights.min()}."
        )
    return np.asarray(weights)


def check_finite(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return values as a float64 array; raise unless all are finite."""
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {values!r}.")
    return array


def _describe_range(low: float | None, high: float | None, low_open: bool, high_open: bool) -> str:
    parts = []
    if low is not None:
        parts.append(f"{'>' if low_open else '>='} {low}")
    if high is not None:
        parts.append(f"{'<' if high_open else '<='} {high}")
    return " and " + " and ".join(parts) if parts else ""


def _type_name(value: Any) -> str:
    return f"type {type(value).__name__}"
