"""The optimiser that a Trainer of transformers leaves in ``optimizer.pt``, by parameter name.

Its parameters are numbered through two groups, with and without weight decay, not in the order of
the model. Which is in which follows from the Trainer's own rule; shapes have to bear it out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectralshell.models.checkpoints.tensor_files import TensorFile
from spectralshell.models.optimizer_state import OptimizerState, settings_of

OPTIMIZER_FILE = "optimizer.pt"

_WITHOUT_DECAY = (
    # Since 4.51 or so, and before.
    (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"),
    (r"bias",),
)
"""What the names of parameters without weight decay hold, beside those of ``nn.LayerNorm``."""

Shapes = dict[Any, list[tuple[int, ...]]]


class TrainerOptimizer(OptimizerState):
    """The state of a Trainer's optimiser in its file; moments are read when they are asked for."""

    @classmethod
    def of(cls, model: nn.Module, path: str) -> TrainerOptimizer:
        """Match a file to a model; ValueError where names and shapes leave a doubt."""
        content = _content(path, "meta")
        names = group_names(model, content, path)
        groups = [settings_of(group) for group in content["param_groups"]]
        group_of = {name: position for position, own in enumerate(names) for name in own}
        return cls("", groups, group_of, path=os.path.abspath(path))

    def load(self) -> dict[str, dict[str, Tensor]]:
        """Return the moments by parameter name; the file is read anew at every call."""
        status = os.stat(str(self.path))
        if (status.st_size, status.st_mtime_ns) != self.stamp:
            raise ValueError(
                f"optimizer: {self.path!r} was changed after it was opened; make the snapshot "
                "again."
            )
        return self._named("cpu")

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return the shapes of all moments; values are not read."""
        return {
            name: {key: tuple(tensor.shape) for key, tensor in held.items()}
            for name, held in self._named("meta").items()
        }

    def _named(self, device: str) -> dict[str, dict[str, Tensor]]:
        content = _content(str(self.path), device)
        keys = [key for group in content["param_groups"] for key in group["params"]]
        state = content["state"]
        return {
            name: {part: t for part, t in state[key].items() if isinstance(t, Tensor)}
            for key, name in zip(keys, self.group_of, strict=True)
            if key in state
        }


def group_names(model: nn.Module, content: Mapping[str, Any], path: str) -> list[list[str]]:
    """Return the names of each group's parameters; ValueError if no order of a Trainer's fits."""
    groups = content["param_groups"]
    held = [list(group["params"]) for group in groups]
    if all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups]
    shapes = _shapes(content["state"])
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for order in _orders(model, list(named)):
        if _fits(order, held, named, shapes):
            return order  # the others have groups of other sizes
    raise ValueError(
        f"optimizer: {path!r} does not tell which parameter is which: its groups of "
        f"{', '.join(str(len(keys)) for keys in held)} parameters are not those that a Trainer "
        f"makes of {type(model).__name__}, or their shapes are not. Pass the optimiser itself, "
        "with its state loaded."
    )


def _orders(model: nn.Module, names: Sequence[str]) -> Iterable[list[list[str]]]:
    for patterns in _WITHOUT_DECAY:
        decayed = set(_decayed(model, [re.compile(pattern) for pattern in patterns]))
        both = [
            [name for name in names if name in decayed],
            [name for name in names if name not in decayed],
        ]
        yield both
        yield [own for own in both if own]
    yield [list(names)]


def _decayed(model: nn.Module, patterns: Sequence[re.Pattern[str]]) -> list[str]:
    """Return the parameters with weight decay, as ``get_parameter_names`` of transformers does."""

    def plain(name: str) -> bool:
        return not any(pattern.search(name.lower()) for pattern in patterns)

    found = [
        f"{name}.{inner}"
        for name, child in model.named_children()
        if not isinstance(child, nn.LayerNorm)
        for inner in _decayed(child, patterns)
        if plain(f"{name}.{inner}")
    ]
    return found + [name for name in model._parameters if plain(name)]


def _fits(
    order: Sequence[Sequence[str]],
    held: Sequence[Sequence[Any]],
    named: Mapping[str, Tensor],
    shapes: Shapes,
) -> bool:
    if [len(own) for own in order] != [len(keys) for keys in held]:
        return False
    pairs = [
        (key, name)
        for keys, own in zip(held, order, strict=True)
        for key, name in zip(keys, own, strict=True)
    ]
    return all(
        shape in ((), (1,), tuple(named[name].shape))
        for key, name in pairs
        for shape in shapes.get(key, [])
    )


def _shapes(state: Mapping[Any, Mapping[str, Any]]) -> Shapes:
    return {
        key: [tuple(value.shape) for value in held.values() if isinstance(value, Tensor)]
        for key, held in state.items()
    }


def _content(path: str, device: str) -> dict[str, Any]:
    content = TensorFile(path).content(device)
    if (
        not isinstance(content, Mapping)
        or not isinstance(content.get("state"), Mapping)
        or not isinstance(content.get("param_groups"), list)
    ):
        raise ValueError(f"optimizer: {path!r} is not the state_dict() of a torch optimiser.")
    return dict(content)


def n_steps_taken(path: str) -> int | None:
    """Return how many steps an optimiser counted; None where it does not count them."""
    try:
        # Mapped: of the values the counts alone are read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # of torch's format before 1.6
        content = _content(path, "cpu")
    counts = {int(held["step"]) for held in content["state"].values() if "step" in held}
    return max(counts) if counts else None
