"""Train a network and keep its states at the start and at given losses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from studies.residual.files import write_atomically
from studies.residual.networks import Network

START = "start"
"""The time of the state before training."""


@dataclass(frozen=True)
class TrainingPlan:
    """How all networks are trained.

    Parameters
    ----------
    losses : tuple of float
        Training losses whose first passing is kept, falling.
    batch_size : int
    learning_rate, momentum : float
        Constant after a linear rise over ``warm_up`` steps; no weight decay.
    warm_up : int
    max_steps : int
        Training ends here if the last loss was not reached.
    check_every : int
        Steps between evaluations of the training loss.
    n_checked : int
        Fixed training images of that evaluation, the first ones.
    """

    losses: tuple[float, ...] = (1.5, 0.6)
    batch_size: int = 128
    learning_rate: float = 0.02
    momentum: float = 0.9
    warm_up: int = 20
    max_steps: int = 2500
    check_every: int = 10
    n_checked: int = 500

    @property
    def times(self) -> tuple[str, ...]:
        """Names of the states, in order."""
        return (START, *(f"loss {loss:g}" for loss in self.losses))


def state_path(folder: Path, network: Network, when: str) -> Path:
    """Return the file of a network's state."""
    return folder / network.name / f"{when.replace(' ', '-')}.safetensors"


def record_path(folder: Path, network: Network) -> Path:
    """Return the file that says what was reached, and that training ended."""
    return folder / network.name / "trained.json"


def read_record(folder: Path, network: Network) -> dict[str, Any] | None:
    """Return what training reached, or None if it has not ended."""
    path = record_path(folder, network)
    return json.loads(path.read_text()) if path.exists() else None


def train(
    network: Network,
    inputs: Tensor,
    targets: Tensor,
    plan: TrainingPlan,
    folder: Path,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train one network with momentum SGD, and write its states, losses and record.

    The training loss is the mean cross-entropy of the fixed images in eval mode. Normalisations use
    running statistics; before the first step these are set to those of the fixed images, as a
    network whose normalisations do nothing is not the one that is trained.
    """
    started = time.perf_counter()
    # A quarter faster; but with fewer than 8 channels, torch's gradients then corrupt memory.
    layout = torch.contiguous_format if network.width % 8 else torch.channels_last
    model = network.build().to(memory_format=layout)
    inputs = inputs.contiguous(memory_format=layout)
    fixed = inputs[: plan.n_checked], targets[: plan.n_checked]
    settle_statistics(model, fixed[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.learning_rate, momentum=plan.momentum)
    folder.joinpath(network.name).mkdir(parents=True, exist_ok=True)
    order = torch.Generator().manual_seed(network.seed)
    batches = _endless_batches(len(inputs), plan.batch_size, order)
    rows: list[dict[str, float]] = []
    states: dict[str, dict[str, float]] = {}
    tau = 0.0
    for step in range(plan.max_steps + 1):
        if step % plan.check_every == 0:
            loss, accuracy = evaluate(model, *fixed)
            rows.append({"step": step, "tau": tau, "loss": loss, "accuracy": accuracy})
            if report is not None and step % 100 == 0:
                report(f"{network.name} step {step}: {loss:.3f}")
            for when in _passed(plan, loss, step, states):
                states[when] = dict(rows[-1])
                _write_state(state_path(folder, network, when), model)
            if len(states) == len(plan.times):
                break
        if step == plan.max_steps:
            break
        rate = plan.learning_rate * min(1.0, (step + 1) / max(1, plan.warm_up))
        for group in optimizer.param_groups:
            group["lr"] = rate
        _descend(model, optimizer, inputs, targets, next(batches))
        tau += rate / (1.0 - plan.momentum)
    record = {
        "network": network.name,
        "states": states,
        "missed": [when for when in plan.times if when not in states],
        "steps": int(rows[-1]["step"]),
        "seconds": time.perf_counter() - started,
        "n_parameters": sum(p.numel() for p in model.parameters()),
    }
    losses = pd.DataFrame(rows)
    write_atomically(
        folder / network.name / "losses.csv", lambda path: losses.to_csv(path, index=False)
    )
    text = json.dumps(record, indent=1)
    write_atomically(record_path(folder, network), lambda path: path.write_text(text))
    return record


def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy in eval mode; the mode is put back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in inputs.split(250)])
    model.train(training)
    hits = (outputs.argmax(1) == targets).float().mean()
    return float(cross_entropy(outputs, targets)), float(hits)


def settle_statistics(model: nn.Module, inputs: Tensor) -> None:
    """Set the running statistics to those of these inputs."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(inputs)
    for layer, momentum in zip(layers, usual, strict=True):
        layer.momentum = momentum


def _descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    rows: Tensor,
) -> None:
    loss = cross_entropy(model(inputs[rows]), targets[rows])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _endless_batches(n: int, batch_size: int, generator: torch.Generator) -> Any:
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n - n % batch_size].split(batch_size)


def _passed(
    plan: TrainingPlan, loss: float, step: int, known: dict[str, dict[str, float]]
) -> Sequence[str]:
    """Return the times that this evaluation is the first of."""
    if step == 0:
        return [START]
    limits = zip(plan.times[1:], plan.losses, strict=True)
    return [when for when, limit in limits if when not in known and loss <= limit]


def _write_state(path: Path, model: nn.Module) -> None:
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, lambda part: save_file(state, part))
