"""A training run on disk, read as snapshots."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from spectralshell.models.state import unwrap
from spectralshell.runs.checkpoint_series.opening import no_failures, open_series
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
    def from_checkpoints(
        cls,
        checkpoints: Any,
        model: nn.Module,
        *,
        tau: Any = None,
        key: str | None = None,
        prefix: str | None = None,
        on_error: str = "raise",
        name: str | None = None,
        keep: int | None = None,
    ) -> TrainingRun:
        """Open checkpoints that someone else wrote as the states of a run.

        Parameters
        ----------
        checkpoints : str, path, list or mapping
            A pattern (``"out/checkpoint-*"``), the output folder of a Trainer, a list of what
            ``Snapshot(state=)`` takes, or a mapping of steps to such. Revisions of a hub model:
            ``"org/model@step*"``, or a list of ``"org/model@step1000"``.
        model : torch.nn.Module
            The network that the checkpoints are states of.
        tau : optional
            Effective times: a mapping of steps to them, a sequence in the order of the steps, a
            function of the step, or ``"steps"`` for τ = step. None reads the learning rates that a
            Trainer logged, which takes ``logging_steps=1``.
        key, prefix, keep : optional
            As for :class:`spectralshell.Checkpoint`, the same for all checkpoints.
        on_error : {"raise", "skip"}, default="raise"
            What to do about a checkpoint that cannot be read or does not fit: ``"skip"`` leaves it
            out, with a warning and a row in ``left_out``.
        name : str, optional
            A label for runs measured side by side.

        Returns
        -------
        TrainingRun
            Its states are sorted by step: the number that a Trainer or Lightning noted, else that
            in the name of the file or folder. Moments of a Trainer's optimiser are found beside
            the weights and read when they are needed.

        Raises
        ------
        TypeError, ValueError
            If a checkpoint is broken or does not fit the model, two are of one step, or the rates
            do not tell τ; the message says what is missing.
        FileNotFoundError
            If nothing fits the pattern.

        Warns
        -----
        RunWarning
            Of checkpoints that are skipped, and of moments that cannot be matched to the model.

        Notes
        -----
        Only headers are read: names, shapes and types. A revision of the hub that is not in the
        cache is asked for its commit, and fetched when it is measured.

        Examples
        --------
        >>> import os, tempfile, torch
        >>> folder, model = tempfile.mkdtemp(), torch.nn.Linear(3, 2)
        >>> for step in (100, 20):
        ...     torch.save(model.state_dict(), os.path.join(folder, f"step-{step}.pt"))
        >>> run = TrainingRun.from_checkpoints(folder + "/step-*.pt", model, tau="steps")
        >>> run.states["step"].tolist()
        [20, 100]
        """
        series = open_series(
            checkpoints,
            model,
            tau=tau,
            key=key,
            prefix=prefix,
            on_error=on_error,
            keep=keep,
        )
        run = cls._of_states(model, series.saved, series.history, name=name)
        run.left_out = series.left_out
        return run

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
        self.left_out = no_failures()
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
