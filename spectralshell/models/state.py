"""Model states: copied from a model, or read from a checkpoint and matched to a model by name."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spectralshell.models.guard import exclusive

_MAX_NAMES = 5

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")

_NESTED_KEYS = ("model_state_dict", "state_dict", "model")


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
    ) -> None:
        self.tensors = tensors
        self.trainable = frozenset(trainable)
        self.unsaved = unsaved or {}
        self.path = path
        # A file overwritten later is an error, not a silent change of the measurement.
        self.stamp = _file_stamp(path) if path is not None else None

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
            return cls(tensors=copies, trainable=trainable)
        if isinstance(state, (str, os.PathLike)):
            path = os.path.abspath(os.fspath(state))
            if not os.path.isfile(path):
                raise FileNotFoundError(f"state: there is no checkpoint file at {path!r}.")
            return cls(path=path, trainable=trainable, unsaved=_unsaved_buffers(model))
        raise TypeError(
            "state must be None, a mapping of names to tensors, or the path of a checkpoint, got "
            f"{type(state).__name__}."
        )

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
    model: nn.Module, tensors: Mapping[str, Any], source: str = "the mapping"
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors in the model's dtypes, each tied one once, by its first name.

    Any of its names is enough. Buffers that a model does not save come from the model.
    """
    available = _strip_prefixes(_tensors_of(tensors, source), model)
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
        if value.shape != own.shape:
            wrong_shapes.append(f"{present[0]} {tuple(value.shape)} instead of {tuple(own.shape)}")
            continue
        _check_tied_values(available, present, source)
        state[names[0]] = value.detach().to(own.dtype)
    unexpected = [key for key in available if key not in known and not key.endswith("_extra_state")]
    problems = [
        f"{label}: {_listed(items)}"
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
        if other is not first and not (
            other.shape == first.shape and torch.equal(other, first.to(other.device))
        ):
            raise ValueError(
                f"state: {names[0]!r} and {name!r} are one tied tensor in the model, but differ in "
                f"{source}; tie them in the checkpoint or untie them in the model."
            )


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file, or a pickled one that holds nothing but tensors, onto the CPU.

    Recognised by content; weights may be nested under a usual key of a pickled checkpoint.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"state: there is no checkpoint file at {str(file)!r}.")
    content = _read_safetensors(file) if _is_safetensors(file) else _read_pickle(file)
    return _tensors_of(content, f"the checkpoint {str(file)!r}")


def _is_safetensors(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(9)
    return file.suffix == ".safetensors" or head[8:9] == b"{"


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file, device="cpu")
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"state: the file {str(file)!r} is not a readable safetensors checkpoint ({error}); "
            "it may be corrupt or incomplete."
        ) from error


def _read_pickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        text = str(error)
        if "GLOBAL" in text or "global" in text:
            raise ValueError(
                f"state: the checkpoint {str(file)!r} holds Python objects besides tensors, and "
                "loading them could run any code, so it is refused. Save model.state_dict() alone, "
                f"or a safetensors file. ({_first_global(text)})"
            ) from error
        raise ValueError(
            f"state: the file {str(file)!r} is not a readable checkpoint ({_first_line(text)}); it "
            "may be corrupt or incomplete."
        ) from error


def _tensors_of(content: Any, source: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in _NESTED_KEYS:
            if isinstance(content.get(key), Mapping):
                return _tensors_of(content[key], source)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"state: {source} holds no mapping of names to tensors; save model.state_dict()."
        )
    tensors = {
        str(name): value
        for name, value in content.items()
        if isinstance(value, Tensor) or not str(name).endswith("_extra_state")
    }
    foreign = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(
            f"state: {source} holds entries that are not tensors: {_listed(foreign)}; save "
            "model.state_dict() alone."
        )
    return tensors


def _file_stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _listed(names: Iterable[str]) -> str:
    items = list(names)
    more = f" and {len(items) - _MAX_NAMES} more" if len(items) > _MAX_NAMES else ""
    return ", ".join(items[:_MAX_NAMES]) + more


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no further detail"


def _first_global(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "GLOBAL" in line]
    return lines[0] if lines else _first_line(text)


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
