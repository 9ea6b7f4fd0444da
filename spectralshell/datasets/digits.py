"""A small network learning scikit-learn's digits: real data that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from typing import Any

import numpy as np
import torch
from joblib import Memory
from sklearn.datasets import load_digits
from sklearn.utils import check_random_state
from torch import nn

from spectralshell.measurements.cache import resolve_memory
from spectralshell.parameter_checks import check_integer, check_option, check_real
from spectralshell.snapshots import Snapshot, make_snapshots

_LOSSES = ("mse", "brier", "cross-entropy")
_N_CLASSES = 10
_TRAINING_BATCH = 128


def load_digits_trajectory(
    *,
    n_snapshots: int = 8,
    n_batches: int = 8,
    batch_size: int = 64,
    hidden: Sequence[int] = (64, 64),
    loss: str = "mse",
    learning_rate: float = 0.1,
    max_iter: int = 3000,
    random_state: Any = 0,
    memory: Memory | str | PathLike[str] | None = None,
) -> list[Snapshot]:
    """Train a small network on the digits and return snapshots of its training.

    A perceptron (64 inputs, GELU hidden layers, 10 outputs, float64) is trained on the 1,797
    images of :func:`sklearn.datasets.load_digits` by plain stochastic gradient descent with a
    constant learning rate. Its state is kept at initialisation and at log-spaced steps, and each
    state is paired with the same disjoint probe batches, drawn from the training images.

    Parameters
    ----------
    n_snapshots : int, default=8
        Number of points of training, initialisation and last step included, at least 2.
    n_batches : int, default=8
        Number of probe batches.
    batch_size : int, default=64
        Images in a probe batch; ``n_batches * batch_size`` is at most 1,797.
    hidden : sequence of int, default=(64, 64)
        Widths of the hidden layers.
    loss : {"mse", "brier", "cross-entropy"}, default="mse"
        Training loss. The first is ½E‖y − f‖² with one-hot y, the second ½E‖y − softmax(z)‖²;
        measured with the residual of the same name, gradient flow on either obeys ė = −M e.
    learning_rate : float, default=0.1
        Step size η; a snapshot after k steps has ``tau`` = kη.
    max_iter : int, default=3000
        Number of training steps.
    random_state : int, RandomState instance or None, default=0
        Fixes the initial weights, the order of the images and the probe batches.
    memory : joblib.Memory, str or path, optional
        Where to keep the trained states, so that a second call does not train again.

    Returns
    -------
    list of Snapshot
        ``n_snapshots * n_batches`` snapshots, ordered by ``tau`` and then ``batch``; one model
        object and one copy of each state are shared.

    Raises
    ------
    ValueError, TypeError
        If a parameter is out of range; the message names it.

    Notes
    -----
    Training takes a few seconds on one core. The global random state of torch is not touched.

    Examples
    --------
    >>> from spectralshell.datasets import load_digits_trajectory
    >>> X = load_digits_trajectory(n_snapshots=3, n_batches=2, batch_size=16, max_iter=20)
    >>> [(round(s.tau, 3), s.batch) for s in X]
    [(0.0, 0), (0.0, 1), (0.1, 0), (0.1, 1), (2.0, 0), (2.0, 1)]
    """
    n_snapshots = check_integer("n_snapshots", n_snapshots, low=2)
    max_iter = check_integer("max_iter", max_iter, low=1)
    learning_rate = check_real("learning_rate", learning_rate, low=0.0, low_open=True)
    check_option("loss", loss, _LOSSES)
    if not isinstance(hidden, Sequence):
        raise TypeError(f"hidden must be a sequence of widths such as (64, 64), got {hidden!r}.")
    widths = tuple(check_integer("hidden", width, low=1) for width in hidden)
    images, labels = _digits()
    batches = _probe_batches(images, labels, n_batches, batch_size, random_state)

    steps = _log_spaced_steps(n_snapshots, max_iter)
    seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
    train = resolve_memory(memory).cache(_train)
    states = train(steps, widths, loss, learning_rate, seed)

    model = _perceptron(widths)
    snapshots: list[Snapshot] = []
    for step, arrays in zip(steps, states, strict=True):
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        snapshots += make_snapshots(model, batches, tau=step * learning_rate, state=state)
    return snapshots


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    data, target = load_digits(return_X_y=True)
    return torch.from_numpy(data / 16.0 - 0.3), torch.from_numpy(target)


def _probe_batches(
    images: torch.Tensor, labels: torch.Tensor, n_batches: int, batch_size: int, random_state: Any
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    n_batches = check_integer("n_batches", n_batches, low=1)
    batch_size = check_integer("batch_size", batch_size, low=1)
    if n_batches * batch_size > len(images):
        raise ValueError(
            f"n_batches * batch_size must be at most {len(images)}, the number of digits, "
            f"got {n_batches} * {batch_size}; lower one of them."
        )
    order = check_random_state(random_state).permutation(len(images))
    chunks = torch.from_numpy(order[: n_batches * batch_size]).split(batch_size)
    return [(images[rows], labels[rows]) for rows in chunks]


def _log_spaced_steps(n_snapshots: int, max_iter: int) -> list[int]:
    """Step 0 and ``n_snapshots - 1`` distinct steps, as near to log-spaced as integers allow."""
    if n_snapshots - 1 > max_iter:
        raise ValueError(
            f"n_snapshots must be at most max_iter + 1 = {max_iter + 1}, got {n_snapshots}; "
            "train for more steps or ask for fewer snapshots."
        )
    if n_snapshots == 2:
        return [0, max_iter]
    ideal = np.geomspace(1, max_iter, n_snapshots - 1)
    steps = [0]
    for position, value in enumerate(ideal):
        # Early ideal steps round to the same integer; the next free one keeps them distinct.
        latest = max_iter - (len(ideal) - 1 - position)
        steps.append(min(max(round(value), steps[-1] + 1), latest))
    return steps


def _perceptron(hidden: tuple[int, ...]) -> nn.Sequential:
    """Layers built on the meta device, since their constructors draw from the global generator."""
    widths = (64, *hidden, _N_CLASSES)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, device="meta", dtype=torch.float64), nn.GELU()]
    model = nn.Sequential(*layers[:-1]).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def _train(
    steps: list[int], hidden: tuple[int, ...], loss: str, learning_rate: float, seed: int
) -> list[dict[str, np.ndarray]]:
    """States (name → array) of the perceptron at the given steps."""
    images, labels = _digits()
    generator = torch.Generator().manual_seed(seed)
    model = _perceptron(hidden)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
    states = [_arrays(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps[-1] + 1):
        if len(order) < _TRAINING_BATCH:
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:_TRAINING_BATCH], order[_TRAINING_BATCH:]
        optimizer.zero_grad()
        _training_loss(loss, model(images[rows]), labels[rows]).backward()
        optimizer.step()
        if step in steps:
            states.append(_arrays(model))
    return states


def _training_loss(loss: str, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if loss == "cross-entropy":
        return nn.functional.cross_entropy(outputs, labels)
    prediction = outputs.softmax(1) if loss == "brier" else outputs
    onehot = nn.functional.one_hot(labels, _N_CLASSES).to(outputs.dtype)
    return 0.5 * (onehot - prediction).square().sum(1).mean()


def _arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
