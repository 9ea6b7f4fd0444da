"""Measurements done once for each snapshot and settings, and remembered: in memory and on disk.

Where two keys of equal things differ, the cost is a measurement done again.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from joblib import Memory, Parallel, delayed, effective_n_jobs
from sklearn.utils.validation import check_memory
from tqdm.auto import tqdm

from spectralshell.measurements.keys import content_digest, model_digest, settings_digest
from spectralshell.measurements.store import MeasureStore, unwritable
from spectralshell.snapshots import Snapshot
from spectralshell.warning_categories import CacheWarning

Measure = Callable[[Snapshot, Any, int, int], Any]
"""``measure(snapshot, settings, probe_seed, verbose)``, a module's function: workers find it."""


@dataclass(frozen=True)
class Measurement:
    """A measuring function with its settings; no result depends on the seed of its probes."""

    measure: Measure
    settings: Any
    probe_seed: int = 0

    def settled(self, snapshot: Snapshot) -> Measurement:
        """Return the measurement with the direction that a callable gives for the snapshot."""
        motion = getattr(self.settings, "motion", None)
        if motion is None or not callable(motion.direction):
            return self
        settings = replace(self.settings, motion=motion.settled(snapshot))
        return replace(self, settings=settings)

    def key(self, snapshot: Snapshot, digest: str) -> str:
        """Return what a result is remembered by: the function's name, and a digest."""
        key = f"{self.measure.__name__} {digest}"
        motion = getattr(self.settings, "motion", None)
        # The way to another snapshot is divided by the time between them.
        towards = motion is not None and isinstance(motion.direction, Snapshot)
        return f"{key} from tau={snapshot.tau!r}" if towards else key

    def of(self, snapshot: Snapshot, verbose: int) -> Any:
        """Measure a snapshot, without looking into any cache."""
        return self.measure(snapshot, self.settings, self.probe_seed, verbose)


@dataclass(frozen=True)
class Failure:
    """In the place of a measure: the snapshot could not be measured, and why."""

    error: Exception
    tau: float = 0.0
    batch: int | str = 0
    name: str | None = None

    def relabel(self, *, tau: float, batch: int | str, name: str | None) -> Failure:
        """Return the same failure with the labels of a snapshot."""
        return replace(self, tau=tau, batch=batch, name=name)


def resolve_memory(memory: Any) -> Memory:
    """Return the cache that the parameter ``memory`` stands for; None keeps nothing."""
    location = os.fspath(memory) if isinstance(memory, os.PathLike) else memory
    try:
        return check_memory(location)
    except OSError as error:
        raise unwritable(str(location), error) from error


@contextmanager
def naming(snapshot: Snapshot) -> Iterator[None]:
    """Let the message of an error begin with the snapshot that it is about."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(snapshot.label):
            raise
        named = _named(error, snapshot.label)
        if named is None:
            error.add_note(snapshot.label)
            raise
        raise named from error


def _named(error: Exception, label: str) -> Exception | None:
    """Return an error of the same type that begins with a label, None if it takes other things."""
    try:
        named = type(error)(f"{label}: {error}")
    except Exception:  # whatever a constructor raises that wants more than a text
        return None
    return named if type(named) is type(error) and label in str(named) else None


def measure_each(
    snapshots: Sequence[Snapshot],
    measurement: Measurement,
    *,
    memory: Memory,
    n_jobs: int | None = None,
    verbose: int = 0,
    on_done: Callable[[], None] = lambda: None,
    on_error: str = "raise",
) -> list[Any]:
    """Return the measures of snapshots in order, a `Failure` where ``on_error="skip"`` finds none.

    A callable direction is asked here, once a snapshot; ``on_done`` is called for each of them.
    """
    keys = _Keys()
    tasks = [_pose(snapshot, measurement, keys, on_error) for snapshot in snapshots]
    posed = [task for task in tasks if isinstance(task, _Task)]
    missing = [task for task in posed if task.key not in task.snapshot.measures]
    bar = tqdm(
        total=len(snapshots),
        initial=len(snapshots) - len(missing),
        desc="measuring snapshots",
        unit="snapshot",
        disable=verbose < 1 or not missing,
    )
    found = {id(task): task.snapshot.measures.get(task.key) for task in posed}
    with bar:
        for _ in range(len(snapshots) - len(missing)):
            on_done()
        store = None if memory.location is None else MeasureStore.of(memory)
        computed = _compute(missing, store, n_jobs, verbose, on_error)
        for task, (result, complaint) in zip(missing, computed, strict=True):
            if complaint is not None:
                warnings.warn(complaint, CacheWarning, stacklevel=2)
            found[id(task)] = task.remember(result)
            bar.update()
            on_done()
    if missing:
        _remember_as_left(posed)
    return [task if isinstance(task, Failure) else task.labelled(found[id(task)]) for task in tasks]


class _Keys:
    """Digests of settings and models, each object's once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}

    def of(self, settings: Any, snapshot: Snapshot) -> str:
        """Return the digest of settings and of a snapshot's model, as both are now."""
        found = self._digest(settings, settings_digest), self._digest(snapshot.model, model_digest)
        return " ".join(found)

    def _digest(self, thing: Any, digest: Callable[[Any], str]) -> str:
        # A clone's callable is another object with the same code, so callables count by their code.
        if id(thing) not in self._known:
            self._known[id(thing)] = thing, digest(thing)
        return self._known[id(thing)][1]


