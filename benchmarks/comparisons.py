"""Side by side: which contenders meet on which problem, and what they must agree on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.problems import Problem
from benchmarks.workers import WorkerError, WorkerProcess, Workplace

# Float32 products of a few hundred terms: far above rounding, far below a wrong kernel.
FLOAT32 = 1e-4
# Moments up to λ² and eigenvalues that a few Lanczos steps give in float32.
SPECTRAL = 1e-3
FULL_STEPS = 100


@dataclass(frozen=True)
class Entry:
    """One contender of a comparison.

    Parameters
    ----------
    contender : str
        Name in :mod:`benchmarks.registry`.
    options : dict
        What it is set up with.
    label : str
        What the table calls it; by default the contender's name.
    times : float
        What its time is multiplied with: the steps it stands for over those it ran.
    at_most : int or None
        Runs after which a slow contender sits out the remaining rounds.
    asked : float or None
        The least ratio, its time over ours, that the package is meant to reach.
    memory_asked : float or None
        The same for peak memory.
    """

    contender: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    times: float = 1.0
    at_most: int | None = None
    asked: float | None = None
    memory_asked: float | None = None

    @property
    def shown(self) -> str:
        return self.label or self.contender


@dataclass(frozen=True)
class Comparison:
    """Contenders on one problem; the first is the package.

    Parameters
    ----------
    name, title : str
        For files and ``--only``, and for the table.
    problem : Problem
    entries : tuple of Entry
    repeats : int
        Rounds in which every contender runs once.
    tolerance : float
        Largest relative difference (Frobenius) from the reference.
    reference : Entry or None
        A float64 computation; without one, the second entry.
    memory : bool
        Whether peak memory is measured.
    """

    name: str
    title: str
    problem: Problem
    entries: tuple[Entry, ...]
    repeats: int
    tolerance: float = FLOAT32
    reference: Entry | None = None
    memory: bool = True


def comparisons(*, quick: bool = False, full: bool = False) -> list[Comparison]:
    """Return all comparisons; ``quick`` on tiny problems, ``full`` with every Lanczos step."""
    mlp, cnn = Problem("mlp", 256, 256), Problem("resnet", 16, 64)
    resnet, language = Problem("resnet", 64, 64), Problem("gpt-neox", 128, 4, "nll")
    exact_reference = Entry("torch.func Jacobian contraction", {"dtype": "float64", "once": True})
    once = {"once": True}
    once_label = "torch.func Jacobian contraction, one Jacobian"
    structured = {"implementation": "STRUCTURED_DERIVATIVES"}
    steps = FULL_STEPS if full else 5
    lanczos = "curvlinops, 100 Lanczos steps" + ("" if full else f" ({steps} × {100 // steps})")
    found = [
        Comparison(
            "kernel-mlp",
            "Whole kernel, MLP 64–256–256–256–10, N = 256, n = 2560",
            mlp,
            (
                Entry("exact kernel"),
                Entry("neural-tangents", structured, asked=1.0),
                Entry("torch.func NTK-vector products", {"chunk": 64}, at_most=3, asked=50.0),
                Entry("torch.func Jacobian contraction", at_most=2, asked=50.0),
                Entry("torch.func Jacobian contraction", once, label=once_label, at_most=2),
            ),
            repeats=15,
            reference=Entry("torch.func NTK-vector products", {"chunk": 64, "dtype": "float64"}),
        ),
        Comparison(
            "kernel-cnn",
            "Whole kernel, ResNet-18 layout of width 16, N = 64, n = 640",
            cnn,
            (
                Entry("exact kernel"),
                Entry("neural-tangents", structured, asked=1 / 0.8, memory_asked=2.0),
                Entry("torch.func Jacobian contraction", at_most=3, asked=4.0, memory_asked=2.0),
                Entry("torch.func Jacobian contraction", once, label=once_label, at_most=3),
            ),
            repeats=5,
            reference=exact_reference,
        ),
        Comparison(
            "spectrum-resnet18",
            "Shell energies, ResNet-18 (11 M parameters), N = 64: 640 eigenpairs against 100 steps",
            resnet,
            (
                Entry("fit", {"solver": "exact"}, label="exact fit, all eigenpairs"),
                Entry(
                    "curvlinops Lanczos",
                    {"steps": steps},
                    label=lanczos,
                    times=FULL_STEPS / steps,
                    asked=8.0,
                ),
            ),
            repeats=3,
            tolerance=SPECTRAL,
        ),
        _products("product-resnet18", "One product, ResNet-18, N = 64", resnet, 1, 5, 1 / 0.8),
        _products("block-resnet18", "Block of 16, ResNet-18, N = 64", resnet, 16, 2, 2.0),
        _products("block-mlp", "Block of 16, MLP, N = 256", mlp, 16, 25, 1 / 0.6),
        _products(
            "product-neox",
            "One product, GPT-NeoX (4 layers, width 128), 512 tokens, NLL",
            language, 1, 15, 1 / 0.8, "torch.func vjp + jvp",
        ),
        Comparison(
            "eigenvalues-mlp",
            "Ten largest eigenvalues, MLP, N = 256",
            mlp,
            (
                Entry("leading pairs", {"n_steps": 40, "count": 10},
                      label="eigenpairs, 40 Lanczos steps"),
                Entry("fit", {"solver": "exact", "compare": "eigenvalues", "count": 10},
                      label="exact fit, all eigenpairs"),
                Entry("hessian-eigenthings", {"count": 10, "steps": 40},
                      label="hessian-eigenthings, 40 Lanczos steps of JᵀJ"),
            ),
            repeats=5,
            tolerance=SPECTRAL,
        ),
    ]  # fmt: skip
    return [_shrunken(comparison) for comparison in found] if quick else found


def _products(
    name: str, title: str, problem: Problem, columns: int, repeats: int, asked: float,
    against: str = "curvlinops",
) -> Comparison:  # fmt: skip
    options = {"columns": columns}
    plain = "torch.func vjp + jvp"
    entries = [Entry("product", options), Entry(against, options, asked=asked)]
    if columns > 1:
        again = options | {"further": True}
        entries.append(Entry("product", again, label="product, further blocks"))
    if against != plain and columns == 1:
        entries.append(Entry(plain, options))
    # A block through a large network takes minutes in float64: its contenders check each other.
    large = columns > 1 and problem.network == "resnet"
    reference = None if large else Entry(plain, options | {"dtype": "float64"})
    return Comparison(name, title, problem, tuple(entries), repeats, FLOAT32, reference)


def _shrunken(comparison: Comparison) -> Comparison:
    return replace(
        comparison,
        problem=comparison.problem.tiny(),
        repeats=2,
        title=f"[quick] {comparison.title}",
    )


def compare(comparison: Comparison, workplace: Workplace) -> list[dict[str, Any]]:
    """Check that results agree, then let the contenders take turns; one row for each."""
    running: dict[int, WorkerProcess] = {}
    rows = [_row(comparison, entry) for entry in comparison.entries]
    results: dict[int, np.ndarray] = {}
    try:
        for index, entry in enumerate(comparison.entries):
            try:
                running[index] = workplace.worker(
                    entry.contender, comparison.problem, entry.options
                )
                rows[index]["prepare_seconds"] = running[index].ask("prepare")["seconds"]
                results[index], facts = _result(running[index], workplace)
                rows[index]["note"] = facts.get("rung", "")
            except WorkerError as error:
                if index == 0:
                    raise
                rows[index]["note"] = f"failed: {error}"
                if index in running:
                    running.pop(index).close()
        _check_agreement(comparison, workplace, results, rows)
        times = take_turns(running, comparison.repeats, comparison.entries)
    finally:
        for process in running.values():
            process.close()
    for index, entry in enumerate(comparison.entries):
        if index in times:
            rows[index] |= _summary(times[index] * entry.times, times.get(0))
    if comparison.memory:
        _add_memory(comparison, workplace, running, rows)
    return rows


def take_turns(
    running: dict[int, WorkerProcess], repeats: int, entries: Sequence[Entry] = ()
) -> dict[int, np.ndarray]:
    """Run A B C, A B C, …: seconds for each, a slow spell of the machine hits all alike."""
    times: dict[int, list[float]] = {index: [] for index in running}
    limits = dict(enumerate(entry.at_most or repeats for entry in entries))
    for turn in range(repeats):
        for index, process in running.items():
            if turn >= limits.get(index, repeats):
                continue
            times[index].append(process.ask("time")["seconds"])
    return {index: np.array(values) for index, values in times.items()}


def relative_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the reference."""
    if ours.shape != reference.shape:
        return float("inf")
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def _row(comparison: Comparison, entry: Entry) -> dict[str, Any]:
    return {
        "comparison": comparison.name,
        "title": comparison.title,
        "contender": entry.shown,
        "n": comparison.problem.n,
        "asked_ratio": entry.asked,
        "asked_memory_ratio": entry.memory_asked,
    }


