"""What later snapshots of a model save: ``python -m benchmarks.set_up``.

Seconds of the first set-up of a matrix-free kernel, of the next ones at other states and batches,
and of a product; and of whole measurements of a run of checkpoints, beside their products alone.
Processor time on one thread, medians; only the ratios are results.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.networks_torch import initial_state, load_network
from benchmarks.problems import N_CLASSES, TOKENS_PER_SAMPLE, VOCABULARY, Problem
from spectralshell import ShellEnergyEstimator, Snapshot
from spectralshell.measurements import spectrum
from spectralshell.operators import build_kernel, exact_kernel
from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.set_up import forget_set_ups

PROBLEMS = (
    Problem("resnet", 64, 16),
    Problem("gpt-neox", 128, 8, "nll"),
    Problem("gpt-neox", 64, 8, "nll"),
)
CHECKPOINTS = Problem("gpt-neox", 64, 8, "nll")
"""The model of a run, of 0.2 million parameters."""

N_LATER = 4
CHANGE = 0.01
"""Of the parameters' size, from state to state."""


def batch_of(problem: Problem, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw inputs and labels."""
    if problem.network == "gpt-neox":
        shape = (problem.n_samples, TOKENS_PER_SAMPLE)
        return tuple(torch.randint(VOCABULARY, shape, generator=generator) for _ in range(2))
    images = torch.randn(problem.n_samples, 3, 32, 32, generator=generator)
    return images, torch.randint(N_CLASSES, (problem.n_samples,), generator=generator)


def states_of(model: nn.Module, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Yield states that drift, as checkpoints do."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = {name for name, _ in model.named_parameters()}
    while True:
        yield dict(state)
        for name in names & set(state):
            size = float(state[name].norm()) / state[name].numel() ** 0.5
            noise = torch.randn(state[name].shape, generator=generator)
            state[name] = state[name] + CHANGE * size * noise


def set_ups(problem: Problem) -> dict[str, Any]:
    """Time the first set-up, later ones and products."""
    forget_set_ups()
    generator = torch.Generator().manual_seed(0)
    model = load_network(problem, initial_state(problem))
    states = states_of(model, generator)
    seconds, products = [], []
    for _ in range(1 + N_LATER):
        snapshot = Snapshot(model, *batch_of(problem, generator), state=next(states))
        start = time.process_time()
        with build_kernel(snapshot, residual=problem.residual) as kernel:
            seconds.append(time.process_time() - start)
            start = time.process_time()
            kernel.matvec(kernel.residual_vector)
            products.append(time.process_time() - start)
    later = median(seconds[1:])
    return {
        "network": problem.network,
        "n_parameters": kernel.n_parameters,
        "n_outputs": kernel.n,
        "later_over_first": later / seconds[0],
        "first_in_products": seconds[0] / median(products),
        "later_in_products": later / median(products),
    }


def checkpoints(problem: Problem, solver: str, n_states: int, n_batches: int) -> dict[str, Any]:
    """Time a fit over states and batches, and its products, contractions, eigenproblems alone."""
    generator = torch.Generator().manual_seed(0)
    model = load_network(problem, initial_state(problem))
    batches = [batch_of(problem, generator) for _ in range(n_batches)]
    snapshots = [
        Snapshot(model, *pair, tau=float(tau), batch=position, state=state)
        for tau, state in zip(range(n_states), states_of(model, generator), strict=False)
        for position, pair in enumerate(batches)
    ]
    spent: list[float] = []
    with (
        timed(KernelOperator, "matvec", spent),
        timed(exact_kernel, "contract_layers", spent),
        timed(spectrum, "eigenmeasure", spent),
    ):
        start = time.process_time()
        estimator = ShellEnergyEstimator(residual=problem.residual, solver=solver).fit(snapshots)
        whole = time.process_time() - start
    return {
        "solver": f"{solver} ({', '.join(sorted(set(estimator.plan_['solver'])))})",
        "n_snapshots": len(snapshots),
        "n_outputs": int(estimator.plan_["n_outputs"].iloc[0]),
        "fit_over_products": whole / sum(spent),
    }


@contextmanager
def timed(home: Any, name: str, spent: list[float]) -> Iterator[None]:
    """Note the processor time of each call of a function."""
    plain: Callable[..., Any] = getattr(home, name)

    def call(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return plain(*args, **options)
        finally:
            spent.append(time.process_time() - start)

    setattr(home, name, call)
    try:
        yield
    finally:
        setattr(home, name, plain)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=3, help="checkpoints of the run")
    parser.add_argument("--batches", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(pd.DataFrame([set_ups(problem) for problem in PROBLEMS]).round(3).to_string(index=False))
    rows = [
        checkpoints(CHECKPOINTS, solver, options.states, options.batches)
        for solver in ("auto", "lanczos")
    ]
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
