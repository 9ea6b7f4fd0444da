"""Model states: copied from a model, or read from a checkpoint and matched to a model by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectralshell.models.checkpoints import (
    find_checkpoint,
    listed,
    read_checkpoint,
    read_header,
    tensors_of,
)
from spectralshell.models.guard import exclusive

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


class ModelState:
    """A model state that several snapshots share: tensors in memory, or a file read when needed.

    ``trainable``: all names of what requires gradients now. ``unsaved``: buffers not in a file.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor] | None = None,
        path: str | None = None,
        trainable: Iterable[str] = (),
        unsaved: dict[str, Tensor] | None = None,
        narrow: Iterable[str] = (),
    ) -> None:
        self.tensors = tensors
        # Half types of a checkpoint where the model's are wider.
        self.narrow = tuple(narrow)
        self.trainable = frozenset(trainable)
        self.unsaved = unsaved or {}
        self.path = path
        # A file overwritten later is an error, not a silent change of the measurement.
        self.stamp = _file_stamp(path) if path is not None else None
        self._versions = self._present_versions()

    @classmethod
    def from_argument(cls, model: nn.Module, state: Any) -> ModelState:
        """Build from the ``state`` argument of a snapshot: None, a mapping, or a path."""
        if isinstance(state, ModelState):
            return state
        with exclusive():
            return cls._read(model, state)

    @classmethod
    def _read(cls, model: nn.Module, state: Any) -> ModelState:
        _check_shared_memory(model)
        trainable = [
            name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
        ]
        if state is None:
            return cls(tensors=copy_state(model), trainable=trainable)
        if isinstance(state, Mapping):
            matched = match_state(model, state)
            # A state_dict aliases the live parameters: copy, or training would move the snapshot.
            copies = {name: tensor.clone() for name, tensor in matched.items()}
            return cls(tensors=copies, trainable=trainable, narrow=_narrow_types(model, state))
        if isinstance(state, (str, os.PathLike)):
            path = find_checkpoint(state)
            header = read_header(path)
            match_state(model, header, f"the checkpoint {path!r}", header=True)
            return cls(
                path=path,
                trainable=trainable,
                unsaved=_unsaved_buffers(model),
                narrow=_narrow_types(model, header),
            )
        raise TypeError(
            "state must be None, a mapping of names to tensors, or the path of a checkpoint, got "
            f"{type(state).__name__}."
        )

    def check_unchanged(self) -> None:
        """Raise ValueError naming a tensor that was written to; files are looked at when read."""
        for name, version in self._present_versions().items():
            if self._versions.get(name) != version:
                raise ValueError(
                    f"state: {name!r} was changed in place after the snapshot was made; write to a "
                    "copy of what load_state() returns, or make the snapshot again."
                )

    def _present_versions(self) -> dict[str, int]:
        named = self.tensors or {}
        return {name: -1 if t.is_inference() else t._version for name, t in named.items()}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        # Version counters start anew in an unpickled tensor.
        self._versions = self._present_versions()

    def load(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state by canonical name; a file is read anew at every call."""
        if self.tensors is not None:
            return dict(self.tensors)
        path = str(self.path)
        content = read_checkpoint(path)
        if _file_stamp(path) != self.stamp:
            raise ValueError(
                f"state: the checkpoint {path!r} was changed after the snapshot was made; make the "
                "snapshot again."
            )
        with exclusive():
            return match_state(model, content, f"the checkpoint {path!r}") | self.unsaved


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = set(model.state_dict(keep_vars=True))
    return {
        names[0]: own.detach().clone()
        for names, own in tied_groups(model)
        if saved.isdisjoint(names)
    }


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's parameters and buffers, each tied tensor once, under its first name."""
    with torch.inference_mode(False):  # its tensors could never take part in a derivative
        return {names[0]: tensor.detach().clone() for names, tensor in tied_groups(model)}


def match_state(
    model: nn.Module,
    tensors: Mapping[str, Any],
    source: str = "the mapping",
    *,
    header: bool = False,
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors in the model's dtypes, each tied one once, by its first name.

    Any of its names is enough. Unsaved buffers come from the model. A header has no values.
    """
    available = _strip_prefixes(tensors_of(tensors, source), model)
    saved = set(model.state_dict(keep_vars=True))
    state: dict[str, Tensor] = {}
    missing: list[str] = []
    wrong_shapes: list[str] = []
    known: set[str] = set()
    for names, own in tied_groups(model):
        known.update(names)
        present = [name for name in names if name in available]
        if not present:
            if saved.isdisjoint(names):
                state[names[0]] = own.detach().clone()
            else:
                missing.append(names[0])
            continue
        value = available[present[0]]
        _check_layout(f"state: {present[0]!r} in {source}", value, own, header)
        if value.shape != own.shape:
            wrong_shapes.append(f"{present[0]} {tuple(value.shape)} instead of {tuple(own.shape)}")
            continue
        _check_tied_values(available, present, source)
        state[names[0]] = _converted(f"state: {present[0]!r} in {source}", value.detach(), own)
    unexpected = [key for key in available if key not in known and not key.endswith("_extra_state")]
    problems = [
        f"{label}: {listed(items)}"
        for label, items in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("different shapes", wrong_shapes),
        )
        if items
    ]
    if problems:
        raise ValueError(
            f"state: {source} does not fit {type(model).__name__}; "
            + "; ".join(problems)
            + ". Pass a checkpoint of this architecture."
        )
    return state


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


def _narrow_types(model: nn.Module, tensors: Mapping[str, Any]) -> list[str]:
    """Return the floating types of a checkpoint that are narrower than the model's, by name."""
    available = _strip_prefixes(tensors_of(tensors, "the mapping"), model)
    own = {name: tensor.dtype for names, tensor in tied_groups(model) for name in names}
    found = {
        value.dtype
        for name, value in available.items()
        if name in own and value.is_floating_point() and value.dtype.itemsize < own[name].itemsize
    }
    # A checkpoint in single precision is what it is; half has lost digits that the model shows.
    return sorted(str(d).removeprefix("torch.") for d in found if d.itemsize < 4)


def _strip_prefixes(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    own = {name for names, _ in tied_groups(model) for name in names}
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPER_PREFIXES:
            wrapped = tensors and all(key.startswith(prefix) for key in tensors)
            if wrapped and not any(name.startswith(prefix) for name in own):
                tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
                stripped = True
    return tensors


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


def _file_stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and torch.compile wrappers.

    They scatter inputs or trace the forward pass; the bare module holds the same parameters.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


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


def _check_shared_memory(model: nn.Module) -> None:
    """Raise ValueError naming a parameter and what else lies in its memory, in another shape.

    Training moves both at once; to a kernel they would be apart.
    """
    by_storage: dict[Any, list[tuple[str, Tensor]]] = {}
    for (name, *_), tensor in tied_groups(model):
        if not tensor.is_meta and tensor.layout == torch.strided and tensor.numel():
            place = tensor.device, tensor.untyped_storage().data_ptr()
            by_storage.setdefault(place, []).append((name, tensor))
    for found in by_storage.values():
        for (one, a), (other, b) in _neighbours(found):
            if any(isinstance(t, nn.Parameter) for t in (a, b)) and _overlap(a, b):
                raise ValueError(
                    f"model: {one!r} of shape {tuple(a.shape)} and {other!r} of shape "
                    f"{tuple(b.shape)} share memory without being one parameter, so a kernel would "
                    "take them for independent. Register the same nn.Parameter in both places, or "
                    "use it twice in forward, for example as weight.t()."
                )


def _neighbours(
    found: list[tuple[str, Tensor]],
) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """Yield the pairs whose spans meet: a flat buffer may hold thousands of parameters."""
    ordered = sorted(found, key=lambda item: _span(item[1])[0])
    for position, item in enumerate(ordered):
        end = _span(item[1])[1]
        for other in ordered[position + 1 :]:
            if _span(other[1])[0] >= end:
                break
            yield item, other


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors whose spans meet have elements in the same place."""
    if a.dtype != b.dtype or all(_is_dense(t) for t in (a, b)):
        return True
    return bool(torch.isin(_places(a), _places(b)).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the bytes of the storage from the first element to behind the last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((length - 1) * stride for length, stride in steps)
    return int(tensor.storage_offset()) * tensor.itemsize, int(last + 1) * tensor.itemsize


def _is_dense(tensor: Tensor) -> bool:
    first, last = _span(tensor)
    return last - first == tensor.numel() * tensor.itemsize


def _places(tensor: Tensor) -> Tensor:
    """Return the position in the storage of every element."""
    places = torch.tensor(tensor.storage_offset())
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = places[..., None] + stride * torch.arange(length)
    return places.flatten()


def _identity(tensor: Tensor) -> Any:
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return id(tensor)  # no memory to compare
    place = (tensor.device, tensor.data_ptr())
    return (isinstance(tensor, nn.Parameter), *place, tensor.shape, tensor.stride(), tensor.dtype)
