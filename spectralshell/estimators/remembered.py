"""Heavy work done once for each snapshot and configuration, and remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from joblib import Memory, Parallel, delayed, effective_n_jobs
from tqdm.auto import tqdm

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
        How to measure: all that a result depends on beside its snapshot.
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
    # A clone's callable is another object with the same code, so callables count by their code.
    key = configuration_digest(config)
    missing = [s for s in snapshots if key not in s.measures]
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
        for snapshot, found in _computed(
            missing, config, measure, memory, probe_seed, n_jobs, verbose
        ):
            # Labelled once, so that what is computed from it later is kept with the snapshot.
            snapshot.measures[key] = found.relabel(
                tau=snapshot.tau, batch=snapshot.batch, name=snapshot.name
            )
            bar.update()
            notify()
    return [s.measures[key].relabel(tau=s.tau, batch=s.batch, name=s.name) for s in snapshots]


def _computed(
    snapshots: Sequence[Snapshot],
    config: Any,
    measure: Measure,
    memory: Memory,
    probe_seed: int,
    n_jobs: int | None,
    verbose: int,
) -> Iterator[tuple[Snapshot, Any]]:
    """Yield snapshots and results in order, each as soon as it is there."""
    if len(snapshots) < 2 or effective_n_jobs(n_jobs) == 1:
        for snapshot in snapshots:
            yield snapshot, _cached(snapshot, config, measure, memory, probe_seed, verbose)
        return
    results = Parallel(n_jobs=n_jobs, return_as="generator")(
        delayed(_cached)(snapshot, config, measure, memory, probe_seed, 0) for snapshot in snapshots
    )
    yield from zip(snapshots, results, strict=True)


def _cached(
    snapshot: Snapshot,
    config: Any,
    measure: Measure,
    memory: Memory,
    probe_seed: int,
    verbose: int,
) -> Any:
    """Measure through ``memory``, also from a worker, so that all fill the same cache."""
    if memory.location is None:
        return measure(snapshot, config, probe_seed, verbose)
    key = (snapshot_digest(snapshot), configuration_digest(config))
    ignored = ["snapshot", "config", "measure", "probe_seed", "verbose"]
    lookup = memory.cache(_measure_for_key, ignore=ignored)
    return lookup(key, snapshot, config, measure, probe_seed, verbose)


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
