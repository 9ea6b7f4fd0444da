"""A device against the CPU's float64: ``python -m benchmarks.gpu_check --device cuda``.

Kernels of small models in float32 and float64, Lanczos without synchronisation, peak memory against
the plan, and seconds. Needs the repository and what the package imports, no test tool, no download.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectralshell
from spectralshell import ShellEnergyEstimator, Snapshot
from spectralshell.krylov import block_lanczos_recurrence, lanczos, lanczos_recurrence
from spectralshell.operators import build_exact_kernel, build_kernel

TOLERANCES = {
    ("matrix-free", torch.float64): 1e-10,
    ("matrix-free", torch.float32): 1e-4,
    ("exact", torch.float64): 1e-10,
    ("exact", torch.float32): 1e-5,
}
"""Relative Frobenius norm: what the tests ask of the CPU, a few hundred roundings."""

MEASURES = 1e-9
"""Relative, of sums over all shells in float64: those of the kernel, and an eigenproblem."""

PEAK = 1 / 0.85
"""Most of measured over planned memory: a limit is planned with 15 % to spare."""

N_STEPS = 30
BLOCK = 16
"""Columns of a wide block of products."""

MEGABYTE = 1e6


class Attention(nn.Module):
    """One block of a transformer: embeddings, layer normalisation, causal attention, an MLP."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.head = nn.Linear(width, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](h)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + mixed.transpose(1, 2).flatten(2)
        return self.head(h + self.mlp(self.norms[1](h)))


class BagOfTokens(nn.Module):
    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1).tanh())


class Recurrent(nn.Module):
    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.recurrent = nn.GRU(5, width, batch_first=True)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def perceptron(width: int, n_classes: int) -> nn.Module:
    layers = [nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, n_classes))


def convolutional(width: int, n_classes: int) -> nn.Module:
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Tanh()]
    layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.GELU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, n_classes)
    )


@dataclass(frozen=True)
class Case:
    """A model and a batch of random data, of the sizes asked for.

    Attributes
    ----------
    build : callable
        From width and number of classes to the model.
    sample : tuple of int
        Shape of a sample: numbers, or tokens below ``vocabulary``.
    widths : tuple of int
        For the comparison, for the clock.
    per_token : bool
        Whether there is a prediction for each token.
    meta : bool
        Whether the model runs without values.
    """

    build: Callable[[int, int], nn.Module]
    sample: tuple[int, ...]
    widths: tuple[int, int]
    vocabulary: int | None = None
    per_token: bool = False
    meta: bool = True

    def snapshot(self, n_samples: int, device: str, large: bool = False) -> Snapshot:
        """Return the same model and data for the same sizes, in float32."""
        n_classes = 10 if large else 5
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build(self.widths[large], n_classes)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
        shape = (n_samples, *self.sample)
        if self.vocabulary is None:
            inputs = torch.randn(shape, generator=generator)
        else:
            inputs = torch.randint(0, self.vocabulary, shape, generator=generator)
        rows = shape[:2] if self.per_token else shape[:1]
        labels = torch.randint(0, n_classes, rows, generator=generator)
        return Snapshot(model.to(device), inputs.to(device), labels.to(device))


