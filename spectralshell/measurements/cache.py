"""Measurements done once for each snapshot and settings, and remembered: in memory and on disk.

A key must change whenever a measure could: with the state, the data, the model's code and
settings, the residual, and the versions of the libraries. Where two keys of equal things differ
(an object whose pickle is not reproducible), the cost is a measurement done again. What a key does
not see: the code of functions that a callable or a model calls in turn.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Number
from pathlib import PurePath
from types import CodeType
from typing import Any

import cloudpickle
import joblib
import numpy as np
import torch
from joblib import Memory, Parallel, delayed, effective_n_jobs
from sklearn.utils.validation import check_memory
from torch import Tensor, nn
from tqdm.auto import tqdm

from spectralshell._version import __version__
from spectralshell.measurements.settings import KernelSettings, MotionSettings
from spectralshell.snapshots import Snapshot

_BOOKKEEPING = frozenset(vars(nn.Module()))

_HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks"})

_PLAIN = (str, bytes, Number, np.generic, type(None), torch.dtype, torch.device, PurePath)
"""Types whose text tells any two values apart."""

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
        """Return what a result is remembered by: the function's name, and the settings' digest."""
        key = f"{self.measure.__name__} {digest}"
        motion = getattr(self.settings, "motion", None)
        # The way to another snapshot is divided by the time between them.
        towards = motion is not None and isinstance(motion.direction, Snapshot)
        return f"{key} from tau={snapshot.tau!r}" if towards else key

    def of(self, snapshot: Snapshot, verbose: int) -> Any:
        """Measure a snapshot, without looking into any cache."""
        return self.measure(snapshot, self.settings, self.probe_seed, verbose)


def resolve_memory(memory: Any) -> Memory:
    """Return the cache that the parameter ``memory`` stands for; None keeps nothing."""
    return check_memory(os.fspath(memory) if isinstance(memory, os.PathLike) else memory)


def snapshot_digest(snapshot: Snapshot) -> str:
    """Return a digest of a snapshot's state, data and model, without its labels."""
    digest = hashlib.sha256(f"spectralshell {__version__} torch {torch.__version__}".encode())
    for part in _state_parts(snapshot.load_state()):
        digest.update(part)
    for part in _data_parts((snapshot.inputs, snapshot.targets), _value_bytes):
        digest.update(part)
    for part in _model_parts(snapshot.model):
        digest.update(part)
    digest.update(repr((snapshot.n_samples, snapshot.class_axis)).encode())
    digest.update(repr(sorted(snapshot.state.trainable)).encode())
    return digest.hexdigest()


def settings_digest(settings: Any) -> str:
    """Return a digest of a measurement's settings, nested ones included; the version counts too.

    Functions, classes and modules that a callable names count by their names alone.
    """
    digest = hashlib.sha256(f"spectralshell {__version__}".encode())
    for part in _settings_parts(settings):
        digest.update(part)
    return digest.hexdigest()


def _settings_parts(settings: Any) -> Iterable[bytes]:
    for field in fields(settings):
        value = getattr(settings, field.name)
        yield field.name.encode()
        if isinstance(value, (KernelSettings, MotionSettings)):
            yield from _settings_parts(value)
        else:
            yield from _option_parts(value)
        yield b"\0"


def _option_parts(value: Any) -> Iterable[bytes]:
    if isinstance(value, Snapshot):
        yield f"{snapshot_digest(value)} {value.tau!r}".encode()
    elif callable(value):
        yield _callable_bytes(value)
    else:
        yield from _data_parts(value, _refuse)


def _state_parts(state: Mapping[str, Tensor]) -> Iterable[bytes]:
    for name in sorted(state):
        yield name.encode()
        yield from _data_parts(state[name], _refuse)


def _data_parts(data: Any, other: Callable[[Any], bytes]) -> Iterable[bytes]:
    """Return data by value; ``other`` gives what is neither a number, a string nor made of them."""
    if isinstance(data, Tensor):
        yield f"{data.dtype}{tuple(data.shape)}".encode()
        flat = data.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    elif isinstance(data, np.ndarray) and data.dtype != object:
        yield f"array {data.dtype.str}{data.shape}".encode()
        yield np.ascontiguousarray(data).tobytes()
    elif isinstance(data, Mapping):
        for key in data:
            yield repr(key).encode()
            yield from _data_parts(data[key], other)
    elif isinstance(data, (tuple, list)):
        for value in data:
            yield from _data_parts(value, other)
    elif isinstance(data, _PLAIN):
        yield repr(data).encode()
    else:
        yield other(data)


def _refuse(data: Any) -> bytes:
    # The text of other things may leave out what tells them apart.
    raise TypeError(
        f"cannot tell by its value whether {type(data).__name__} {reprlib.repr(data)} has changed; "
        "pass numbers, strings, tensors, numpy arrays, or lists and mappings of them."
    )


def _model_parts(model: nn.Module) -> Iterable[bytes]:
    yield repr(model).encode()
    for name, module in model.named_modules():
        yield f"{name}:{type(module).__module__}.{type(module).__qualname__}".encode()
        yield from _setting_parts(module)
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        if not kind.__module__.startswith("torch."):
            yield _source(kind)


