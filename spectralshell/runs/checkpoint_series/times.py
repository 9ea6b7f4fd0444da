"""Effective times of a series of checkpoints: what the user gives, or what a Trainer noted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spectralshell.parameter_checks import call_given, check_real
from spectralshell.runs.checkpoint_series.places import Place
from spectralshell.runs.checkpoint_series.trainer_folder import RatesUnknownError

STEPS = "steps"

_FORMS = (
    "a mapping of steps to effective times, a sequence in the order of the steps, a function of "
    'the step, or "steps" for τ = step'
)


def read_times(tau: Any, steps: Sequence[int], places: Sequence[Place]) -> list[float]:
    """Return τ of each checkpoint, in the order of their steps."""
    if tau is None:
        times = [_noted(step, place) for step, place in zip(steps, places, strict=True)]
        cause = "the checkpoints seem to be of more than one run; pass those of one, or tau="
    else:
        times = [check_real("tau", value) for value in _given(tau, steps)]
        cause = "pass effective times that grow with the steps"
    for place in range(1, len(times)):
        if times[place] < times[place - 1]:
            raise ValueError(
                f"tau goes back from {times[place - 1]:g} at step {steps[place - 1]} to "
                f"{times[place]:g} at step {steps[place]}; {cause}."
            )
    return times


def _given(tau: Any, steps: Sequence[int]) -> Iterable[Any]:
    if isinstance(tau, str):
        if tau != STEPS:
            raise ValueError(f"tau must be {_FORMS}, got {tau!r}.")
        return [float(step) for step in steps]
    if isinstance(tau, Mapping):
        missing = [step for step in steps if step not in tau]
        if missing:
            raise ValueError(
                f"tau has no effective time of step {missing[0]}; it has those of "
                f"{list(tau)[:5]}, and the checkpoints are at {list(steps)[:5]}."
            )
        return [tau[step] for step in steps]
    if callable(tau):
        return [call_given("tau", tau, step) for step in steps]
    if isinstance(tau, Iterable):
        values = list(tau)
        if len(values) != len(steps):
            raise ValueError(
                f"tau has {len(values)} effective times for {len(steps)} checkpoints; pass one for "
                "each."
            )
        return values
    raise TypeError(f"tau must be {_FORMS}, got {type(tau).__name__}.")


def _noted(step: int, found: Place) -> float:
    trainer, path = found.trainer, found.path
    remedy = f"pass tau=: {_FORMS}."
    if trainer is None:
        raise ValueError(f"tau: {path!r} does not tell its learning rates; {remedy}")
    if trainer.step != step:
        raise ValueError(
            f"tau: {path!r} notes step {trainer.step}, and {step} was given for it; {remedy}"
        )
    try:
        rates = trainer.rates()
        if len(rates) and min(rates) < 0.0:
            raise RatesUnknownError("a logged learning rate is negative")
        return math.fsum(rates)
    except RatesUnknownError as error:
        raise ValueError(f"tau: {path!r}: {error}; {remedy}") from error
