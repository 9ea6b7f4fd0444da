"""The constructor parameter ``direction``: what it may be, and what a callable may answer."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from spectralshell.operators import Direction
from spectralshell.operators.directions import AS_GIVEN, NAMED_DIRECTIONS, PER_TAU
from spectralshell.parameter_checks import check_option
from spectralshell.snapshots import Snapshot


def check_direction(direction: Any) -> None:
    """Check a direction, or a callable that gives one for a snapshot.

    Raises
    ------
    ValueError, TypeError
        If it is none of those allowed; the message lists them.
    """
    if isinstance(direction, str):
        check_option("direction", direction, NAMED_DIRECTIONS)
    elif not (callable(direction) or isinstance(direction, Snapshot) or _is_mapping(direction)):
        raise TypeError(
            f"direction must be one of {', '.join(map(repr, NAMED_DIRECTIONS))}, a Snapshot to "
            "move to, a mapping of parameter names to tensors or arrays, or a callable that gives "
            f"one of these for a snapshot, got {direction!r}."
        )


def settle_direction(direction: Any, snapshot: Snapshot) -> Any:
    """Return what a callable direction answers for a snapshot, checked.

    Raises
    ------
    ValueError, TypeError
        If the answer is no direction, or a callable again.
    """
    answer = direction(snapshot)
    if callable(answer):
        raise TypeError(
            "direction: the callable must answer with a name, a Snapshot or a mapping, got the "
            f"callable {answer!r}; call it inside."
        )
    check_direction(answer)
    return answer


def may_be_random(direction: Any) -> bool:
    """Tell whether a direction is drawn, or a callable might say so."""
    return callable(direction) or (isinstance(direction, str) and direction == "random")


def unit_of(direction: Direction) -> str:
    """Return what the rates along a direction are per, such as ``"per tau"`` or ``"as given"``.

    A random direction is as long as gradient flow, and so per τ as well.
    """
    return PER_TAU if direction.name == "random" else direction.unit


def unit_status(unit: str) -> str:
    """Return what a status says of rates in a unit, ``"ok"`` if they are simply per τ."""
    if unit == PER_TAU:
        return "ok"
    return f"rates per unit of the direction {unit}" if unit == AS_GIVEN else f"rates {unit}"


def _is_mapping(direction: Any) -> bool:
    return hasattr(direction, "items") and all(
        isinstance(name, str) and isinstance(value, (Tensor, np.ndarray))
        for name, value in direction.items()
    )


__all__ = [
    "check_direction",
    "may_be_random",
    "settle_direction",
    "unit_of",
    "unit_status",
]
