"""Keys that results are remembered by: of snapshots, of settings, and of estimators for joblib."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from joblib.hashing import Hasher
from torch import Tensor

from spectralshell._version import __version__
from spectralshell.measurements.settings import KernelSettings, MotionSettings
from spectralshell.models.fingerprint import data_parts, model_digest, value_digest
from spectralshell.snapshots import Snapshot


def snapshot_digest(snapshot: Snapshot) -> str:
    """Return a digest of a snapshot's state, data and model, without its labels."""
    return _joined([content_digest(snapshot), model_digest(snapshot.model)])


def content_digest(snapshot: Snapshot) -> str:
    """Return a digest of a snapshot's state and data, and of the versions that measure them."""
    digest = hashlib.sha256(f"{_versions()} {torch.get_default_dtype()}".encode())
    for part in _state_parts(snapshot.load_state()):
        digest.update(part)
    digest.update(value_digest((snapshot.inputs, snapshot.targets)))
    digest.update(repr((snapshot.n_samples, snapshot.class_axis)).encode())
    digest.update(repr(sorted(snapshot.state.trainable)).encode())
    return digest.hexdigest()


def settings_digest(settings: Any) -> str:
    """Return a digest of a measurement's settings, nested ones included; the version counts too."""
    digest = hashlib.sha256(f"spectralshell {__version__}".encode())
    for part in _settings_parts(settings):
        digest.update(part)
    return digest.hexdigest()


def hash_by_what_runs(kind: type) -> None:
    """Let joblib tell estimators of a class apart by the code of their callables, not its name."""
    Hasher.dispatch[kind] = _hash_estimator


def _hash_estimator(hasher: Any, estimator: Any) -> None:
    def told(value: Any) -> Any:
        return b"".join(_option_parts(value)) if callable(value) else value

    hasher.save((type(estimator).__name__, {k: told(v) for k, v in vars(estimator).items()}))


# What joblib hashes, of a Pipeline with memory= for one: what a snapshot is and what its model
# runs, and not what it remembers, which grows with each fit.
_HASHED = ("model", "inputs", "targets", "tau", "batch", "state", "name", "n_samples", "class_axis")


def _hash_snapshot(hasher: Any, snapshot: Snapshot) -> None:
    parts = [getattr(snapshot, label) for label in _HASHED]
    hasher.save((type(snapshot).__name__, parts, model_digest(snapshot.model)))


Hasher.dispatch[Snapshot] = _hash_snapshot


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
        yield value_digest(value)
    else:
        yield from data_parts(value)


def _state_parts(state: Mapping[str, Tensor]) -> Iterable[bytes]:
    for name in sorted(state):
        yield name.encode()
        yield from data_parts(state[name])


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _versions() -> str:
    named = {"spectralshell": __version__, "torch": torch.__version__, "numpy": np.__version__}
    return f"{named} {platform.python_version()}"
