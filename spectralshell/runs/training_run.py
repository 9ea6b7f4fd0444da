"""A training run on disk, read as snapshots."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from spectralshell.models.state import unwrap
from spectralshell.runs.history import HISTORY, history_frame, read_rows
from spectralshell.runs.loop_measures import LoopMeasures
from spectralshell.runs.probe_batches import read_probe_batches
from spectralshell.runs.run_card import check_card
from spectralshell.runs.saved_states import SavedState, states_frame
from spectralshell.runs.state_files import StateFiles
from spectralshell.snapshots import Snapshot, make_snapshots


class TrainingRun:
    """A training run on disk, read as snapshots."""

    def __init__(
        self, directory: str | os.PathLike[str], model: nn.Module, *, name: str | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        place = Path(directory)
        card = check_card(place, unwrap(model))
        history = history_frame(read_rows(place / HISTORY))
        self._set(model, StateFiles(place).saved(), history, name or card.get("name"))
        self._directory: Path | None = place

    @classmethod
    def _of_states(
        cls,
        model: nn.Module,
        saved: Sequence[SavedState],
        history: pd.DataFrame,
        *,
        name: str | None = None,
    ) -> TrainingRun:
        """Build from states that were found elsewhere, in any order, and what history is known."""
        run = cls.__new__(cls)
        run._set(model, saved, history, name)
        return run

    def _set(
        self,
        model: nn.Module,
        saved: Sequence[SavedState],
        history: pd.DataFrame,
        name: str | None,
    ) -> None:
        self.model = unwrap(model)
        self.name = name
        self.history = history
        self._directory = None
        self._saved = sorted(saved, key=lambda one: one.step)

    @property
    def states(self) -> pd.DataFrame:
        """One row for each saved state: step, tau, tau_weight_decay, path, bytes, moments."""
        return states_frame(self._saved)

    @property
    def measures(self) -> pd.DataFrame:
        """What the recorder's estimator measured in the loop; empty where it had none."""
        return pd.DataFrame() if self._directory is None else LoopMeasures(self._directory).read()

    def snapshots(
        self,
        probe_batches: Any,
        *,
        name: str | None = None,
        steps: Iterable[int] | None = None,
        n_samples: int | None = None,
        class_axis: int | None = None,
    ) -> list[Snapshot]:
        """Return a snapshot of every state on every probe batch; states are read when measured."""
        batches = read_probe_batches(probe_batches)
        return [
            snapshot
            for one in self._chosen(steps)
            for snapshot in make_snapshots(
                self.model,
                batches,
                tau=one.tau,
                state=one.state,
                name=self.name if name is None else name,
                n_samples=n_samples,
                class_axis=class_axis,
                optimizer=one.moments,
            )
        ]

    def _chosen(self, steps: Iterable[int] | None) -> list[SavedState]:
        if steps is None:
            # Where τ stands still, as at a rate of 0, the state is that of before.
            return list({one.tau: one for one in reversed(self._saved)}.values())[::-1]
        known = {one.step: one for one in self._saved}
        wanted = [int(step) for step in steps]
        missing = [step for step in wanted if step not in known]
        if missing:
            raise ValueError(
                f"steps: no state was kept at {missing[:5]}; the run has {list(known)[:20]}."
            )
        return [known[step] for step in wanted]
