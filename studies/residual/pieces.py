"""The three kinds of work, each piece a file: training, measuring, analysing."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import torch
from joblib import Parallel, delayed, parallel_config
from torch import Tensor

from studies.residual.data import load_images
from studies.residual.design import Design, Folders
from studies.residual.files import write_atomically
from studies.residual.measuring import RESIDUALS, Coupled, coupled_path, measure, measure_steps
from studies.residual.networks import Network
from studies.residual.statistics import analyse_cell, analyse_step
from studies.residual.training import START, read_record, state_path, train

Piece = tuple[str, Callable[[], None]]


def claim_folder(design: Design, folders: Folders, data: Path | None) -> None:
    """Say in the folder what its pieces are of, so that no piece of another study is used.

    Raises
    ------
    ValueError
        If the pieces there are of another design or of other images.
    """
    found = {"design": repr(design)}
    if data is not None:
        images = load_images(data).first(design.n_train, design.n_test)
        found["images"] = joblib.hash(dataclasses.astuple(images))
    mark = folders.out / "study.json"
    known = json.loads(mark.read_text()) if mark.exists() else {}
    for what, value in found.items():
        if known.get(what, value) != value:
            other = "another design" if what == "design" else "other images"
            raise ValueError(
                f"{folders.out} holds pieces of {other}; give another folder with --out, or "
                "remove this one."
            )
    if not known.keys() >= found.keys():
        folders.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(known | found, indent=1)
        write_atomically(mark, lambda path: path.write_text(text))


def train_networks(design: Design, folders: Folders, data: Path, jobs: int) -> None:
    """Train the networks that are not trained yet."""
    todo = [n for n in design.networks if read_record(folders.networks, n) is None]
    _work([(n.name, partial(_train, n, design, folders, data)) for n in todo], jobs)


def measure_states(design: Design, folders: Folders, data: Path, jobs: int) -> None:
    """Measure the states that were reached and are not measured yet."""
    todo = []
    for network, when, batch in design.measurements():
        state = state_path(folders.networks, network, when)
        paths = _coupled_paths(folders, network, when, batch)
        if state.exists() and not all(path.exists() for path in paths.values()):
            label = f"{network.name}, {when}, batch {batch}"
            todo.append((label, partial(_measure, network, when, batch, design, folders, data)))
    # All cells of the first batch come before those of the second.
    _work(sorted(todo, key=lambda piece: piece[0].rsplit(" ", 1)[1]), jobs)


def compare_steps(design: Design, folders: Folders, data: Path, jobs: int) -> None:
    """Measure with steps of several sizes, where that is not done yet."""
    todo = []
    for network, when in design.compared_steps():
        state, target = (
            state_path(folders.networks, network, when),
            step_path(folders, network, when),
        )
        if state.exists() and not target.exists():
            label = f"{network.name}, {when}, steps"
            todo.append((label, partial(_compare, network, state, target, design, data)))
    _work(todo, jobs)


def analyse_cells(design: Design, folders: Folders, jobs: int) -> None:
    """Take the statistics of cells whose batches are all measured, or were measured again."""
    todo = []
    for network, when, residual in design.cells():
        paths = [
            coupled_path(folders.couplings, network, when, batch, residual)
            for batch in range(design.measuring.n_batches)
        ]
        target = cell_path(folders, network, when, residual)
        if all(path.exists() for path in paths) and _is_older(target, paths):
            label = f"{network.name}, {when}, {residual}"
            todo.append((label, partial(_analyse, paths, target, network.seed)))
    _work(todo, jobs)


def cell_path(folders: Folders, network: Network, when: str, residual: str) -> Path:
    """Return the file of a cell's statistics."""
    return folders.cells / f"{network.name}_{when.replace(' ', '-')}_{residual}.json"


def step_path(folders: Folders, network: Network, when: str) -> Path:
    """Return the file of the statistics with steps of several sizes."""
    return folders.steps / f"{network.name}_{when.replace(' ', '-')}.json"


def _is_older(target: Path, sources: list[Path]) -> bool:
    if not target.exists():
        return True
    return any(path.stat().st_mtime_ns > target.stat().st_mtime_ns for path in sources)


def _work(pieces: list[Piece], jobs: int) -> None:
    """Do pieces of work side by side, one thread each, and say when each is done."""
    started = time.perf_counter()
    with parallel_config("loky", inner_max_num_threads=1):
        done: Iterable[Any] = Parallel(jobs, return_as="generator_unordered")(
            delayed(_timed)(label, work) for label, work in pieces
        )
        for count, (label, seconds) in enumerate(done, start=1):
            passed = time.perf_counter() - started
            print(
                f"{time.strftime('%H:%M:%S')} {count}/{len(pieces)} {label}: {seconds:.0f} s "
                f"({passed / 60:.1f} min in all)",
                flush=True,
            )


def _timed(label: str, work: Callable[[], None]) -> tuple[str, float]:
    torch.set_num_threads(1)
    started = time.perf_counter()
    work()
    return label, time.perf_counter() - started


def _train(network: Network, design: Design, folders: Folders, data: Path) -> None:
    images = load_images(data).first(design.n_train, design.n_test)
    train(network, *images.train_tensors(), design.training, folders.networks)


def _probe_batch(design: Design, data: Path, batch: int) -> tuple[Tensor, Tensor]:
    images = load_images(data).first(design.n_train, design.n_test)
    n = design.measuring.n_images
    inputs, targets = images.test_tensors()
    return inputs[batch * n : (batch + 1) * n], targets[batch * n : (batch + 1) * n]


def _compare(network: Network, state: Path, target: Path, design: Design, data: Path) -> None:
    steps = measure_steps(
        network, state, *_probe_batch(design, data, 0), design.steps, random_seed=network.seed
    )
    rows = [labels | analyse_step(couplings) for labels, couplings in steps]
    text = json.dumps(rows)
    write_atomically(target, lambda path: path.write_text(text))


def _measure(
    network: Network, when: str, batch: int, design: Design, folders: Folders, data: Path
) -> None:
    inputs, targets = _probe_batch(design, data, batch)
    state = state_path(folders.networks, network, when)
    plan = design.measuring
    found = measure(
        network, state, inputs, targets, plan, at_start=when == START, random_seed=network.seed
    )
    for residual, path in _coupled_paths(folders, network, when, batch).items():
        found[residual].save(path)


def _coupled_paths(folders: Folders, network: Network, when: str, batch: int) -> dict[str, Path]:
    return {r: coupled_path(folders.couplings, network, when, batch, r) for r in RESIDUALS}


def _analyse(paths: list[Path], target: Path, seed: int) -> None:
    found = analyse_cell([Coupled.load(path) for path in paths], seed=seed)
    text = json.dumps(found)
    write_atomically(target, lambda path: path.write_text(text))
