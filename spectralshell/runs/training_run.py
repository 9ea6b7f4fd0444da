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
    """A training run on disk, read as snapshots.

    Parameters
    ----------
    directory : path
        Where a :class:`~spectralshell.runs.TrainingRecorder` wrote the run.
    model : torch.nn.Module
        The network that was trained, with any weights; it is never changed.
    name : str, optional
        A label for runs measured side by side. None takes that of the recorder.

    Attributes
    ----------
    history : DataFrame
        One row for each step: ``step``, ``tau`` and ``tau_weight_decay`` after it, ``lr`` that it
        used, what was logged (``loss``, ``grad_norm``, ``tokens``, else NaN), and ``seconds``
        since the run began.

    Raises
    ------
    TypeError
        If ``model`` is not a module.
    FileNotFoundError
        If the directory holds no run.
    ValueError
        If it is the run of another model, or its steps go back.

    Warns
    -----
    RunWarning
        If a state or the history is damaged; the rest is read.

    Notes
    -----
    Opening reads the history and headers of states: 10^6 steps take about a second.

    Examples
    --------
    >>> import tempfile, torch
    >>> from spectralshell.runs import TrainingRecorder, TrainingRun
    >>> model, directory = torch.nn.Linear(3, 1), tempfile.mkdtemp()
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    >>> with TrainingRecorder(model, optimizer, directory, states="every:2"):
    ...     for _ in range(4):
    ...         optimizer.zero_grad()
    ...         model(torch.ones(4, 3)).square().mean().backward()
    ...         optimizer.step()
    >>> run = TrainingRun(directory, model)
    >>> run.history["tau"].tolist()
    [0.5, 1.0, 1.5, 2.0]
    >>> [s.tau for s in run.snapshots([(torch.ones(4, 3), torch.zeros(4, 1))])]
    [0.0, 1.0, 2.0]
    """

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
        """The saved states.

        Returns
        -------
        DataFrame
            One row each: ``step``, ``tau``, ``tau_weight_decay``, ``path`` of the state,
            ``bytes`` on disk, and path of the ``moments``, None where there are none.
        """
        return states_frame(self._saved)

    @property
    def measures(self) -> pd.DataFrame:
        """What the recorder's estimator measured in the loop.

        Returns
        -------
        DataFrame
            The estimator's frames, one after the other, with a column or level ``step``; empty
            where nothing was measured.
        """
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
        """Return a snapshot of every state on every probe batch.

        Parameters
        ----------
        probe_batches : iterable of (inputs, targets)
            Read once; the position is the snapshot's ``batch``.
        name : str, optional
            A label; None takes that of the run.
        steps : iterable of int, optional
            The states that are wanted, in this order. None takes all, and of several with one τ,
            as where the rate is 0, the first.
        n_samples, class_axis : optional
            As for :class:`~spectralshell.Snapshot`.

        Returns
        -------
        list of Snapshot
            State by state; each carries its ``tau``, and the optimiser's moments where they were
            kept. States and moments are read when they are measured.

        Raises
        ------
        TypeError, ValueError
            If there is no batch, one has no labels, or no state was kept at a step.

        Warns
        -----
        RunWarning
            If the batches come from a loader that draws samples at random.
        """
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
