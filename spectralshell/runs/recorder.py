"""A recorder of training runs: effective time of every step, and states of some, on disk."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spectralshell.models.optimizer_state import OptimizerState, parameter_names
from spectralshell.models.state import unwrap
from spectralshell.parameter_checks import check_integer, check_real
from spectralshell.runs.budget import TimeShare, densest
from spectralshell.runs.directory_lock import DirectoryLock
from spectralshell.runs.effective_time import EffectiveTime, unwrap_optimizer
from spectralshell.runs.history import HISTORY, HistoryFile
from spectralshell.runs.loop_measures import LoopMeasures
from spectralshell.runs.probe_batches import read_probe_batches
from spectralshell.runs.resume import RunToResume, steps_of
from spectralshell.runs.run_card import CARD, write_card
from spectralshell.runs.schedule import Schedule
from spectralshell.runs.state_files import StateFiles
from spectralshell.runs.step_buffer import StepBuffer, checked_values
from spectralshell.warning_categories import RunWarning

_MOST_ROWS = 256
"""Steps in memory before they are written; a kill loses at most these."""

_MOST_SECONDS = 10.0
"""Time before they are written, so that slow steps are not lost in hundreds."""

_WRAPPER = "wrapper"
"""What torch calls the function that it puts around a step."""

_OPEN: weakref.WeakValueDictionary[str, TrainingRecorder] = weakref.WeakValueDictionary()


class TrainingRecorder:
    """Record a training run: effective time of every step, and states of some of them.

    Parameters
    ----------
    model : torch.nn.Module
        The network that is trained; wrappers for data parallelism and compilation are taken off.
    optimizer : torch.optim.Optimizer
        The optimiser that trains it. The effective time of SGD, Adam, AdamW, Adamax, RMSprop and
        Adagrad is known, and of subclasses that keep their step.
    directory : path
        Where the run is written: ``run.json``, ``history.bin`` and the folders ``states``,
        ``moments`` and ``measures``. Made where it is missing.
    states : str, iterable of int, or callable, default="log:8"
        Which states are kept: ``"log:8"``, 8 for each decade of steps; ``"every:100"``; a list of
        steps; or a function of the step that tells whether it is kept. State 0, before the first
        step, is always kept; with the first two forms the last state of the run is too.
    tau : None, float or callable, default=None
        What a step adds to τ, for optimisers that are not known: a number, or a function of the
        optimiser that is called after every step.
    moments : bool, default=True
        Whether what the optimiser keeps for each parameter is written beside each state, which
        ``metric="optimizer"`` and :meth:`restore` need. Adam's take twice the room of the state.
    max_bytes : int, optional
        Room on disk for states and history. Where it is used up, the state whose loss leaves the
        smallest gap is removed, never the first one; where nothing can be removed no more states
        are kept. 0 keeps none.
    max_overhead : float, optional
        Largest share of the loop's time that the recorder may take, such as 0.02. A state that
        would exceed it is not kept.
    estimator : estimator over snapshots, optional
        Measures the probe batches at every step whose state is due, inside the loop, for models
        whose states are too large to be kept (``max_bytes=0``). An estimator that is not fitted
        is fitted to each state for itself. What it gives is ``TrainingRun.measures``.
    probe_batches : iterable of (inputs, targets), optional
        What ``estimator`` measures; read once.
    name : str, optional
        A label of the run, which its snapshots carry.
    resume : bool, default=False
        Go on with the run in the directory where there is one, and begin one where there is
        none. Rows, states and measures after the step that was restored are dropped.
    step : int, optional
        With ``resume``: the step whose state was loaded into model and optimiser. None finds it:
        the saved state that the model equals, or else the step that the optimiser counts.
    overwrite : bool, default=False
        Remove the run that is in the directory.

    Raises
    ------
    TypeError, ValueError
        At construction: if a parameter is wrong, the optimiser holds no parameter of the model, or
        its effective time is not known. On entering: if the directory holds a run and neither
        ``resume`` nor ``overwrite`` is given, the run of another model, or one that another
        recorder is writing to; or if it is not known from where to go on. Nothing is written then.

    Warns
    -----
    RunWarning
        If something could not be written or measured. Training goes on.

    Notes
    -----
    A hook behind the optimiser's step does the accounting, so that what counts is the rate that
    the step used. A step that a gradient scaler skips does not count, and micro-batches whose
    gradients are accumulated are one step. Random states, gradients and the model stay as they
    are. Nothing waits for a GPU but where a state is kept or the buffer is written, every 256
    steps or 10 s; a kill loses at most these rows. Under ``torch.distributed`` rank 0 writes, and
    on the others the recorder does nothing. Parameters that are sharded are refused.

    A state is that right after the step of this optimiser. Where several train one model, pass the
    one that steps last; what is done to the weights after a step, such as clamping, comes later.

    Cost: about 50 µs a step, and for each state that is kept its copy to disk.

    Examples
    --------
    >>> import tempfile, torch
    >>> from spectralshell.runs import TrainingRecorder, TrainingRun
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> directory = tempfile.mkdtemp()
    >>> with TrainingRecorder(model, optimizer, directory) as recorder:
    ...     for _ in range(10):
    ...         loss = model(torch.ones(4, 3)).square().mean()
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    ...         recorder.log(loss=loss)
    >>> run = TrainingRun(directory, model)
    >>> round(float(run.history["tau"].iloc[-1]), 9)
    1.0
    >>> run.states["step"].tolist()
    [0, 1, 2, 3, 4, 6, 7, 10]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        directory: str | os.PathLike[str],
        *,
        states: Any = "log:8",
        tau: Any = None,
        moments: bool = True,
        max_bytes: int | None = None,
        max_overhead: float | None = None,
        estimator: Any = None,
        probe_batches: Any = None,
        name: str | None = None,
        resume: bool = False,
        step: int | None = None,
        overwrite: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self.model = unwrap(model)
        self.optimizer = unwrap_optimizer(optimizer)
        _check_they_belong_together(self.model, self.optimizer)
        self.directory = Path(directory)
        self._schedule = Schedule(states)
        self._logarithmic = isinstance(states, str) and states.startswith("log")
        self._given_tau = tau
        # Raises for an optimiser that is not known; counts nothing until the recorder is opened.
        self._buffer = StepBuffer(EffectiveTime(self.optimizer, tau))
        self._with_moments = bool(moments)
        self._max_bytes = (
            None if max_bytes is None else check_integer("max_bytes", max_bytes, low=0)
        )
        self._max_overhead = (
            None
            if max_overhead is None
            else check_real("max_overhead", max_overhead, low=0.0, high=1.0)
        )
        self.name = _check_name(name)
        if resume and overwrite:
            raise ValueError("resume and overwrite are both set; a run goes on or is removed.")
        if step is not None and not resume:
            raise ValueError("step is where a run goes on: it needs resume=True.")
        self._resume, self._overwrite = bool(resume), bool(overwrite)
        self._step = None if step is None else check_integer("step", step, low=0)
        if (estimator is None) != (probe_batches is None):
            raise ValueError("estimator and probe_batches belong together; pass both or neither.")
        batches = None if probe_batches is None else read_probe_batches(probe_batches)
        self._files = StateFiles(self.directory)
        self._history = HistoryFile(self.directory / HISTORY)
        self._measures = LoopMeasures(self.directory, estimator, batches)
        self._measuring = estimator is not None
        self._hook: RemovableHandle | None = None
        self._lock: DirectoryLock | None = None
        self._share = TimeShare(self._max_overhead)
        self._told: set[str] = set()

    # Life

    def open(self, *, fallback_step: int | None = None) -> Self:
        """Begin or continue the run, as entering the context does.

        Parameters
        ----------
        fallback_step : int, optional
            Where a run goes on if neither the model nor the optimiser tells.

        Returns
        -------
        TrainingRecorder

        Raises
        ------
        ValueError
            If the directory does not fit; nothing is written then.
        """
        if self._hook is not None:
            raise RuntimeError("the recorder is open already; close() it first.")
        if not _writes_here():
            return self
        _check_not_sharded(self.model)
        self._close_the_one_left_open()
        exists = (self.directory / CARD).exists()
        if exists and not (self._resume or self._overwrite):
            raise ValueError(
                f"directory: {str(self.directory)!r} holds a run already. Pass resume=True to go "
                "on with it, overwrite=True to remove it, or another directory."
            )
        if not exists and not self._overwrite:
            self._check_nothing_is_lost()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = DirectoryLock(self.directory)
        try:
            self._begin(exists and self._resume, fallback_step)
        except BaseException:
            self._release()
            raise
        self._step = None  # it was where this opening went on; the next one finds its own
        _OPEN[str(self.directory.resolve())] = self
        self._hook = self.optimizer.register_step_post_hook(self._after_step)
        return self

    def close(self) -> None:
        """End the recording: write what is in memory, and the last state where it is due."""
        self._end(completed=True)

    def abandon(self) -> int:
        """End the recording after a failure: write what is in memory, and no last state.

        Returns
        -------
        int
            Steps that were counted.
        """
        self._end(completed=False)
        return self.step

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(completed=kind is None)

    def restore(self) -> int:
        """Load the last state of the run in the directory into model and optimiser.

        To be called before the recorder is opened; it then goes on from there. Schedulers, random
        states and the place in the data are the caller's to restore.

        Returns
        -------
        int
            The step of that state; 0 where there is no run yet, and nothing is loaded.

        Raises
        ------
        ValueError
            If the recorder is open or does not resume, the run is another model's, or no state can
            be loaded with the moments that the optimiser needs. Model and optimiser are then as
            before.
        """
        if self._hook is not None:
            raise ValueError("restore() comes before the recorder is opened; call it earlier.")
        if not self._resume:
            raise ValueError("restore() needs resume=True, or the run would not go on.")
        if not (self.directory / CARD).exists():
            self._check_nothing_is_lost()
            return 0
        self._step = self._to_resume().restore_last(self.model, self.optimizer)
        return self._step

    # What users read and say

    @property
    def step(self) -> int:
        """Steps that were counted."""
        self._buffer.settle()
        return self._buffer.time.n_steps

    @property
    def tau(self) -> float:
        """Effective time by now."""
        self._buffer.settle()
        return self._buffer.time.tau

    @property
    def overhead(self) -> float:
        """Share of the time since the recorder was opened that it took itself."""
        return self._share.spent / self._share.seconds if self._share.seconds > 0 else 0.0

    def log(self, *, loss: Any = None, grad_norm: Any = None, tokens: Any = None) -> None:
        """Take down values of one step, once a step, right after it or right before it.

        Parameters
        ----------
        loss, grad_norm, tokens : float or Tensor of one element, optional
            Tensors are detached and copied on their device, and read when the buffer is written.

        Raises
        ------
        TypeError
            If a value is no number.
        """
        if self._hook is None:
            return
        with self._share.counted():
            values = checked_values({"loss": loss, "grad_norm": grad_norm, "tokens": tokens})
            self._buffer.log(values)

    def keep_last(self) -> None:
        """Keep the present state as the last one, where ``states`` is open-ended.

        Closing the recorder does it; to be called before that only if the model is given other
        weights after its last step, such as the best ones or an average.
        """
        if self._hook is None or not self._schedule.open_ended:
            return
        if self.step not in self._files.steps() and self._share.allows_a_state():
            self._keep()

    def flush(self) -> None:
        """Write all steps to disk now: to be called where you save a checkpoint of your own."""
        if self._hook is None:
            return
        with self._share.counted(), self._tolerant("write the history"):
            self._write_rows(last_too=True, durable=True)

    # The steps

    def _begin(self, continues: bool, fallback_step: int | None) -> None:
        time = EffectiveTime(self.optimizer, self._given_tau)
        seconds = 0.0
        if continues:
            run = self._to_resume()
            step = run.find_step(self.model, self.optimizer, self._step, fallback_step)
            seconds = run.go_on(step, time)
            self._history.resume(step)
            self._files.create()
            self._files.drop_after(step)
            self._measures.create()
            self._measures.drop_after(step)
        else:
            self._remove_all()
            self._files.create()
            self._measures.create()
            self._history.create()
        self._buffer = StepBuffer(time)
        self._seconds_before = seconds
        self._share = TimeShare(self._max_overhead)
        self._last_write = 0.0
        self._write_soon = False
        if not continues:
            self._keep(first=True)
            # The last of its files: a kill before it leaves no run.
            write_card(
                self.directory,
                self.model,
                self.optimizer,
                name=self.name,
                steps_before=steps_of(self.optimizer) or 0,
            )
            self._share = TimeShare(self._max_overhead)  # the loop begins here
        self._due = self._schedule.next_after(time.n_steps)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if _is_within_a_step(optimizer):
            return
        with self._share.counted(), self._ending_at_a_failure():
            now = self._share.seconds
            self._buffer.add(self._seconds_before + now)
            late = now - self._last_write > _MOST_SECONDS
            if self._write_soon or late or len(self._buffer) > _MOST_ROWS:
                self._last_write = now
                with self._tolerant("write the history"):
                    self._write_rows(last_too=False, durable=self._write_soon)
                    self._write_soon = False
            if self._due is not None and self._buffer.most_steps >= self._due:
                self._keep_if_due()

    def _keep_if_due(self) -> None:
        step = self.step
        if self._due is None or step < self._due:
            return  # the scaler skipped some
        due = self._schedule.is_due(step)
        self._due = self._schedule.next_after(step)
        if due and self._share.allows_a_state():
            with self._share.of_a_state():
                self._keep()

    def _keep(self, *, first: bool = False) -> None:
        time = self._buffer.time
        if self._measuring:
            with self._tolerant("measure a state"):
                self._measures.take(self.model, time.n_steps, time.tau, self.name)
        if time.n_standing:
            self._tell(
                f"counts τ by parameter group {time.reference}, which stood still at "
                f"{time.n_standing} steps where others moved, as where it is frozen later; pass "
                "tau= to count another way",
                kind="standing",
            )
        if self._max_bytes == 0:
            return
        with self._tolerant("keep a state", strict=first):
            moments = None
            if self._with_moments:
                moments = self._moments_of_parameters()
            if self._makes_room(moments):
                self._files.save(self.model, time.record(), moments)
                # The step stays open until the next one; then its row may follow its state.
                self._write_soon = True

    def _write_rows(self, *, last_too: bool, durable: bool = False) -> None:
        rows = self._buffer.take(last_too=last_too)
        self._history.append(rows, durable=durable)
        self._buffer.written(last_too=last_too)

    def _end(self, *, completed: bool) -> None:
        if self._hook is None:
            return
        with self._tolerant("account for the last steps"):
            if completed:
                self.keep_last()
        with self._tolerant("write the history"):
            self._write_rows(last_too=True, durable=True)
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self._lock is not None:
            self._lock.release()
        self._hook = self._lock = None

    def _moments_of_parameters(self) -> OptimizerState | None:
        """Return what the optimiser keeps, None where it is not of the parameters' shapes."""
        moments = OptimizerState.of_optimizer(self.model, self.optimizer, copy=False)
        try:
            moments.check(self.model)
        except ValueError as error:
            self._tell(
                f"keeps no moments of {type(self.optimizer).__name__} ({error})", kind="moments"
            )
            return None
        return moments

    # Room

    def _makes_room(self, moments: OptimizerState | None) -> bool:
        """Remove states until one more fits, and tell whether it does."""
        if self._max_bytes is None:
            return True
        needed = _bytes_of(self.model, moments)
        sizes = {step: self._files.n_bytes(step) for step in self._files.steps()}
        while sum(sizes.values()) + self._history.n_bytes + needed > self._max_bytes:
            # With the one to come as the last of them.
            step = densest([*sizes, self._buffer.time.n_steps], logarithmic=self._logarithmic)
            if step is None:
                self._tell(
                    f"keep no state at step {self._buffer.time.n_steps}: max_bytes="
                    f"{self._max_bytes:,} has no room for {needed:,} more; allow more, or pass an "
                    "estimator= that measures in the loop"
                )
                return False
            self._files.drop(step)
            del sizes[step]
        return True

    # Failures

    @contextmanager
    def _tolerant(self, doing: str, *, strict: bool = False) -> Iterator[None]:
        """Warn of a failure and let training go on; before it begins a failure is an error."""
        try:
            yield
        except Exception as error:
            if strict:
                raise
            self._tell(f"could not {doing} ({type(error).__name__}: {error})", kind=doing)

    @contextmanager
    def _ending_at_a_failure(self) -> Iterator[None]:
        """End the recording where a step could not be counted: later ones would be wrong."""
        try:
            yield
        except Exception as error:
            with self._tolerant("write the history"):
                self._history.append(self._buffer.take_counted(), durable=True)
            self._release()
            self._tell(f"ended: a step could not be counted ({type(error).__name__}: {error})")

    def _tell(self, text: str, *, kind: str | None = None) -> None:
        """Warn once of each kind."""
        kind = kind or "room"
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(
                f"the recorder of {str(self.directory)!r} {text}; training goes on.",
                RunWarning,
                stacklevel=3,
            )

    # The directory

    def _to_resume(self) -> RunToResume:
        return RunToResume(self.directory, self.model, self._files, self._history.path)

    def _check_nothing_is_lost(self) -> None:
        """Raise ValueError where files would go that no kill at the beginning of a run left."""
        found = self._files.later_than_the_first()
        history = self._history.path
        if history.exists() and history.stat().st_size:
            found = [history, *found]
        if found:
            names = ", ".join(str(path.relative_to(self.directory)) for path in found[:4])
            raise ValueError(
                f"directory: {str(self.directory)!r} has no {CARD}, but holds {names}"
                + (" ..." if len(found) > 4 else "")
                + f", which a new run would remove. Bring its {CARD} back, pass overwrite=True to "
                "remove them, or pass another directory."
            )

    def _remove_all(self) -> None:
        (self.directory / CARD).unlink(missing_ok=True)
        self._history.path.unlink(missing_ok=True)
        self._files.drop_after(-1)
        self._measures.drop_after(-1)

    def _close_the_one_left_open(self) -> None:
        """Close the recorder that a loop of this process left open when it failed."""
        other = _OPEN.pop(str(self.directory.resolve()), None)
        if other is not None and other is not self and other._hook is not None:
            warnings.warn(
                f"the recorder of {str(self.directory)!r} was still open, as after a loop that "
                f"failed; it is closed at step {other.step}. Close it, or use it as a context.",
                RunWarning,
                stacklevel=4,
            )
            other._end(completed=False)


