"""The states of a training run, as they were saved: where each lies, and its times."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class SavedState:
    """One state of a run.

    ``state`` and ``moments`` are what ``Snapshot(state=, optimizer=)`` takes.
    """

    step: int
    tau: float
    state: Any
    moments: Any = None
    tau_weight_decay: float = 0.0


def states_frame(saved: Sequence[SavedState]) -> pd.DataFrame:
    """Return one row for each state: step, tau, tau_weight_decay, path, bytes, moments."""
    rows = [
        {
            "step": one.step,
            "tau": one.tau,
            "tau_weight_decay": one.tau_weight_decay,
            "path": _path_of(one.state),
            "bytes": _bytes_of(_path_of(one.state)) + _bytes_of(_path_of(one.moments)),
            "moments": _path_of(one.moments),
        }
        for one in saved
    ]
    columns = ["step", "tau", "tau_weight_decay", "path", "bytes", "moments"]
    return pd.DataFrame(rows, columns=columns)


def _path_of(value: Any) -> str | None:
    """Return the path of a state in a file, None of one in memory."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    path = getattr(value, "path", None)
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else None


def _bytes_of(path: str | None) -> int:
    if path is None or not os.path.exists(path):
        return 0
    if not os.path.isdir(path):
        return os.path.getsize(path)
    walked = os.walk(path)
    return sum(os.path.getsize(os.path.join(root, f)) for root, _, files in walked for f in files)
