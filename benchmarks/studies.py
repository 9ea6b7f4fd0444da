"""What the package says about itself, measured: its choice of solver, its memory, its growth."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from benchmarks.comparisons import take_turns
from benchmarks.problems import Problem
from benchmarks.workers import WorkerError, WorkerProcess, Workplace

TIE = 0.15
MEMORY_FROM_MB = 500
MEMORY_LIMIT = 10**9
SOLVERS = ("exact", "lanczos")

# (problem, Lanczos steps): few and many rows, cheap and dear networks, short and long runs.
CONFIGURATIONS = (
    (Problem("mlp", 256, 64), 100),
    (Problem("mlp", 256, 256), 100),
    (Problem("mlp", 256, 256), 20),
    (Problem("mlp", 64, 384), 50),
    (Problem("mlp", 1024, 128), 100),
    (Problem("mlp", 256, 448), 50),
    (Problem("resnet", 8, 128), 20),
    (Problem("resnet", 16, 16), 100),
    (Problem("resnet", 16, 64), 100),
    (Problem("resnet", 16, 64), 10),
    (Problem("resnet", 64, 8), 30),
    (Problem("resnet", 64, 16), 5),
    (Problem("gpt-neox", 128, 2, "nll"), 50),
    (Problem("gpt-neox", 128, 4, "nll"), 10),
)


def choice(workplace: Workplace, *, quick: bool = False) -> list[dict[str, Any]]:
    """Time both solvers and compare with what ``solver="auto"`` takes; one row each."""
    configurations = ((Problem("mlp", 32, 8), 20),) if quick else CONFIGURATIONS
    first, *_ = configurations
    running = {i: workplace.worker("fit", first[0], {"solver": s}) for i, s in enumerate(SOLVERS)}
    try:
        return [_choice(workplace, running, problem, steps) for problem, steps in configurations]
    finally:
        for process in running.values():
            process.close()


def _choice(
    workplace: Workplace, running: dict[int, WorkerProcess], problem: Problem, steps: int
) -> dict[str, Any]:
    fits = [{"solver": solver, "n_steps": steps} for solver in SOLVERS]
    workplace.set_up(running[0], "fit", problem, {"solver": "auto", "n_steps": steps})
    facts = running[0].ask("result", path=str(workplace.scratch / "result.npy"))["facts"]
    for i, options in enumerate(fits):
        workplace.set_up(running[i], "fit", problem, options)
    # The first run warms up, and tells how many more one can wait for.
    longest = max(process.ask("time")["seconds"] for process in running.values())
    times = take_turns(running, 5 if longest < 1 else 3 if longest < 3 else 1)
    exact, lanczos = (float(np.median(times[i])) for i in (0, 1))
    taken, other = (exact, lanczos) if facts["solver"] == "exact" else (lanczos, exact)
    row = {
        "network": f"{problem.network} {problem.width}",
        "N": problem.n_samples,
        "n": problem.n,
        "n_steps": steps,
        "exact_seconds": exact,
        "lanczos_seconds": lanczos,
        "auto": facts["solver"],
        "predicted_ratio": facts["exact_cost"] / facts["lanczos_cost"],
        "measured_ratio": exact / lanczos,
        "right": bool(taken <= (1 + TIE) * other),
    }
    for solver, options in zip(SOLVERS, fits, strict=True):
        predicted = facts[f"{solver}_memory"]
        row[f"{solver}_predicted_mb"] = predicted / 1e6
        # Below, what libraries keep for themselves counts as much as the fit.
        if predicted / 1e6 >= MEMORY_FROM_MB:
            measured = workplace.peak("fit", problem, options)["bytes"]
            row[f"{solver}_peak_mb"] = measured / 1e6
            row[f"{solver}_memory_error"] = predicted / measured - 1
    return row


def memory(workplace: Workplace, *, quick: bool = False) -> list[dict[str, Any]]:
    """Predicted and measured peak memory of large fits, with and without a limit."""
    if quick:
        return [_limited(workplace, Problem("resnet", 4, 8), MEMORY_LIMIT)]
    resnet = Problem("resnet", 64, 64)
    problems = [(resnet, None), (resnet, MEMORY_LIMIT), (Problem("resnet", 16, 128), None),
                (Problem("mlp", 256, 384), None)]  # fmt: skip
    return [_limited(workplace, problem, limit) for problem, limit in problems]


def _limited(workplace: Workplace, problem: Problem, limit: int | None) -> dict[str, Any]:
    options = {"solver": "exact", "max_memory": limit}
    row: dict[str, Any] = {
        "network": f"{problem.network} {problem.width}",
        "n": problem.n,
        "limit_mb": None if limit is None else limit / 1e6,
    }
    try:
        answer = workplace.peak("fit", problem, options)
    except WorkerError as error:
        return row | {"note": f"failed: {error}"}
    peak, facts = answer["bytes"], answer["facts"]
    return row | {
        "predicted_mb": facts["exact_memory"] / 1e6,
        "peak_mb": peak / 1e6,
        "error": facts["exact_memory"] / peak - 1,
        "within_limit": None if limit is None else bool(peak <= limit),
    }


def grid(workplace: Workplace, *, quick: bool = False) -> list[dict[str, Any]]:
    """Twenty values of q against one fit of the same snapshots."""
    problem = Problem("resnet", 4 if quick else 8, 32 if quick else 128)
    rows = []
    for solver in SOLVERS:
        base = {"solver": solver, "batches": 8, "folds": 2, "n_steps": 50}
        searches = {"none": "one fit", "loop": "20 fits in a loop", "cv": "GridSearchCV, 20 × 2"}
        running = {
            i: workplace.worker("grid", problem, base | {"search": search})
            for i, search in enumerate(searches)
        }
        try:
            for process in running.values():
                process.ask("time")
            times = take_turns(running, 1 if quick else 2)
        finally:
            for process in running.values():
                process.close()
        for i, label in enumerate(searches.values()):
            ratio = np.median(times[i]) / np.median(times[0])
            rows.append(
                {"solver": solver, "case": label, "seconds": np.median(times[i]), "ratio": ratio}
            )
    return rows


def scaling(workplace: Workplace, *, quick: bool = False) -> list[dict[str, Any]]:
    """Cost against samples, parameters and Lanczos steps; one row for each point."""
    samples = (8, 16) if quick else (16, 32, 64, 128)
    lines: list[tuple[str, str, list[tuple[float, Problem, str, dict[str, Any]]]]] = []
    for network, width, factor in (("resnet", 16, 1), ("mlp", 256, 8)):
        problems = [Problem(network, width, factor * n) for n in samples]
        lines.append(
            ("N", f"{network}, one product",
             [(p.n_samples, p, "product", {"columns": 1}) for p in problems])
        )  # fmt: skip
        lines.append(
            ("N", f"{network}, Lanczos, 20 steps",
             [(p.n_samples, p, "fit", {"solver": "lanczos", "n_steps": 20}) for p in problems])
        )  # fmt: skip
    for solver in SOLVERS:
        widths = (4, 8) if quick else (8, 16, 32)
        problems = [Problem("resnet", width, 16) for width in widths]
        options = {"solver": solver, "n_steps": 20}
        lines.append(
            ("parameters", f"resnet, N = 16, {solver}",
             [(count_parameters(p), p, "fit", options) for p in problems])
        )  # fmt: skip
    steps = (5, 10) if quick else (10, 20, 40, 80)
    problem = Problem("resnet", 16, 8 if quick else 32)
    lines.append(
        ("steps", "resnet 16, N = 32, Lanczos",
         [(m, problem, "fit", {"solver": "lanczos", "n_steps": m}) for m in steps])
    )  # fmt: skip
    return list(itertools.chain.from_iterable(_line(workplace, *line) for line in lines))


def count_parameters(problem: Problem) -> int:
    """Trainable scalars of the problem's network."""
    from benchmarks.networks_torch import initial_state

    state = initial_state(problem)
    return sum(v.size for name, v in state.items() if "running_" not in name and v.ndim)


def _line(
    workplace: Workplace,
    axis: str,
    label: str,
    points: list[tuple[float, Problem, str, dict[str, Any]]],
) -> list[dict[str, Any]]:
    rows = []
    _, first, contender, options = points[0]
    with workplace.worker(contender, first, options) as process:
        for x, problem, contender, options in points:
            workplace.set_up(process, contender, problem, options)
            process.ask("prepare")
            warm_up = process.ask("time")["seconds"]
            times = [process.ask("time")["seconds"] for _ in range(7 if warm_up < 0.5 else 2)]
            rows.append({"axis": axis, "line": label, "x": x, "seconds": float(np.median(times))})
    exponent = fitted_exponent(rows)
    return [row | {"exponent": exponent} for row in rows]


def fitted_exponent(rows: list[dict[str, Any]]) -> float:
    """Slope of ln(seconds) against ln(x), by least squares."""
    x, seconds = (np.log([row[name] for row in rows]) for name in ("x", "seconds"))
    return float(np.polyfit(x, seconds, 1)[0])