@dataclass(frozen=True)
class _Task:
    """A snapshot to be measured, and the key of its measure."""

    snapshot: Snapshot
    measurement: Measurement
    key: str

    def remember(self, found: Any) -> Any:
        """Label a result once, so that what is computed from it later is kept, and keep it."""
        labelled = self.labelled(found)
        if not isinstance(found, Failure):
            self.snapshot.measures[self.key] = labelled
        return labelled

    def labelled(self, found: Any) -> Any:
        """Return a result with the labels that the snapshot has now."""
        snapshot = self.snapshot
        return found.relabel(tau=snapshot.tau, batch=snapshot.batch, name=snapshot.name)


def _pose(
    snapshot: Snapshot, measurement: Measurement, keys: _Keys, on_error: str
) -> _Task | Failure:
    try:
        with naming(snapshot):
            snapshot.check_unchanged()
            own = measurement.settled(snapshot)
            return _Task(snapshot, own, own.key(snapshot, keys.of(own.settings, snapshot)))
    except Exception as error:
        if on_error == "raise" or isinstance(error, Warning):
            raise
        return Failure(error, snapshot.tau, snapshot.batch, snapshot.name)


def _remember_as_left(tasks: Sequence[_Task]) -> None:
    """Keep measures also under the keys that models have now: hooks may note that they ran."""
    keys = _Keys()
    for task in tasks:
        own, measures = task.measurement, task.snapshot.measures
        if task.key in measures:
            now = own.key(task.snapshot, keys.of(own.settings, task.snapshot))
            measures[now] = measures[task.key]


def _compute(
    tasks: Sequence[_Task],
    store: MeasureStore | None,
    n_jobs: int | None,
    verbose: int,
    on_error: str,
) -> Iterator[tuple[Any, str | None]]:
    """Yield the results of tasks in order, each as soon as it is there, and complaints."""
    if len(tasks) < 2 or effective_n_jobs(n_jobs) == 1:
        for task in tasks:
            yield _attempt(task, store, verbose, on_error)
        return
    yield from Parallel(n_jobs=n_jobs, return_as="generator")(
        delayed(_attempt)(task, store, 0, on_error) for task in tasks
    )


def _attempt(
    task: _Task, store: MeasureStore | None, verbose: int, on_error: str
) -> tuple[Any, str | None]:
    """Measure through the store, also from a worker, so that all fill the same cache."""
    snapshot = task.snapshot
    measure = partial(task.measurement.of, snapshot, verbose)
    try:
        with naming(snapshot):
            if store is None:
                return measure(), None
            recalled = store.recall(f"{content_digest(snapshot)} {task.key}", measure)
            return recalled.result, recalled.complaint
    except Exception as error:
        if on_error == "raise" or isinstance(error, Warning):
            raise
        return Failure(error), None
