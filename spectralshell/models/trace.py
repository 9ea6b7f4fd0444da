"""A forward pass watched module by module, to name the one at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from spectralshell.models.function import ModelFunction, map_tensors


def first_nonfinite_module(function: ModelFunction, parts: list[Any]) -> str:
    """Name the innermost module whose outputs stop being finite first."""
    for call in _trace(function, parts):
        if not call.finite:
            return call.name
    return "the outputs themselves"


def first_random_module(function: ModelFunction, parts: list[Any]) -> str:
    """Name the innermost module that gives two answers to one question."""
    for first, second in zip(_trace(function, parts), _trace(function, parts), strict=False):
        if first.inputs == second.inputs and first.outputs != second.outputs:
            return first.name
    return type(function.model).__name__


def _trace(function: ModelFunction, parts: list[Any]) -> list[_ModuleCall]:
    calls: list[_ModuleCall] = []

    def note(name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        calls.append(_ModuleCall(name, _fingerprint(inputs), _fingerprint(outputs)))

    with watching(function.model, note):
        for part in parts:
            function.evaluate(part)
    return calls


@dataclass(frozen=True)
class _ModuleCall:
    """Fingerprints of one module's inputs and outputs in one call."""

    name: str
    inputs: tuple[float, ...]
    outputs: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether all outputs are finite."""
        return all(value - value == 0.0 for value in self.outputs)


def _fingerprint(value: Any) -> tuple[float, ...]:
    sums: list[float] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            sums.extend((float(tensor.sum()), float(tensor.abs().sum())))
        return tensor

    map_tensors(note, getattr(value, "logits", value))
    return tuple(sums)


@contextmanager
def watching(model: nn.Module, note: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    """Call ``note(name, module, inputs, outputs)`` after every forward of a submodule.

    The hook is torch's global one, so the model's own hooks stay as they are.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if id(module) in names:
            note(describe(names[id(module)], module), module, inputs, outputs)

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def describe(name: str, module: nn.Module) -> str:
    """Return a module's name and type for messages."""
    return f"module {name!r} ({type(module).__name__})" if name else type(module).__name__
