"""Directions in the space of the weights, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from studies.residual.networks import N_CLASSES

Direction = Mapping[str, Tensor]


def gradient_flow(
    model: nn.Module, inputs: Tensor, targets: Tensor, residual: str
) -> dict[str, Tensor]:
    """Return minus the gradient of the residual's own loss.

    That of ``"cross-entropy"`` is the mean cross-entropy, that of ``"brier"`` ½ E ‖onehot − p‖².
    """
    parameters = dict(model.named_parameters())
    outputs = model(inputs)
    if residual == "cross-entropy":
        loss = cross_entropy(outputs, targets)
    else:
        error = one_hot(targets, N_CLASSES) - outputs.softmax(1)
        loss = 0.5 * error.square().sum(1).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {name: -g for name, g in zip(parameters, gradients, strict=True)}


def random_direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a Gaussian direction of norm 1 in float64."""
    drawn = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in model.named_parameters()
    }
    norm = norm_of(drawn)
    return {name: value / norm for name, value in drawn.items()}


def norm_of(tensors: Direction) -> float:
    """Return the 2-norm over all tensors."""
    return sum(float(t.detach().double().square().sum()) for t in tensors.values()) ** 0.5
