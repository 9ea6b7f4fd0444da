"""Model states: copied from a model, or read from a checkpoint and matched to a model by name."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spectralshell.models.checkpoints import hub
from spectralshell.models.checkpoints.adapters import AdapterFolder
from spectralshell.models.checkpoints.folders import Source
from spectralshell.models.checkpoints.opened import as_checkpoint, open_checkpoint, stamp
from spectralshell.models.checkpoints.places import find_path
from spectralshell.models.checkpoints.request import Checkpoint
from spectralshell.models.guard import exclusive
from spectralshell.models.matching import Matched, match
from spectralshell.models.ties import tied_groups


class ModelState:
    """A model state that several snapshots share: tensors in memory, or files read when needed."""

    def __init__(
        self,
        tensors: dict[str, Tensor] | None = None,
        checkpoint: Checkpoint | None = None,
        stamp: tuple[Any, ...] = (),
        trainable: Iterable[str] = (),
        unsaved: dict[str, Tensor] | None = None,
        narrow: Iterable[str] = (),
    ) -> None:
        self.tensors = tensors
        self.checkpoint = checkpoint
        # Files overwritten later are an error, not a silent change of the measurement.
        self.stamp = stamp
        # Half types of a checkpoint where the model's are wider.
        self.narrow = tuple(narrow)
        # All names of what requires gradients now.
        self.trainable = frozenset(trainable)
        # What is not in the files: buffers, or the base of an adapter.
        self.unsaved = unsaved or {}
        self._versions = self._present_versions()

    @property
    def path(self) -> str | None:
        """The file, folder or hub model that the state is read from; None for one in memory."""
        return None if self.checkpoint is None else str(self.checkpoint.path)

    @classmethod
    def from_argument(cls, model: nn.Module, state: Any) -> ModelState:
        """Build from a snapshot's ``state``: None, a mapping, a path, or a Checkpoint."""
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
            matched = match(model, state)
            # A state_dict aliases the live parameters: copy, or training would move the snapshot.
            copies = {name: tensor.clone() for name, tensor in matched.state.items()}
            return cls(tensors=copies, trainable=trainable, narrow=matched.narrow)
        if isinstance(state, (str, os.PathLike, Checkpoint)):
            return cls._opened(model, as_checkpoint(state), trainable)
        raise TypeError(
            "state must be None, a mapping of names to tensors, or the path of a checkpoint, got "
            f"{type(state).__name__}."
        )

    @classmethod
    def _opened(cls, model: nn.Module, asked: Checkpoint, trainable: list[str]) -> ModelState:
        """Look at the header of a checkpoint; of a hub model that has to be fetched, later."""
        named = hub.named_by(asked)
        folder: str | None
        mark: Any = None
        if named is None:
            folder = find_path(str(asked.path))
            asked = replace(asked, path=folder)
        else:
            mark = hub.stamp(named)
            folder = hub.folder_of(mark)
        if folder is None:
            return cls(None, asked, mark, trainable, _unsaved_buffers(model))
        source = open_checkpoint(folder, asked.key)
        matched = _match(model, source, asked, "meta")
        rest = _base(model) if isinstance(source, AdapterFolder) else _unsaved_buffers(model)
        return cls(None, asked, mark or stamp(source), trainable, rest, matched.narrow)

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

    def __getstate__(self) -> dict[str, Any]:
        # Of a hub model they are known when it has been fetched; two states do not differ by that.
        found = self.checkpoint is not None and hub.named_by(self.checkpoint) is not None
        return vars(self) | ({"narrow": ()} if found else {})

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        # Version counters start anew in an unpickled tensor.
        self._versions = self._present_versions()

    def load(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state by canonical name; files are read anew at every call."""
        asked = self.checkpoint
        if self.tensors is not None or asked is None:
            return dict(self.tensors or {})
        named = hub.named_by(asked)
        if named is not None:
            with hub.fetched(named, self.stamp, asked.keep) as folder:
                return self._loaded(model, open_checkpoint(folder, asked.key), asked)
        path = str(asked.path)
        try:
            source = open_checkpoint(path, asked.key)
            before = stamp(source)
            loaded = self._loaded(model, source, asked) if before == self.stamp else {}
            unchanged = before == self.stamp == stamp(source)
        except OSError as error:
            raise ValueError(
                f"state: the checkpoint {path!r} cannot be read any more ({error})."
            ) from error
        if not unchanged:
            raise ValueError(
                f"state: the checkpoint {path!r} was changed after the snapshot was made; make the "
                "snapshot again."
            )
        return loaded

    def _loaded(self, model: nn.Module, source: Source, asked: Checkpoint) -> dict[str, Tensor]:
        matched = _match(model, source, asked, "cpu")
        self.narrow = matched.narrow
        if isinstance(source, AdapterFolder):
            return self.unsaved | matched.state
        return matched.state | self.unsaved


def _match(model: nn.Module, source: Source, asked: Checkpoint, device: str) -> Matched:
    tensors = source.tensors(device)
    header, partial = device == "meta", isinstance(source, AdapterFolder)
    with exclusive():
        if isinstance(source, AdapterFolder):
            tensors = source.named_for(model, tensors)
        return match(
            model, tensors, source.label, prefix=asked.prefix, header=header, partial=partial
        )


_Copies = weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]]

_bases, _buffers = _Copies(), _Copies()
"""Copies that all states read for a model share while it stays the same."""


def _base(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's state, on which an adapter is read."""
    return _shared(_bases, model, {names[0]: own.detach() for names, own in tied_groups(model)})


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = set(model.state_dict(keep_vars=True))
    own = {n[0]: own.detach() for n, own in tied_groups(model) if saved.isdisjoint(n)}
    return _shared(_buffers, model, own)


def _shared(copies: _Copies, model: nn.Module, present: dict[str, Tensor]) -> dict[str, Tensor]:
    known = copies.get(model)
    if known is None or not _equal(known, present):
        known = copies[model] = {name: tensor.clone() for name, tensor in present.items()}
    return known


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype
        and t.device == other[n].device
        and not t.is_meta
        and torch.equal(t, other[n])
        for n, t in one.items()
    )


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's parameters and buffers, each tied tensor once, under its first name."""
    with torch.inference_mode(False):  # its tensors could never take part in a derivative
        return {names[0]: tensor.detach().clone() for names, tensor in tied_groups(model)}


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
