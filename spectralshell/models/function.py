"""A model as a pure function of its selected parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectralshell.models.guard import continued, guarded, renew
from spectralshell.models.state import unwrap
from spectralshell.models.ties import tied_groups

_MAX_NAMES = 8

Parameters = tuple[Tensor, ...]


class OutputKindError(TypeError):
    """The model returned something else than a tensor of outputs."""


class ModelFunction:
    """Outputs of a model as a function of its selected parameters, all else frozen.

    The model is shared and never changed: its tensors are exchanged for the time of a call.
    """

    def __init__(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        names: list[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = unwrap(model)
        self.names = names
        self.device = device
        self.dtype = dtype
        # Some models write to their weights and buffers while they run: let them have their own.
        moved = {name: cast(t.detach(), device, dtype).clone() for name, t in state.items()}
        self.parameters: Parameters = tuple(moved.pop(name) for name in names)
        self._constants = moved
        # Known once the model was called.
        self.gives_logits = False
        self._aliases = {group[0]: group for group, _ in tied_groups(self.model)}

    @property
    def n_parameters(self) -> int:
        """Number of selected scalars, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters)

    def positions(self) -> dict[str, int]:
        """Return the position of each selected parameter by name, tied ones by all their names."""
        return {
            alias: position
            for position, name in enumerate(self.names)
            for alias in self._aliases.get(name, [name])
        }

    def in_double(self) -> ModelFunction:
        """Return the same function at the same point, computed in float64."""
        return ModelFunction(self.model, self.state(), self.names, self.device, torch.float64)

    def at(self, parameters: Parameters) -> ModelFunction:
        """Return the same function with other values of the selected parameters."""
        state = dict(self._constants)
        state.update(zip(self.names, parameters, strict=True))
        return ModelFunction(self.model, state, self.names, self.device, self.dtype)

    def guard(self) -> AbstractContextManager[None]:
        """Return the context in which the model may be called."""
        return guarded(self.model, self.device)

    def continued(self) -> AbstractContextManager[None]:
        """Return the context in which a call finds what the one before has left."""
        return continued(self.model)

    def installed(self, parameters: Parameters | None = None) -> AbstractContextManager[None]:
        """Return the context in which the model carries the frozen state and ``parameters``.

        None: the frozen values, requiring gradients, for backward passes that evaluate it anew.
        """
        if parameters is None:
            parameters = tuple(p.detach().requires_grad_() for p in self.parameters)
        return self._carrying(dict(zip(self.names, parameters, strict=True)) | self._constants)

    def poisoned(self) -> AbstractContextManager[None]:
        """Return the context in which every floating tensor of the model is NaN."""
        named = dict(zip(self.names, self.parameters, strict=True))
        state = {name: _nan_like(tensor).requires_grad_() for name, tensor in named.items()}
        state.update({name: _nan_like(tensor) for name, tensor in self._constants.items()})
        return self._carrying(state)

    @contextmanager
    def _carrying(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Exchange the model's tensors, under all their names, for those of a state."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        exchanged: list[tuple[nn.Module, dict[str, Any], str, Tensor, Any]] = []
        for first, tensor in state.items():
            for alias in self._aliases.get(first, [first]):
                path, _, name = alias.rpartition(".")
                module = modules[path]
                home: dict[str, Any] = module._parameters
                if name not in home:
                    home = module._buffers
                exchanged.append((module, home, name, tensor, home[name]))
        try:
            for _, home, name, tensor, _ in exchanged:
                home[name] = tensor
            yield
        finally:
            for module, home, name, _, own in exchanged:
                vars(module).pop(name, None)  # a forward pass may have put another in front
                home[name] = own

    def evaluate(self, inputs: Any) -> Tensor:
        """Return the outputs at the function's own parameters, without a graph.

        Gradients stay enabled, for some models differentiate inside, a few by their parameters.
        """
        with torch.enable_grad():
            try:
                # Nothing requires gradients, so nothing is recorded.
                return self.outputs(self.parameters, inputs).detach()
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            leaves = tuple(p.detach().requires_grad_() for p in self.parameters)
            return self.outputs(leaves, inputs).detach()

    def outputs(self, parameters: Parameters, inputs: Any) -> Tensor:
        """Return the model's outputs, samples first: a tensor, or what is under ``.logits``."""
        return self._outputs(self.installed(parameters), inputs)

    def state(self) -> dict[str, Tensor]:
        """Return all tensors of the frozen state by name."""
        return dict(zip(self.names, self.parameters, strict=True)) | self._constants

    def outputs_at(self, state: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Return the outputs with tensors of another state; those it lacks are the model's own."""
        return self._outputs(self._carrying(state), inputs)

    def own_loss(self, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the loss that the model itself computes of labels, and its outputs; None if none.

        Without a graph.
        """
        with torch.no_grad():
            returned = self._call(self.installed(self.parameters), {**inputs, "labels": labels})
        loss, outputs = getattr(returned, "loss", None), getattr(returned, "logits", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not isinstance(outputs, Tensor):
            return None
        return loss.reshape(()), outputs

    def _call(self, installed: AbstractContextManager[None], inputs: Any) -> Any:
        # A model may write to its inputs: let it write to a copy.
        fresh = map_tensors(torch.clone, inputs)
        try:
            with installed:
                return _call(self.model, fresh)
        finally:
            renew(self.model)  # no call reads what another has cached

    def _outputs(self, installed: AbstractContextManager[None], inputs: Any) -> Tensor:
        returned = self._call(installed, inputs)
        self.gives_logits = not isinstance(returned, Tensor)
        outputs = getattr(returned, "logits", None) if self.gives_logits else returned
        if not isinstance(outputs, Tensor):
            raise OutputKindError(
                f"{type(self.model).__name__} returned {type(returned).__name__}: the outputs must "
                "be a tensor or an object with .logits; wrap the model in a module that picks one."
            )
        return outputs


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def _nan_like(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    # One number seen in every place: no memory.
    return torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def select_parameters(
    model: nn.Module, parameters: Any, trainable: Collection[str] | None = None
) -> list[str]:
    """Return the trainable parameters that None (all), an expression or a callable selects.

    Any name of a tied one selects it; it has the first. ``trainable``: by default those of now.
    """
    groups = [names for names, t in tied_groups(model) if isinstance(t, nn.Parameter)]
    if not groups:
        raise ValueError(
            f"model: {type(model).__name__} has no parameters, so its kernel is not defined."
        )
    if trainable is None:
        named = model.named_parameters(remove_duplicate=False)
        trainable = {name for name, parameter in named if parameter.requires_grad}
    candidates = [names for names in groups if not set(names).isdisjoint(trainable)]
    if not candidates:
        raise ValueError(
            f"model: all {len(groups)} parameters of {type(model).__name__} are frozen "
            "(requires_grad=False); unfreeze those to measure."
        )
    wanted = _name_filter(parameters)
    selected = [names[0] for names in candidates if any(wanted(name) for name in names)]
    if not selected:
        available = [names[0] for names in candidates]
        more = f" and {len(available) - _MAX_NAMES} more" if len(available) > _MAX_NAMES else ""
        raise ValueError(
            f"parameters={parameters!r} selects none of the trainable parameters: "
            f"{', '.join(available[:_MAX_NAMES])}{more}."
        )
    return selected


def _name_filter(parameters: Any) -> Callable[[str], bool]:
    if parameters is None:
        return lambda name: True
    if isinstance(parameters, str):
        try:
            pattern = re.compile(parameters)
        except re.error as error:
            raise ValueError(
                f"parameters={parameters!r} is not a regular expression: {error}."
            ) from error
        return lambda name: pattern.search(name) is not None
    if callable(parameters):
        return partial(_ask, parameters)
    raise TypeError(
        "parameters must be None, a regular expression, or a callable over names, got "
        f"{type(parameters).__name__}."
    )


def _ask(selects: Callable[[str], Any], name: str) -> bool:
    try:
        return bool(selects(name))
    except Exception as error:
        raise ValueError(
            f"parameters: the callable failed on the name {name!r} with {type(error).__name__}: "
            f"{error}; it takes a parameter's name and says whether it counts."
        ) from error


def cast(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a tensor to a device, floating ones in ``dtype``; never an inference tensor."""
    moved = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
    return moved.clone() if moved.is_inference() else moved


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has no float64."""
    if tensor.device.type == "mps":
        return tensor.cpu().double()
    return tensor.double()


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors inside a tensor, tuple, list or mapping."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map_tensors(function, item) for item in value)
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    return value


def iterate_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors inside a tensor, tuple, list or mapping."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from iterate_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from iterate_tensors(item)
