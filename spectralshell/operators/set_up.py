"""Findings of a whole set-up that hold for the next snapshots of the model.

That nothing is kept of other weights, which rung works, that reverse mode is the derivative, and
that one product shows the rounding of all: these follow from the model's code and settings, shapes
and dtypes. What values can change is looked at in every snapshot.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectralshell.models.fingerprint import model_digest, value_digest
from spectralshell.models.function import ModelFunction
from spectralshell.residuals import Residual

_MOST = 256
"""Set-ups that are remembered, a few numbers each; those used last."""

_SETTLED: OrderedDict[tuple[Any, ...], SetUp] = OrderedDict()


@dataclass(frozen=True)
class SettledRung:
    """The rung that passed the whole test, and what was found beside it."""

    name: str
    refused: Mapping[str, str]
    reads_model: bool


@dataclass
class SetUp:
    """What is settled so far; shared by the snapshots that have its key."""

    # Whether labels were read as the model's own loss reads them.
    has_own_loss: bool = False
    # What the model keeps and reads that is no function of its weights, by module and attribute,
    # and the number of samples that show what it reads.
    examined: set[tuple[str, str]] = field(default_factory=set)
    read_on: int | None = None
    # Of the comparison that showed that outputs change as J says, and whether it was clear.
    telling_step: float | None = None
    tells_clearly: bool = True
    # By whether graphs are recorded anew for each product.
    rungs: dict[bool, SettledRung] = field(default_factory=dict)


def set_up_of(
    function: ModelFunction,
    residual: Residual,
    inputs: Any,
    targets: Any,
    *,
    chunk_size: int | None,
    class_axis: int | None,
) -> SetUp:
    """Return what is settled for a model, shapes and settings; nothing of it for new ones."""
    key = (
        model_digest(function.model),
        tuple(function.names),
        _form(function.state()),
        value_digest(residual) if residual.is_callable else residual.name,
        _form(inputs),
        _form(targets),
        *(chunk_size, class_axis, function.device, function.dtype, torch.get_default_dtype()),
    )
    found = _SETTLED.setdefault(key, SetUp())
    _SETTLED.move_to_end(key)
    while len(_SETTLED) > _MOST:
        _SETTLED.popitem(last=False)
    return found


def forget_set_ups() -> None:
    """Let every model be looked at as a whole again, whatever was measured before."""
    _SETTLED.clear()


def _form(value: Any) -> Any:
    """Return the shapes and dtypes of tensors, and how they are nested."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, Mapping):
        return tuple((key, _form(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(map(_form, value))
    return value_digest(value)
