"""Checks of what a spectral measure is made of."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def finite_vector(name: str, values: Any, *, length: int | None = None) -> Floats:
    """Return a float64 copy; raise unless it is a finite vector of that length."""
    vector = np.array(values, dtype=np.float64)
    if vector.ndim != 1 or (length is not None and vector.size != length):
        expected = "(m,)" if length is None else f"({length},) like nodes"
        raise ValueError(f"{name} must have shape {expected}, got {vector.shape}.")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} holds NaN or infinity, expected finite values; check the solve.")
    return vector


def read_only(vector: Floats) -> Floats:
    """Return the vector, which can no longer be written to."""
    vector.flags.writeable = False
    return vector


def check_name(name: Any) -> str:
    """Return the name; raise unless it is a string."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string or None, got {name!r}.")
    return name


def check_label(name: str, value: Any) -> int | str:
    """Return a label as int or str; raise on anything else."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{name} must be an integer or a string, got {value!r}; relabel the batch.")


def check_edges(edges: ArrayLike, *, at_least: int = 1) -> Floats:
    """Return edges as a vector; raise unless positive, finite and non-decreasing."""
    vector = np.asarray(edges, dtype=np.float64)
    if vector.ndim != 1 or vector.size < at_least:
        raise ValueError(
            f"edges must be one-dimensional with at least {at_least} entries, got {vector.shape}."
        )
    if not (vector[0] > 0.0 and np.isfinite(vector).all() and (np.diff(vector) >= 0.0).all()):
        raise ValueError(
            f"edges must be finite, positive and increasing, got {vector!r}; sort them, or take "
            "ShellPartition.edges."
        )
    return vector
