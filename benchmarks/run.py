"""What the package costs, next to the plain recipe: ``python benchmarks/run.py``.

Two questions. What does one product with M cost, against the ``torch.func.vjp`` and
``torch.func.jvp`` recipe that linearises anew each time? And what does a grid over the shell ratio
q cost, against measuring again for each value? Runs of the two sides alternate, figures are medians
with quartiles of the ratio, and the environment is recorded beside them under ``out/benchmarks/``.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spectralshell import ShellEnergyEstimator, Snapshot
from spectralshell.datasets import load_digits_trajectory
from spectralshell.operators import build_kernel
from spectralshell.warning_categories import ResolutionWarning

Q_GRID = (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
PACKAGES = ("spectralshell", "torch", "numpy", "scipy", "scikit-learn", "pandas")


class AttentionClassifier(nn.Module):
    """One attention layer over a sequence, mean-pooled into logits."""

    def __init__(self, width: int = 32, n_classes: int = 10) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).mean(1))


def product_cases(dtype: torch.dtype) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Name → (model, inputs): a perceptron, a convolutional network, an attention layer."""
    torch.manual_seed(0)  # a script of its own: the constructors know no other generator
    perceptron = nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)
    )
    convolutional = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.GELU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    cases = {
        "perceptron, 128 samples": (perceptron, torch.randn(128, 64)),
        "convolutional, 64 samples": (convolutional, torch.randn(64, 3, 16, 16)),
        "attention, 64 samples": (AttentionClassifier(), torch.randn(64, 16, 32)),
    }
    return {
        name: (model.eval().to(dtype), inputs.to(dtype)) for name, (model, inputs) in cases.items()
    }


def plain_product(model: nn.Module, inputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return v ↦ M v by torch.func, as one writes it first."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())
    scale = len(inputs) ** -0.5

    def outputs(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, (values, buffers), (inputs,)).flatten() * scale

    def product(vector: torch.Tensor) -> torch.Tensor:
        # Attention has a forward derivative only under this backend and without its fast path.
        with sdpa_kernel(SDPBackend.MATH):
            _, pull_back = torch.func.vjp(outputs, parameters)
            (gradient,) = pull_back(vector)
            return torch.func.jvp(outputs, (parameters,), (gradient,))[1]

    return product


def seconds(function: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> dict[str, float]:
    """Medians of both sides and quartiles of the ratio, from runs that take turns."""
    ours(), theirs()
    pairs = np.empty((repeats, 2))
    for i in range(repeats):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            pairs[i, side] = seconds((ours, theirs)[side])
    low, middle, high = np.quantile(pairs[:, 1] / pairs[:, 0], (0.25, 0.5, 0.75))
    medians = np.median(pairs, axis=0)
    return {
        "ours_seconds": medians[0],
        "plain_seconds": medians[1],
        "ratio": middle,
        "ratio_q25": low,
        "ratio_q75": high,
        "repeats": repeats,
    }


def time_products(repeats: int) -> list[dict[str, object]]:
    """One product with M, ours against the plain recipe, checked to agree first."""
    torch.backends.mha.set_fastpath_enabled(False)  # the plain recipe has no derivative of it
    rows = []
    warm_up = nn.Linear(2, 2)  # the first kernel of a process also pays for imports
    build_kernel(Snapshot(warm_up, torch.ones(2, 2), torch.zeros(2, 2))).close()
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
        for name, (model, inputs) in product_cases(dtype).items():
            targets = torch.arange(len(inputs)) % 10
            plain = plain_product(model, inputs)
            start = time.perf_counter()
            with build_kernel(Snapshot(model, inputs, targets), residual="mse") as kernel:
                build = time.perf_counter() - start
                vector = torch.randn(kernel.n, dtype=torch.float64)
                cast = vector.to(dtype)
                ours = kernel.matvec(vector).double()
                gap = float((ours - plain(cast).double()).norm() / ours.norm())
                if gap > tolerance:
                    raise RuntimeError(f"{name}: the two products differ by {gap:.1e}")
                times = alternate(
                    lambda k=kernel, v=vector: k.matvec(v), lambda p=plain, v=cast: p(v), repeats
                )
                rows.append(
                    {"case": f"{name}, {str(dtype)[6:]}", **times, "note": kernel.rung}
                    | {"build_seconds": build}
                )
    return rows


def time_grid(repeats: int) -> list[dict[str, object]]:
    """Ten values of q on one set of snapshots: measured once, against measured each time."""
    X = load_digits_trajectory(n_snapshots=2, n_batches=2, batch_size=32, max_iter=100)

    def forget() -> None:
        for snapshot in X:
            snapshot.measures.clear()

    def remembered() -> None:
        forget()
        for q in Q_GRID:
            ShellEnergyEstimator(q=q, solver="lanczos", n_steps=50).fit(X)

    def refitted() -> None:
        for q in Q_GRID:
            forget()
            ShellEnergyEstimator(q=q, solver="lanczos", n_steps=50).fit(X)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResolutionWarning)  # the cost is asked for, not the profile
        times = alternate(remembered, refitted, repeats)
    return [{"case": f"{len(Q_GRID)} values of q, 4 snapshots", **times, "note": "lanczos, 50"}]


def environment() -> dict[str, str]:
    """What the figures depend on beside the code."""
    known = {name: version(name) for name in PACKAGES}
    return known | {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    lines = information.read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def as_markdown(rows: pd.DataFrame, settings: dict[str, str]) -> str:
    """Return the report: one table of figures, one of the environment."""
    lines = [
        "# Benchmarks",
        "",
        "`ratio` is plain / ours, larger than 1 where the package is faster; median [quartiles].",
        "",
        "| case | ours (ms) | plain (ms) | ratio | build (ms) | note |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows.itertuples():
        build = "" if np.isnan(row.build_seconds) else f"{1e3 * row.build_seconds:.1f}"
        lines.append(
            f"| {row.case} | {1e3 * row.ours_seconds:.2f} | {1e3 * row.plain_seconds:.2f} "
            f"| {row.ratio:.2f} [{row.ratio_q25:.2f}, {row.ratio_q75:.2f}] "
            f"| {build} | {row.note} |"
        )
    lines += ["", "| environment | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run both comparisons and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25, help="timed pairs for each product")
    parser.add_argument("--grid-repeats", type=int, default=3, help="timed pairs for the grid")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    options = parser.parse_args()

    rows = pd.DataFrame(time_products(options.repeats) + time_grid(options.grid_repeats))
    settings = environment()
    options.out.mkdir(parents=True, exist_ok=True)
    rows.assign(**settings).to_csv(options.out / "benchmarks.csv", index=False)
    report = as_markdown(rows, settings)
    (options.out / "benchmarks.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
