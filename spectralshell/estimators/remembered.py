"""Heavy work done once for each snapshot and configuration, and remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from joblib import Memory, Parallel, delayed, effective_n_jobs
from tqdm.auto import tqdm

from spectralshell.estimators.direction_parameter import settle_direction
from spectralshell.estimators.snapshot_digest import configuration_digest, snapshot_digest
from spectralshell.snapshots import Snapshot

Measure = Callable[[Snapshot, Any, int, int], Any]


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


__all__ = ["measure_each"]
