"""Steps that are not on disk yet: what they used, and what was logged with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from spectralshell.runs.effective_time import EffectiveTime, Settings, on_the_cpu
from spectralshell.runs.history import ROW, Rows

LOGGED = ("loss", "grad_norm", "tokens")


@dataclass
class _Step:
    """One step. ``counted``: its row as far as it is known, without what was logged."""

    settings: list[Settings]
    skipped: Any
    seconds: float
    logged: dict[str, Any] = field(default_factory=dict)
    counted: tuple[Any, ...] | None = None
    written: bool = False


class StepBuffer:
    """Steps in order. The last one stays open: its loss may be logged after the step."""

    def __init__(self, time: EffectiveTime) -> None:
        self.time = time
        self._steps: list[_Step] = []
        self._waiting: dict[str, Any] = {}
        self._log_comes_first: bool | None = None
        self._any_step = False

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def most_steps(self) -> int:
        """The number of the last step, if none of those that are not settled was skipped."""
        return self.time.n_steps + sum(step.counted is None for step in self._steps)

    def add(self, seconds: float) -> None:
        """Take down a step that the optimiser has just made; nothing is waited for."""
        # Scalers tell fused optimisers by this attribute to leave the parameters as they are.
        skipped = getattr(self.time.optimizer, "found_inf", None)
        self._steps.append(_Step(self.time.read(), skipped, seconds, self._waiting))
        self._waiting = {}
        self._any_step = True

    def log(self, values: Mapping[str, Any]) -> None:
        """Put values to the step they belong to: the next one where logging comes before it."""
        if self._log_comes_first is None:
            self._log_comes_first = not self._any_step
        if self._log_comes_first:
            self._waiting = dict(values)
        elif self._steps:
            # The first value counts: a later one is of a step that the scaler skipped.
            last = self._steps[-1]
            last.written = last.written and values.keys() <= last.logged.keys()
            last.logged = {**values, **last.logged}

    def settle(self) -> None:
        """Count all steps; each device is waited for once. Those that were skipped go."""
        open_steps = [step for step in self._steps if step.counted is None]
        if not open_steps:
            return
        slots = [(now, key) for step in open_steps for now in step.settings for key in now]
        numbers = on_the_cpu(
            [now[key] for now, key in slots]
            + [0.0 if step.skipped is None else step.skipped for step in open_steps]
        )
        for (now, key), number in zip(slots, numbers, strict=False):
            now[key] = number
        for step, skipped in zip(open_steps, numbers[len(slots) :], strict=True):
            if not skipped and self.time.advance(step.settings):
                step.counted = _row_of(self.time)
        self._steps = [step for step in self._steps if step.counted is not None]

    def take(self, *, last_too: bool) -> Rows:
        """Return the rows to be written; :meth:`written` takes them out."""
        self.settle()
        return self._rows_of(self._closed(last_too))

    def take_counted(self) -> Rows:
        """Count what can be, and return the rows before the first step that cannot."""
        with suppress(Exception):  # the caller tells of the failure that led here
            self.settle()
        steps = [step for step in self._steps if step.counted is not None and not step.written]
        return self._rows_of(steps)

    def _rows_of(self, steps: Sequence[_Step]) -> Rows:
        values = on_the_cpu([step.logged.get(key, np.nan) for step in steps for key in LOGGED])
        rows = np.zeros(len(steps), dtype=ROW)
        for position, step in enumerate(steps):
            number, tau, tau_weight_decay, lr, n_steps, share = step.counted  # type: ignore[misc]
            logged = values[position * len(LOGGED) : (position + 1) * len(LOGGED)]
            rows[position] = (
                number, tau, tau_weight_decay, lr, *logged, step.seconds, n_steps, share,
            )  # fmt: skip
        return rows

    def written(self, *, last_too: bool) -> None:
        """Forget what is on disk by now, but for the last step."""
        for step in self._closed(last_too):
            step.written = True
        self._steps = [*(s for s in self._steps[:-1] if not s.written), *self._steps[-1:]]

    def _closed(self, last_too: bool) -> list[_Step]:
        steps = self._steps if last_too else self._steps[:-1]
        return [step for step in steps if not step.written]


def _row_of(time: EffectiveTime) -> tuple[Any, ...]:
    own = time.groups[time.reference]
    return time.n_steps, time.tau, time.tau_weight_decay, time.lr, own.n_steps, own.share


def checked_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was logged, tensors detached and copied; TypeError for what is no number."""
    return {key: _kept(key, value) for key, value in values.items() if value is not None}


def _kept(key: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"{key} must be one number, got a tensor of {tuple(value.shape)}.")
        return value.detach().clone()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{key} must be a number, got {type(value).__name__}.") from None
