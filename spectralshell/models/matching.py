"""Tensors of a checkpoint matched to a model by name, in its types."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectralshell.models.checkpoints.contents import tensors_of
from spectralshell.models.checkpoints.messages import listed
from spectralshell.models.names import ModelNames, named_as
from spectralshell.models.ties import tied_groups


@dataclass(frozen=True)
class Matched:
    """A state by the model's names, and the half types of what it was made from."""

    state: dict[str, Tensor]
    narrow: tuple[str, ...]


def match(
    model: nn.Module,
    tensors: Mapping[str, Any],
    source: str = "the mapping",
    *,
    prefix: str | None = None,
    header: bool = False,
    partial: bool = False,  # what is missing is left out
) -> Matched:
    """Return a checkpoint's tensors in the model's dtypes, each tied one once, by its first name.

    Any of its names is enough. Unsaved buffers come from the model. A header has no values.
    """
    names = ModelNames.of(model)
    available, advice = named_as(names, tensors_of(tensors, source), prefix, source)
    state: dict[str, Tensor] = {}
    wrong_shapes: list[str] = []
    narrow = set()
    for group, own in tied_groups(model):
        present = [name for name in group if name in available]
        if not present:
            if names.saved.isdisjoint(group) and not partial:
                state[group[0]] = own.detach().clone()
            continue
        value = available[present[0]]
        _check_layout(f"state: {present[0]!r} in {source}", value, own, header)
        if value.shape != own.shape:
            wrong_shapes.append(f"{present[0]} {tuple(value.shape)} instead of {tuple(own.shape)}")
            continue
        _check_tied_values(available, present, source)
        state[group[0]] = _converted(f"state: {present[0]!r} in {source}", value.detach(), own)
        if _is_narrow(value, own):
            narrow.add(str(value.dtype).removeprefix("torch."))
    missing, unexpected = names.misfit(available)
    problems = [
        f"{label}: {listed(items)}"
        for label, items in (
            ("missing keys", [] if partial else missing),
            ("unexpected keys", unexpected),
            ("different shapes", wrong_shapes),
        )
        if items
    ]
    if problems:
        raise ValueError(
            f"state: {source} does not fit {type(model).__name__}; "
            + "; ".join(problems)
            + f". {advice or 'Pass a checkpoint of this architecture.'}"
        )
    return Matched(state, tuple(sorted(narrow)))


def _is_narrow(value: Tensor, own: Tensor) -> bool:
    # A checkpoint in single precision is what it is; half has lost digits that the model shows.
    floating = value.is_floating_point() and value.dtype.itemsize < 4
    return floating and value.dtype.itemsize < own.dtype.itemsize


def _check_layout(what: str, value: Tensor, own: Tensor, header: bool) -> None:
    """Raise ValueError for a tensor that is not the dense array of numbers that the model has."""
    if value.is_nested or value.layout != torch.strided:
        raise ValueError(f"{what} is not dense ({value.layout}); pass a dense tensor.")
    if value.is_meta and not (header or own.is_meta):
        raise ValueError(f"{what} is on the meta device and holds no values; load them first.")


def _converted(what: str, value: Tensor, own: Tensor) -> Tensor:
    """Return a checkpoint's tensor in the dtype of the model's own; ValueError if it cannot be."""
    if value.is_quantized:  # its scale is in the tensor
        value = value.dequantize()
    if value.dtype == own.dtype:
        return value
    floating = value.is_floating_point() and value.dtype.itemsize > 1
    if own.is_floating_point() and not (floating or value.is_complex()):
        raise ValueError(
            f"{what} has dtype {value.dtype} where the model has {own.dtype}: what its numbers "
            "mean depends on a scale that is not known here. Convert it to floating numbers first, "
            "as the tool does that wrote it."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imaginary part, which is refused below
        converted = value.to(own.dtype)
    if own.is_floating_point() or own.is_complex():
        fits = own.is_complex() or not value.is_complex()
    else:
        fits = value.is_meta or torch.equal(converted.to(value.dtype), value)
    if not fits:
        raise ValueError(
            f"{what} has dtype {value.dtype} and values that do not fit into {own.dtype}, which "
            "the model has; save it in the model's type."
        )
    return converted


def _check_tied_values(available: Mapping[str, Tensor], names: list[str], source: str) -> None:
    first = available[names[0]]
    for name in names[1:]:
        other = available[name]
        if other.is_meta:  # a header
            continue
        if other is not first and not (
            other.shape == first.shape and torch.equal(other, first.to(other.device))
        ):
            raise ValueError(
                f"state: {names[0]!r} and {name!r} are one tied tensor in the model, but differ in "
                f"{source}; tie them in the checkpoint or untie them in the model."
            )
