"""The name of the module that cannot be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectralshell.models.function import ModelFunction, map_tensors
from spectralshell.models.trace import describe, watching
from spectralshell.operators.jacobian.ladder import DifferentiationError, climb


def name_offending_module(
    function: ModelFunction,
    inputs: Any,
    draw: Callable[[int], Tensor],
    *,
    attempt: Callable[..., object] = climb,
) -> str:
    """Name the innermost module for which ``attempt`` raises DifferentiationError, children first.

    Each is differentiated alone by its parameters and floating inputs, where the model calls it.
    """
    calls: list[tuple[str, nn.Module, Any]] = []

    def note(name: str, module: nn.Module, args: Any, outputs: Any) -> None:
        calls.append((name, module, map_tensors(Tensor.detach, args)))

    with watching(function.model, note):
        function.evaluate(inputs)

    with function.installed(function.parameters):
        for name, module, args in calls:
            if not _differentiable_alone(module, args, draw, attempt):
                return name
    return describe("", function.model)


def _differentiable_alone(
    module: nn.Module, args: Any, draw: Callable[[int], Tensor], attempt: Callable[..., object]
) -> bool:
    inputs = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    weights = dict(module.named_parameters())
    if not isinstance(args, tuple) or not (inputs or weights):
        return True
    own = tuple(tensor.detach().clone() for tensor in (*inputs, *weights.values()))

    def vector(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        filled = [
            next(given) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
        ]
        state = dict(zip(weights, given, strict=True))
        return _first_tensor(torch.func.functional_call(module, state, tuple(filled))).reshape(-1)

    try:
        attempt(vector, own, [str(index) for index in range(len(own))], draw)
    except DifferentiationError:
        return False
    except (ValueError, RuntimeError, TypeError):
        return True  # it cannot be called alone, which says nothing about its derivative
    return True


def _first_tensor(value: Any) -> Tensor:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.append(tensor)
        return tensor

    map_tensors(note, getattr(value, "logits", value))
    return found[0]
