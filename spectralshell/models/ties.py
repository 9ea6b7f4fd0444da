"""Names of parameters and buffers, those of one tensor together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def tied_groups(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Return the names of each parameter and buffer, tied ones together, with its tensor.

    Tied is what is one object, or another view of the same memory.
    """
    groups: dict[Any, tuple[list[str], Tensor]] = {}
    for named in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in named:
            if nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"model: {name!r} is a lazy parameter without a shape; run the model once on "
                    "data first."
                )
            groups.setdefault(_identity(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _identity(tensor: Tensor) -> Any:
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return id(tensor)  # no memory to compare
    place = (tensor.device, tensor.data_ptr())
    return (isinstance(tensor, nn.Parameter), *place, tensor.shape, tensor.stride(), tensor.dtype)
