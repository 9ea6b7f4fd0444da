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
from dataclasses import fields, replace
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
from spectralshell.measurements.settings import settle_direction
from spectralshell.snapshots import Snapshot

_BOOKKEEPING = frozenset(vars(nn.Module()))

_HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks"})

_PLAIN = (str, bytes, Number, np.generic, type(None), torch.dtype, torch.device, PurePath)
"""Types whose text tells any two values apart."""

Measure = Callable[[Snapshot, Any, int, int], Any]


def resolve_memory(memory: Any) -> Memory:
    """Return the cache that the parameter ``memory`` stands for.

    Parameters
    ----------
    memory : None, str, path or joblib.Memory
        None is a cache that keeps nothing.

    Returns
    -------
    joblib.Memory

    Raises
    ------
    ValueError
        If it is anything else.

    Examples
    --------
    >>> resolve_memory(None).location is None
    True
    """
    return check_memory(os.fspath(memory) if isinstance(memory, os.PathLike) else memory)


def snapshot_digest(snapshot: Snapshot) -> str:
    """Digest of a snapshot's state, data and model, without its labels.

    Parameters
    ----------
    snapshot : Snapshot
        A state given by path is read.

    Returns
    -------
    str
        A SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256(f"spectralshell {__version__} torch {torch.__version__}".encode())
    for part in _state_parts(snapshot.load_state()):
        digest.update(part)
    for part in _data_parts((snapshot.inputs, snapshot.targets), _value_bytes):
        digest.update(part)
    for part in _model_parts(snapshot.model):
        digest.update(part)
    digest.update(repr(sorted(snapshot.state.trainable)).encode())
    return digest.hexdigest()


def configuration_digest(config: Any) -> str:
    """Digest of a measurement's configuration.

    Parameters
    ----------
    config : dataclass
        The configuration. Snapshots, tensors and arrays count by their values, callables by their
        code and the data among the globals that it names (numbers, strings, tensors, arrays, and
        lists and mappings of them). Functions, classes and modules that a callable names count by
        name alone: after changing their code, clear the cache.

    Returns
    -------
    str
        A SHA-256 in hexadecimal digits. It depends on the version of the package too, so that
        measures that travelled in a pickle are not taken for those of another version.

    Raises
    ------
    TypeError
        If an option holds something else, whose text may not tell two values apart.
    """
    digest = hashlib.sha256(f"spectralshell {__version__} {type(config).__name__}".encode())
    for field in fields(config):
        for part in _option_parts(getattr(config, field.name)):
            digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


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
    config: Any,
    measure: Measure,
    *,
    memory: Memory,
    probe_seed: int = 0,
    n_jobs: int | None = None,
    verbose: int = 0,
    on_done: Callable[[], None] | None = None,
) -> list[Any]:
    """Return what ``measure`` gives for every snapshot, computing what is not known yet.

    Parameters
    ----------
    snapshots : sequence of Snapshot
        What to measure. New results are remembered in ``snapshot.measures``, by the digest of
        ``config``.
    config : dataclass
        How to measure: all that a result depends on beside its snapshot. A callable ``direction``
        is asked here, once for each snapshot, and what it answers is checked and counts.
    measure : callable
        ``measure(snapshot, config, probe_seed, verbose)``, a function of a module, so that workers
        find it. Its result has ``relabel(tau=, batch=, name=)``.
    memory : joblib.Memory
        Cache across processes and restarts; each snapshot is stored as soon as it is measured.
    probe_seed : int, default=0
        Seed of random checks; no result depends on it.
    n_jobs : int, optional
        Processes; snapshots are the unit of work.
    verbose : int, default=0
        1 shows a progress bar over snapshots.
    on_done : callable, optional
        Called once for every snapshot, known or new.

    Returns
    -------
    list
        In the order of ``snapshots``, labelled with their ``tau``, ``batch`` and ``name``.
    """
    for snapshot in snapshots:
        snapshot.check_unchanged()
    configs = [_settled(config, snapshot) for snapshot in snapshots]
    keys = _keys(snapshots, config, configs)
    missing = [
        task
        for task in zip(snapshots, keys, configs, strict=True)
        if task[1] not in task[0].measures
    ]
    bar = tqdm(
        total=len(snapshots),
        initial=len(snapshots) - len(missing),
        desc="measuring snapshots",
        unit="snapshot",
        disable=verbose < 1 or not missing,
    )
    notify = on_done if on_done is not None else _nothing
    with bar:
        for _ in range(len(snapshots) - len(missing)):
            notify()
        for snapshot, key, found in _computed(
            missing, measure, memory, probe_seed, n_jobs, verbose
        ):
            # Labelled once, so that what is computed from it later is kept with the snapshot.
            snapshot.measures[key] = found.relabel(
                tau=snapshot.tau, batch=snapshot.batch, name=snapshot.name
            )
            bar.update()
            notify()
    return [
        s.measures[key].relabel(tau=s.tau, batch=s.batch, name=s.name)
        for s, key in zip(snapshots, keys, strict=True)
    ]


def _settled(config: Any, snapshot: Snapshot) -> Any:
    """Return the configuration with the direction that a callable gives for the snapshot."""
    direction = getattr(config, "direction", None)
    if not callable(direction):
        return config
    return replace(config, direction=settle_direction(direction, snapshot))


def _keys(snapshots: Sequence[Snapshot], config: Any, configs: Sequence[Any]) -> list[str]:
    # A clone's callable is another object with the same code, so callables count by their code.
    shared = configuration_digest(config) if all(c is config for c in configs) else None
    keys = []
    for snapshot, settled in zip(snapshots, configs, strict=True):
        key = configuration_digest(settled) if shared is None else shared
        # The way to another snapshot is divided by the time between them.
        towards = isinstance(getattr(settled, "direction", None), Snapshot)
        keys.append(f"{key} from tau={snapshot.tau!r}" if towards else key)
    return keys


def _computed(
    tasks: Sequence[tuple[Snapshot, str, Any]],
    measure: Measure,
    memory: Memory,
    probe_seed: int,
    n_jobs: int | None,
    verbose: int,
) -> Iterator[tuple[Snapshot, str, Any]]:
    """Yield snapshots, keys and results in order, each as soon as it is there."""
    if len(tasks) < 2 or effective_n_jobs(n_jobs) == 1:
        for task in tasks:
            yield *task[:2], _cached(*task, measure, memory, probe_seed, verbose)
        return
    results = Parallel(n_jobs=n_jobs, return_as="generator")(
        delayed(_cached)(*task, measure, memory, probe_seed, 0) for task in tasks
    )
    for task, found in zip(tasks, results, strict=True):
        yield *task[:2], found


def _cached(
    snapshot: Snapshot,
    key: str,
    config: Any,
    measure: Measure,
    memory: Memory,
    probe_seed: int,
    verbose: int,
) -> Any:
    """Measure through ``memory``, also from a worker, so that all fill the same cache."""
    if memory.location is None:
        return measure(snapshot, config, probe_seed, verbose)
    ignored = ["snapshot", "config", "measure", "probe_seed", "verbose"]
    lookup = memory.cache(_measure_for_key, ignore=ignored)
    return lookup((snapshot_digest(snapshot), key), snapshot, config, measure, probe_seed, verbose)


def _measure_for_key(
    key: tuple[str, str],
    snapshot: Snapshot,
    config: Any,
    measure: Measure,
    probe_seed: int,
    verbose: int,
) -> Any:
    del key  # what joblib looks the result up by, instead of hashing the model
    return measure(snapshot, config, probe_seed, verbose)


def _nothing() -> None:
    """Do nothing: the default of ``on_done``."""