def _is_within_a_step(optimizer: Optimizer) -> bool:
    """Tell whether a step was called by another one, as where a subclass calls that of its base.

    torch calls hooks for both.
    """
    frame: FrameType | None = sys._getframe(2)
    wrapper, n_steps = sys._getframe(2).f_code, 0
    if wrapper.co_name != _WRAPPER:
        return False
    while frame is not None:
        if frame.f_code is wrapper and frame.f_locals["args"][0] is optimizer:
            n_steps += 1
        frame = frame.f_back
    return n_steps > 1


def _check_they_belong_together(model: nn.Module, optimizer: Optimizer) -> None:
    named = parameter_names(model)
    if not any(id(p) in named for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} holds no parameter of the model; pass the "
            "optimiser that trains it."
        )


def _check_name(name: Any) -> str | None:
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"name must be a string that is not empty, or None, got {name!r}.")
    return name


def _writes_here() -> bool:
    """Tell whether this process is the one that writes."""
    dist = torch.distributed
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _check_not_sharded(model: nn.Module) -> None:
    parts = [name for name, tensor in model.named_parameters() if hasattr(tensor, "full_tensor")]
    kinds = [type(module).__name__ for module in model.modules()]
    if parts or "FullyShardedDataParallel" in kinds:
        raise ValueError(
            f"model: {type(model).__name__} is sharded over processes, each of which holds a part "
            "only. Save checkpoints with torch.distributed.checkpoint and read them with "
            "TrainingRun.from_checkpoints."
        )


def _bytes_of(model: nn.Module, moments: OptimizerState | None) -> int:
    held = [t for one in (moments.moments or {}).values() for t in one.values()] if moments else []
    own = [*model.parameters(), *model.buffers(), *held]
    return sum(t.numel() * t.itemsize for t in own)