def _setting_parts(module: nn.Module) -> Iterable[bytes]:
    """Return what a module holds beside tensors and submodules: its scale, its flags, its hooks."""
    own = type(module).__module__.startswith("torch.")
    for name, value in sorted(vars(module).items()):
        if name in _HOOKS:
            for hook in value.values():
                yield name.encode() + _callable_bytes(hook)
        # The rest of torch's own bookkeeping follows from the state; the mode is set to eval.
        elif name not in _BOOKKEEPING and not (own and name.startswith("_")):
            yield name.encode() + _value_bytes(value)


def _value_bytes(value: Any) -> bytes:
    try:
        return _callable_bytes(value) if callable(value) else joblib.hash(value).encode()
    except (TypeError, AttributeError, pickle.PicklingError):  # a lock, a weak reference
        return repr(value).encode()


def _callable_bytes(function: Callable[..., Any]) -> bytes:
    written = inspect.isroutine(function) or inspect.isclass(function)
    source = _source(function if written else type(function))
    return b"".join([cloudpickle.dumps(function), source, *_global_parts(function)])


def _global_parts(function: Callable[..., Any]) -> Iterable[bytes]:
    """Return the plain data that a function finds in its module: not in its pickle, nor source."""
    called = function if inspect.isroutine(function) else type(function).__call__
    plain = getattr(called, "__func__", called)
    code, namespace = getattr(plain, "__code__", None), getattr(plain, "__globals__", {})
    names = sorted(_names(code)) if isinstance(code, CodeType) else []
    for name in names:
        try:
            parts = [*_data_parts(namespace[name], _refuse)] if name in namespace else []
        except TypeError:  # a function, a class, a module
            continue
        yield from (name.encode(), *parts)


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _source(thing: Any) -> bytes:
    try:
        return inspect.getsource(thing).encode()
    except (OSError, TypeError):  # defined where no source is kept, as in an interpreter
        return cloudpickle.dumps(thing)


def measure_each(
    snapshots: Sequence[Snapshot],
    measurement: Measurement,
    *,
    memory: Memory,
    n_jobs: int | None = None,
    verbose: int = 0,
    on_done: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Return the measures of snapshots in their order, labelled, computing what is not known yet.

    A callable direction is asked here, once a snapshot; ``on_done`` is called for each of them.
    """
    for snapshot in snapshots:
        snapshot.check_unchanged()
    settled = [measurement.settled(snapshot) for snapshot in snapshots]
    # A clone's callable is another object with the same code, so callables count by their code.
    distinct = {id(own.settings): own.settings for own in settled}
    digests = {place: settings_digest(settings) for place, settings in distinct.items()}
    tasks = [
        _Task(snapshot, own, own.key(snapshot, digests[id(own.settings)]))
        for snapshot, own in zip(snapshots, settled, strict=True)
    ]
    missing = [task for task in tasks if task.key not in task.snapshot.measures]
    bar = tqdm(
        total=len(snapshots),
        initial=len(snapshots) - len(missing),
        desc="measuring snapshots",
        unit="snapshot",
        disable=verbose < 1 or not missing,
    )
    with bar:
        for _ in range(len(snapshots) - len(missing)):
            on_done()
        computed = _compute(missing, memory, n_jobs, verbose)
        for task, found in zip(missing, computed, strict=True):
            # Labelled once, so that what is computed from it later is kept with the snapshot.
            task.snapshot.measures[task.key] = task.labelled(found)
            bar.update()
            on_done()
    return [task.labelled(task.snapshot.measures[task.key]) for task in tasks]


@dataclass(frozen=True)
class _Task:
    """A snapshot to be measured, and the key of its measure."""

    snapshot: Snapshot
    measurement: Measurement
    key: str

    def labelled(self, found: Any) -> Any:
        snapshot = self.snapshot
        return found.relabel(tau=snapshot.tau, batch=snapshot.batch, name=snapshot.name)


def _compute(
    tasks: Sequence[_Task], memory: Memory, n_jobs: int | None, verbose: int
) -> Iterator[Any]:
    """Yield the results of tasks in order, each as soon as it is there."""
    if len(tasks) < 2 or effective_n_jobs(n_jobs) == 1:
        for task in tasks:
            yield _cached(task, memory, verbose)
        return
    yield from Parallel(n_jobs=n_jobs, return_as="generator")(
        delayed(_cached)(task, memory, 0) for task in tasks
    )


def _cached(task: _Task, memory: Memory, verbose: int) -> Any:
    """Measure through ``memory``, also from a worker, so that all fill the same cache."""
    if memory.location is None:
        return task.measurement.of(task.snapshot, verbose)
    lookup = memory.cache(_measure_for_key, ignore=["task", "verbose"])
    return lookup((snapshot_digest(task.snapshot), task.key), task, verbose)


def _measure_for_key(key: tuple[str, str], task: _Task, verbose: int) -> Any:
    del key  # what joblib looks the result up by, instead of hashing the model
    return task.measurement.of(task.snapshot, verbose)
