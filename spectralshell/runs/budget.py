"""The budget of a recorder: bytes on disk, and its share of the loop's time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_FIRST_GUESS = 0.01
"""Seconds that a state is taken to cost before one was kept in the loop."""


class TimeShare:
    """The time that the recorder spends, beside all time since the loop began."""

    def __init__(self, most: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._most = most
        self._clock = clock
        self._began = clock()
        self._running = False
        self._last_state = _FIRST_GUESS
        self.spent = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the time of the block once, however deep these are nested."""
        if self._running:
            yield
            return
        self._running = True
        began = self._clock()
        try:
            yield
        finally:
            self.spent += self._clock() - began
            self._running = False

    @contextmanager
    def of_a_state(self) -> Iterator[None]:
        """Remember what it takes to keep a state."""
        began = self._clock()
        yield
        self._last_state = self._clock() - began

    @property
    def seconds(self) -> float:
        """Time since the loop began."""
        return self._clock() - self._began

    def allows_a_state(self) -> bool:
        """Tell whether another state would leave the share below its limit."""
        if self._most is None:
            return True
        foreseen = self._last_state
        return self.spent + foreseen <= self._most * (self.seconds + foreseen)


def densest(steps: Sequence[int], *, logarithmic: bool) -> int | None:
    """Return the state whose loss leaves the smallest gap; the first and the last are not lost."""
    place = [math.log1p(step) if logarithmic else float(step) for step in steps]
    gaps = {steps[i]: place[i + 1] - place[i - 1] for i in range(1, len(steps) - 1)}
    return min(gaps, key=lambda step: (gaps[step], step), default=None)