CASES = {
    "mlp": Case(perceptron, (20,), (8, 256)),
    "cnn, batch norm": Case(convolutional, (3, 8, 8), (4, 32)),
    "attention, layer norm": Case(Attention, (6,), (8, 128), vocabulary=5, per_token=True),
    "embedding": Case(BagOfTokens, (7,), (8, 256), vocabulary=50),
    "gru": Case(Recurrent, (4, 5), (6, 64), meta=False),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; without a limit it is only told."""

    case: str
    what: str
    value: float
    unit: str
    limit: float | None = None
    note: str = ""

    @property
    def within(self) -> str:
        """``"yes"``, ``"NO"``, or nothing where there is no limit; NaN is outside."""
        if self.limit is None:
            return ""
        return "yes" if self.value <= self.limit else "NO"


def reference(snapshot: Snapshot) -> dict[str, Tensor]:
    """Compute e and M in float64 on the CPU by plain reverse mode, one row at a time."""
    model = copy.deepcopy(snapshot.model).cpu().double().eval()
    inputs, labels = snapshot.inputs.cpu(), snapshot.targets.cpu().flatten()
    outputs = model(inputs.double() if inputs.is_floating_point() else inputs)
    outputs = outputs.reshape(len(labels), -1)
    parameters, rows = list(model.parameters()), []
    for entry in outputs.flatten():
        gradient = torch.autograd.grad(entry, parameters, retain_graph=True)
        rows.append(torch.cat([part.flatten() for part in gradient]))
    jacobian = torch.stack(rows) / len(labels) ** 0.5
    error = F.one_hot(labels, outputs.shape[1]) - outputs.detach()
    return {"error": error.flatten() / len(labels) ** 0.5, "kernel": jacobian @ jacobian.T}


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference in the Frobenius norm, on the CPU in float64."""
    return float((found.detach().cpu().double() - expected).norm() / expected.norm())


def compare_kernels(name: str, case: Case, n_samples: int, device: str) -> Iterator[Row]:
    """Yield what both kernels differ from the reference, in both precisions."""
    snapshot = case.snapshot(n_samples, device=device)
    expected = reference(snapshot)
    columns = torch.randn(len(expected["error"]), 3, generator=torch.Generator().manual_seed(2))
    block = columns.double()
    for dtype in (torch.float64, torch.float32):
        short = str(dtype).removeprefix("torch.")
        free = build_kernel(snapshot, dtype=dtype)
        exact = build_exact_kernel(snapshot, dtype=dtype, layers="module")
        found = {
            "products": ("matrix-free", free.matmat(block), expected["kernel"] @ block),
            "kernel": ("matrix-free", free.to_dense(), expected["kernel"]),
            "matrix": ("exact", exact.matrix, expected["kernel"]),
            "sum of layers": ("exact", sum(exact.layers.values()), expected["kernel"]),
            "error": ("exact", exact.residual_vector, expected["error"]),
        }
        for what, (kind, value, truth) in found.items():
            limit = TOLERANCES[kind, dtype]
            note = free.rung if kind == "matrix-free" else ""
            yield Row(name, f"{kind} {what}, {short}", relative(value, truth), "", limit, note)
        scale = torch.linalg.matrix_norm(expected["kernel"], 2)
        for kind, kernel in (("matrix-free", free), ("exact", exact)):
            gap = torch.linalg.matrix_norm(kernel.to_dense().cpu() - expected["kernel"], 2) / scale
            note = f"the noise that it states is {kernel.noise:.1e}"
            yield Row(name, f"{kind} 2-norm, {short}", float(gap), "", kernel.noise, note)


def compare_measures(name: str, case: Case, n_samples: int, device: str) -> Iterator[Row]:
    """Yield how far sums over the shells of both solvers are from those of the CPU."""
    for solver in ("exact", "lanczos"):
        sums = []
        for place in (device, "cpu"):
            snapshot = case.snapshot(n_samples, device=place)
            estimator = ShellEnergyEstimator(solver=solver, n_steps=N_STEPS, dtype="float64")
            sums.append(estimator.fit([snapshot]).shells_[["energy", "dissipation"]].sum())
        for column in ("energy", "dissipation"):
            gap = abs(sums[0][column] / sums[1][column] - 1.0)
            yield Row(name, f"{solver} fit, {column}", float(gap), "", MEASURES)


def run_lanczos(name: str, case: Case, n_samples: int, device: str) -> Iterator[Row]:
    """Run both recurrences where a look at a value is an error; count steps that are missing."""
    watched = device if on_gpu(device) else "meta"
    if watched == "meta" and not case.meta:
        return
    # The first products on a card load its libraries, which synchronises.
    kernel = build_kernel(case.snapshot(n_samples, device=device), device=watched)
    start = kernel.residual_vector
    starts = torch.stack([start, start.flip(0)], dim=1)
    recurrences = {
        "lanczos": lambda n: lanczos_recurrence(kernel.matvec, start, n),
        "block lanczos": lambda n: block_lanczos_recurrence(kernel.matmat, starts, n),
    }
    for what, recur in recurrences.items():
        steps = min(N_STEPS, kernel.n // 2)
        recur(2)
        with no_synchronisation(watched):
            result = recur(steps)
        missing = steps * (1 if what == "lanczos" else 2) - result.basis.shape[1]
        yield Row(
            name, f"{what} without synchronising", float(missing), "steps missing", 0.0, watched
        )


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """Let anything that waits for a GPU raise; the meta device does so of itself."""
    if not on_gpu(device):
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure_memory(name: str, case: Case, size: dict[str, int], device: str) -> Iterator[Row]:
    """Yield the peak of a fit over its plan, on a GPU, and what the plan says elsewhere."""
    for solver in ("exact", "lanczos"):
        snapshot = case.snapshot(**size, device=device)
        estimator = ShellEnergyEstimator(solver=solver, n_steps=N_STEPS, dtype="float32")
        if not on_gpu(device):
            plan = int(estimator.fit([snapshot]).plan_[f"{solver}_memory"].max())
            note = f"plan {plan / MEGABYTE:.1f} MB; not measured"
            yield Row(name, f"{solver} fit, peak over plan", float("nan"), "", None, note)
            continue
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        plan = int(estimator.fit([snapshot]).plan_[f"{solver}_memory"].max())
        peak = torch.cuda.max_memory_allocated(device) - before
        note = f"plan {plan / MEGABYTE:.1f} MB, peak {peak / MEGABYTE:.1f} MB"
        yield Row(name, f"{solver} fit, peak over plan", peak / plan, "", PEAK, note)


def measure_seconds(
    name: str, case: Case, size: dict[str, int], device: str, repeats: int
) -> Iterator[Row]:
    """Yield the median seconds of a product, a block of products, Lanczos and an exact fit."""
    snapshot = case.snapshot(**size, device=device)
    kernel = build_kernel(snapshot)
    vector = kernel.residual_vector
    note = f"n = {kernel.n}, {kernel.n_parameters} parameters, float32, {kernel.rung}"
    block = vector[:, None].expand(-1, BLOCK).contiguous()
    calls: dict[str, Callable[[], object]] = {
        "a product": lambda: kernel.matvec(vector),
        f"a further block of {BLOCK} products": lambda: kernel.matmat(block),
        f"lanczos, {N_STEPS} steps": lambda: lanczos(kernel.matvec, vector, N_STEPS),
        "an exact fit": lambda: ShellEnergyEstimator(solver="exact").fit([fresh(snapshot)]),
    }
    for what, call in calls.items():
        yield Row(name, what, seconds_of(call, device, repeats), "s", None, note)


def fresh(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot without the measures that it remembers."""
    return Snapshot(snapshot.model, snapshot.inputs, snapshot.targets)


def seconds_of(call: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median seconds of a call that ran once before."""
    seconds = []
    for _ in range(repeats + 1):
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return float(pd.Series(seconds[1:]).median())


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if on_gpu(device):
        torch.cuda.synchronize(device)


def on_gpu(device: str) -> bool:
    """Tell whether a device is one that torch.cuda speaks for."""
    return torch.device(device).type == "cuda"


def environment(device: str) -> dict[str, str]:
    """What the figures depend on beside the code."""
    card = torch.cuda.get_device_name(device) if on_gpu(device) else "no GPU: a dry run"
    return {
        "device": device,
        "card": card,
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "TF32 in convolutions": str(torch.backends.cudnn.allow_tf32),
        "spectralshell": spectralshell.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }


def check(device: str, quick: bool) -> list[Row]:
    """Run everything; what raises is a line of the table, too."""
    small, repeats = (4, 1) if quick else (12, 5)
    size = {"n_samples": 8} if quick else {"n_samples": 128, "large": True}
    rows: list[Row] = []
    parts: list[tuple[str, Callable[[str, Case], Iterator[Row]]]] = [
        ("kernels", lambda name, case: compare_kernels(name, case, small, device)),
        ("measures", lambda name, case: compare_measures(name, case, small, device)),
        ("recurrences", lambda name, case: run_lanczos(name, case, 2 * small, device)),
        ("memory", lambda name, case: measure_memory(name, case, size, device)),
        ("seconds", lambda name, case: measure_seconds(name, case, size, device, repeats)),
    ]
    for part, work in parts:
        for name, case in CASES.items():
            try:
                rows.extend(work(name, case))
            except Exception as error:  # the others are still worth knowing
                note = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                rows.append(Row(name, f"{part}: raised", float("nan"), "", 0.0, note))
    return rows


def as_frame(rows: list[Row]) -> pd.DataFrame:
    """Return the table, one row a line."""
    return pd.DataFrame([asdict(row) | {"within": row.within} for row in rows])


def as_markdown(frame: pd.DataFrame) -> str:
    """Return a frame as a table of Markdown, numbers with three digits."""
    shown = frame.map(
        lambda v: ("" if pd.isna(v) else f"{v:.3g}") if isinstance(v, float) else str(v)
    )
    lines = [list(frame.columns), ["---"] * len(frame.columns), *shown.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |".replace("None", "") for line in lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Check a device, write the tables; return 1 where a line is outside its tolerance."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=default, help=f"default here: {default}")
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder for tables")
    parser.add_argument("--quick", action="store_true", help="smaller batches, one repetition")
    options = parser.parse_args(arguments)

    warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", DeprecationWarning)
    began = time.perf_counter()
    frame = as_frame(check(options.device, options.quick))
    about = environment(options.device) | {"seconds": f"{time.perf_counter() - began:.0f}"}
    known = pd.DataFrame({"what": about.keys(), "value": about.values()})

    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "gpu_check.csv", index=False)
    known.to_csv(options.out / "environment.csv", index=False)
    page = f"{as_markdown(known)}\n{as_markdown(frame)}"
    (options.out / "gpu_check.md").write_text(page, encoding="utf-8")
    with pd.option_context(
        "display.max_rows", None, "display.width", 200, "display.max_colwidth", 80
    ):
        print(known.to_string(index=False))
        print(frame.to_string(index=False, na_rep="", float_format="{:.3g}".format))
    n_outside = int((frame["within"] == "NO").sum())
    n_limits = int((frame["within"] != "").sum())
    print(f"{n_limits - n_outside} of {n_limits} comparisons within their tolerances")
    return int(n_outside > 0)


if __name__ == "__main__":
    sys.exit(main())
