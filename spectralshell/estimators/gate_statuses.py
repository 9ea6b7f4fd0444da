"""What a status says of gates that an exact derivative held, and the warning `fit` makes of it.

A warning raised while a snapshot is measured stays in the worker that measured it, and in a cache
there is none; a status reaches everybody.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from spectralshell.operators import Direction, KernelMotion
from spectralshell.operators.gate_checks import warn_of_gates
from spectralshell.warning_categories import GateWarning

_HELD = "gates held: "


@contextmanager
def unwarned_gates() -> Iterator[None]:
    """Keep quiet of gates, for the status says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateWarning)
        yield


def gate_status(motion: KernelMotion, direction: Direction, derivative: str) -> str:
    """Return ``"gates held: "`` and the functions with kinks, ``"ok"`` if their jumps are seen."""
    held = derivative == "exact" and direction.norm > 0.0 and motion.gates
    return _HELD + ", ".join(motion.gates) if held else "ok"


def warn_of_held_gates(statuses: Iterable[str], *, stacklevel: int) -> None:
    """Warn once if any of the statuses says that gates were held.

    Warns
    -----
    GateWarning
    """
    phrases = (phrase for status in statuses for phrase in status.split("; "))
    held = [phrase.removeprefix(_HELD) for phrase in phrases if phrase.startswith(_HELD)]
    names = dict.fromkeys(name for phrase in held for name in phrase.split(", "))
    warn_of_gates(list(names), option="derivative", stacklevel=stacklevel + 1)


__all__ = ["gate_status", "unwarned_gates", "warn_of_held_gates"]
