"""The steps whose states are kept."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

from spectralshell.parameter_checks import call_given, check_integer

_REMEDY = (
    'states must be "log:8" (8 states per decade of steps), "every:100", a list of steps, or a '
    "function of the step"
)


class Schedule:
    """Which steps are due. ``open_ended``: the last step of a run is due as well."""

    def __init__(self, states: Any) -> None:
        self.open_ended = isinstance(states, str)
        self._function: Callable[[int], Any] | None = None
        self._steps: list[int] = []
        self._every = self._per_decade = 0
        if isinstance(states, str):
            kind, number = _parsed(states)
            self._every, self._per_decade = (number, 0) if kind == "every" else (0, number)
        elif callable(states):
            self._function = states
        elif isinstance(states, Iterable):
            self._steps = sorted({check_integer("states[...]", step, low=0) for step in states})
        else:
            raise TypeError(f"{_REMEDY}, got {type(states).__name__}.")

    def next_after(self, step: int) -> int | None:
        """Return the first later step that may be due; None where there is none."""
        if self._function is not None:
            return step + 1
        if self._every:
            return (step // self._every + 1) * self._every
        if self._per_decade:
            return self._next_of_decade(step)
        later = self._steps[bisect_right(self._steps, step) :]
        return later[0] if later else None

    def is_due(self, step: int) -> bool:
        """Tell whether a step is due; the first state of a run always is."""
        if step == 0:
            return True
        if self._function is not None:
            return bool(call_given("states", self._function, step))
        return self.next_after(step - 1) == step

    def _next_of_decade(self, step: int) -> int:
        # The grid is 10^(k/n), rounded; a few lines of it lie on one step at the beginning.
        k = 0 if step < 1 else len(str(step)) * self._per_decade - self._per_decade
        while round(10 ** (k / self._per_decade)) <= step:
            k += 1
        return round(10 ** (k / self._per_decade))


def _parsed(states: str) -> tuple[str, int]:
    found = re.fullmatch(r"(log|every):(\d+)", states.strip())
    if found is None or int(found[2]) == 0:
        raise ValueError(f"{_REMEDY}, got {states!r}.")
    return found[1], int(found[2])
