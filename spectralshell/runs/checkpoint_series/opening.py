"""The states of a run out of checkpoints: each looked at, with its step, time and moments."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
from torch import nn

from spectralshell.models.state import ModelState, unwrap
from spectralshell.models.trainer_optimizer import OPTIMIZER_FILE, TrainerOptimizer
from spectralshell.runs.checkpoint_series.places import Place, find_places, step_of
from spectralshell.runs.checkpoint_series.times import read_times
from spectralshell.runs.history import COLUMNS
from spectralshell.runs.saved_states import SavedState
from spectralshell.statuses import skipped
from spectralshell.warning_categories import RunWarning

ON_ERROR = ("raise", "skip")

_STACKLEVEL = 4
"""From a warning here to the line that opens the run."""


@dataclass(frozen=True)
class CheckpointSeries:
    """The states of a run, what is known of its history, and which checkpoints were left out."""

    saved: list[SavedState]
    history: pd.DataFrame
    left_out: pd.DataFrame


@dataclass(frozen=True)
class _Opened:
    place: Place
    step: int
    state: ModelState


def open_series(
    checkpoints: Any,
    model: nn.Module,
    *,
    tau: Any = None,
    key: str | None = None,
    prefix: str | None = None,
    on_error: str = "raise",
    keep: int | None = None,
) -> CheckpointSeries:
    """Look at the header of each checkpoint; the first bad one is raised, or all are left out."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {ON_ERROR}, got {on_error!r}.")
    bare = unwrap(model)
    places = find_places(checkpoints, key=key, prefix=prefix, keep=keep)
    opened: list[_Opened] = []
    failures: list[tuple[str, Exception]] = []
    for place in places:
        try:
            opened.append(
                _Opened(place, step_of(place), ModelState.from_argument(bare, place.checkpoint))
            )
        except (ValueError, OSError) as error:
            if on_error == "raise":
                raise
            failures.append((place.path, error))
    if not opened:
        raise failures[0][1]
    opened.sort(key=lambda one: one.step)
    _check_steps(opened)
    steps, found = [one.step for one in opened], [one.place for one in opened]
    times = read_times(tau, steps, found)
    if tau is None:
        _warn_of_unknown_optimizer(found)
    saved = [
        SavedState(one.step, time, one.state, moments)
        for one, time, moments in zip(opened, times, _moments(bare, found), strict=True)
    ]
    _warn_of_skipped(failures, len(places))
    return CheckpointSeries(saved, _history(saved, found[-1]), _left_out(failures))


def _check_steps(opened: list[_Opened]) -> None:
    for one, other in pairwise(opened):
        if one.step == other.step:
            raise ValueError(
                f"checkpoints: {one.place.path!r} and {other.place.path!r} are both of step "
                f"{one.step}; pass one of them, or a mapping of steps to paths."
            )


def _moments(model: nn.Module, places: list[Place]) -> list[TrainerOptimizer | None]:
    """Return the optimiser's state beside each checkpoint; warn once where it cannot be matched."""
    found: list[TrainerOptimizer | None] = []
    problems: list[str] = []
    for place in places:
        file = None if place.trainer is None else place.trainer.optimizer_file
        try:
            found.append(None if file is None else TrainerOptimizer.of(model, file))
        # Whatever a file of another tool raises: the weights can be measured without it.
        except (ValueError, OSError, KeyError, TypeError, IndexError, AttributeError) as error:
            found.append(None)
            problems.append(str(error))
    if problems:
        warnings.warn(
            f"{problems[0]} So the moments of {len(problems)} of {len(places)} checkpoints are "
            "left out.",
            RunWarning,
            stacklevel=_STACKLEVEL,
        )
    return found


def _warn_of_unknown_optimizer(places: list[Place]) -> None:
    trainers = [place.trainer for place in places if place.trainer is not None]
    without = [trainer.folder for trainer in trainers if trainer.optimizer_file is None]
    if without:
        warnings.warn(
            f"tau: {without[0]!r} has no {OPTIMIZER_FILE}, so τ is the sum of its learning rates, "
            "as of Adam, or of SGD without momentum, and without skipped steps. Pass tau= where it "
            "is not.",
            RunWarning,
            stacklevel=_STACKLEVEL,
        )


def _warn_of_skipped(failures: list[tuple[str, Exception]], n_checkpoints: int) -> None:
    if failures:
        warnings.warn(
            f"{len(failures)} of {n_checkpoints} checkpoints were skipped: "
            + "; ".join(f"{path!r}: {error}" for path, error in failures),
            RunWarning,
            stacklevel=_STACKLEVEL,
        )


def no_failures() -> pd.DataFrame:
    """Return the frame of a run of which nothing was left out."""
    return _left_out([])


def _left_out(failures: list[tuple[str, Exception]]) -> pd.DataFrame:
    rows = [(path, skipped(str(error).splitlines()[0])) for path, error in failures]
    return pd.DataFrame(rows, columns=["path", "status"])


def _history(saved: list[SavedState], last: Place) -> pd.DataFrame:
    """Return what a Trainer logged up to the last checkpoint; of others steps and times alone."""
    try:
        history = pd.DataFrame() if last.trainer is None else last.trainer.history
    except ValueError:  # notes that cannot be read; τ is given then
        history = pd.DataFrame()
    if not history.empty:
        return history.reindex(columns=list(COLUMNS))
    rows = [(one.step, one.tau) for one in saved]
    return pd.DataFrame(rows, columns=["step", "tau"]).reindex(columns=list(COLUMNS))
