"""Measures taken inside the training loop, where states cannot be kept: one frame each on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.base import clone
from torch import nn

from spectralshell.models.guard import random_states
from spectralshell.runs.atomic_files import remove_unfinished, replace_file
from spectralshell.snapshots import make_snapshots

_SUFFIX = ".parquet"


class LoopMeasures:
    """The folder ``measures`` of a run, and the estimator that fills it."""

    def __init__(self, directory: Path, estimator: Any = None, batches: Any = None) -> None:
        self._folder = directory / "measures"
        self._estimator = estimator
        self._batches = batches

    def create(self) -> None:
        """Make the folder, where there is something to measure."""
        if self._estimator is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self._folder)

    def take(self, model: nn.Module, step: int, tau: float, name: str | None) -> None:
        """Measure the model as it is now, and write the frame; random states stay as they are."""
        with random_states(next(model.parameters()).device):
            snapshots = make_snapshots(model, self._batches, tau=tau, name=name)
            frame = _frame_of(self._estimator, snapshots)
        frame = frame.assign(step=step) if "tau" in frame.columns else _with_step(frame, step)
        replace_file(self._folder / f"step-{step:010d}{_SUFFIX}", frame.to_parquet)

    def drop_after(self, step: int) -> None:
        """Remove the frames of later steps."""
        for path in self._paths():
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink(missing_ok=True)

    def read(self) -> pd.DataFrame:
        """Return all frames in the order of their steps, an empty one where there are none."""
        frames = [pd.read_parquet(path) for path in self._paths()]
        if not frames:
            return pd.DataFrame()
        together = pd.concat(frames, ignore_index="tau" in frames[0].columns)
        # Of the same run: what the frames say of themselves is said by their rows.
        together.attrs = frames[-1].attrs
        return together

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f"step-*{_SUFFIX}")) if self._folder.is_dir() else []


def _frame_of(estimator: Any, snapshots: list[Any]) -> pd.DataFrame:
    """Return the tidy frame of an estimator, by its own edges where it was fitted before."""
    fitted = any(name.endswith("_") and not name.startswith("_") for name in vars(estimator))
    if fitted:
        tidy = getattr(estimator, "shell_frame", None)
        return tidy(snapshots) if tidy is not None else estimator.transform(snapshots)
    # Edges lie on one grid for all: each state is fitted for itself, also after a resume.
    fresh = clone(estimator).fit(snapshots)
    shells = getattr(fresh, "shells_", None)
    return shells if isinstance(shells, pd.DataFrame) else fresh.transform(snapshots)


def _with_step(frame: pd.DataFrame, step: int) -> pd.DataFrame:
    return pd.concat({step: frame}, names=["step"])