def _result(process: WorkerProcess, workplace: Workplace) -> tuple[np.ndarray, dict[str, Any]]:
    path = workplace.scratch / "result.npy"
    answer = process.ask("result", path=str(path))
    result = np.load(path)
    path.unlink()
    return result, answer["facts"]


class Disagreement(RuntimeError):
    """Contenders gave different results: there is nothing to compare."""


def _check_agreement(
    comparison: Comparison,
    workplace: Workplace,
    results: dict[int, np.ndarray],
    rows: list[dict[str, Any]],
) -> None:
    """Write each contender's difference from the reference; raise Disagreement if too large."""
    if comparison.reference is not None:
        entry = comparison.reference
        with workplace.worker(entry.contender, comparison.problem, entry.options) as process:
            process.ask("prepare")
            reference, _ = _result(process, workplace)
        against = "float64"
    elif 1 in results:
        reference, against = results[1], comparison.entries[1].shown
    else:
        return
    for index, result in results.items():
        gap = relative_difference(result, reference)
        rows[index] |= {"difference": gap, "against": against, "tolerance": comparison.tolerance}
    wrong = [rows[i]["contender"] for i in results if rows[i]["difference"] > comparison.tolerance]
    if wrong:
        gaps = {rows[i]["contender"]: rows[i]["difference"] for i in results}
        raise Disagreement(f"{comparison.name}: results disagree with {against}: {gaps}")


def _summary(seconds: np.ndarray, ours: np.ndarray | None) -> dict[str, Any]:
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    known = {"seconds": middle, "seconds_q25": low, "seconds_q75": high, "repeats": len(seconds)}
    if ours is not None:
        low, high = np.quantile(seconds / ours[: len(seconds)], (0.25, 0.75))
        known |= {"ratio": middle / np.median(ours), "ratio_q25": low, "ratio_q75": high}
    return known


def _add_memory(
    comparison: Comparison,
    workplace: Workplace,
    alive: Iterable[int],
    rows: list[dict[str, Any]],
) -> None:
    for index in alive:
        entry = comparison.entries[index]
        try:
            peak = workplace.peak(entry.contender, comparison.problem, entry.options)["bytes"]
        except WorkerError as error:
            rows[index]["note"] += f" memory run failed: {error}"
            continue
        rows[index]["peak_mb"] = peak / 1e6
    ours = rows[0].get("peak_mb")
    for row in rows:
        if ours and "peak_mb" in row:
            row["memory_ratio"] = row["peak_mb"] / ours
