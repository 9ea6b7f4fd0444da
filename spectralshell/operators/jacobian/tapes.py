"""Linear maps replayed from the operations that computed them once.

A tangent is sent through a computation while every operation of torch is watched. Those that depend
on the tangent are kept, everything else has become a constant. What remains is the linear map
alone: no forward pass, no graph to walk, and nothing that its result does not need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from spectralshell.models.function import Parameters

_SHAPE_QUESTIONS = frozenset(
    {torch.ops.aten.is_same_size.default, torch.ops.aten._has_same_storage_numel.default}
)
"""What may be asked of a tangent and answered without a tensor: nothing about its values."""

_REPLAYED_AS = {torch.ops.aten.view.default: torch.ops.aten.reshape.default}
"""A block of tangents may lie in memory in an order that has no view of the shape."""

_IN_PLACE = {
    getattr(torch.ops.aten, name).Tensor: getattr(torch.ops.aten, f"{name}_").Tensor
    for name in ("add", "sub", "mul", "div")
}
"""Taken where a tape has no further use for the first operand: new memory costs more than sums."""


class TapeError(RuntimeError):
    """A computation cannot be replayed as a linear map of its tangents."""


@dataclass
class _Step:
    """One operation: constants in place, numbers of slots beside them."""

    operation: Any
    arguments: list[Any]
    structure: TreeSpec
    sources: list[tuple[int, int]]
    results: list[int | None]
    reads: set[StorageWeakRef]
    writes: set[StorageWeakRef]
    fits: bool
    expired: tuple[int, ...] = ()
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        # Most calls are a row of arguments, which needs no rebuilding of nested lists.
        self.plain = self.structure == tree_flatten((tuple(self.arguments), {}))[1]

    def run(self, slots: list[Any]) -> None:
        arguments = self.arguments.copy()
        for position, slot in self.sources:
            arguments[position] = slots[slot]
        if self.plain:
            returned = self.operation(*arguments)
        else:
            positional, named = tree_unflatten(arguments, self.structure)
            returned = self.operation(*positional, **named)
        tensors = (returned,) if isinstance(returned, Tensor) else tree_flatten(returned)[0]
        for result, tensor in zip(self.results, tensors, strict=True):
            if result is not None:
                slots[result] = tensor
        for slot in self.expired:
            slots[slot] = None


class Tape:
    """A linear map of tensors, recorded while ``compute`` mapped some tangents once.

    TapeError where it looks at values of a tangent, writes one into a constant, or does not use it.
    """

    def __init__(self, compute: Callable[..., Tensor], tangents: Parameters) -> None:
        recorder = _Recorder(tangents)
        with recorder:
            result = compute(*tangents)
        found = recorder.slots.get(result)
        if found is None:
            raise TapeError("the result does not depend on the tangents")
        self._result: int = found
        self._n_slots = recorder.n_slots
        self._steps = _needed(recorder.steps, _storage(result))
        self._plan_release()
        self._reuse_memory(recorder.slots_alone())

    def __call__(self, *tangents: Tensor) -> Tensor:
        """Return the image of tangents."""
        slots: list[Any] = [*tangents, *[None] * (self._n_slots - len(tangents))]
        with torch.no_grad():
            for step in self._steps:
                step.run(slots)
        image: Tensor = slots[self._result]
        return image

    def __len__(self) -> int:
        return len(self._steps)

    def _plan_release(self) -> None:
        last: dict[int, int] = {}
        for number, step in enumerate(self._steps):
            used = [slot for _, slot in step.sources] + [s for s in step.results if s is not None]
            last.update(dict.fromkeys(used, number))
            step.reads, step.writes = set(), set()
        last.pop(self._result, None)
        for slot, number in last.items():
            self._steps[number].expired += (slot,)

    def _reuse_memory(self, alone: set[int]) -> None:
        # What no tangent went into has no block dimension, and cannot take one.
        made = {slot for step in self._steps if step.sources for slot in step.results}
        for step in self._steps:
            first = [slot for position, slot in step.sources if position == 0]
            uses = [slot for _, slot in step.sources]
            if (
                step.operation in _IN_PLACE
                and step.fits
                and first
                and first[0] in step.expired
                and first[0] in alone & made
                and uses.count(first[0]) == 1
            ):
                step.operation = _IN_PLACE[step.operation]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what depends on the tangents, by the storage of what an operation reads and writes.

    References are weak: what autograd would free is freed, and no address is taken for another's.
    """

    def __init__(self, tangents: Parameters) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
        self.slots: Any = WeakIdKeyDictionary()
        self.n_slots = 0
        self._residents: dict[StorageWeakRef, set[int]] = {}
        for tangent in tangents:
            self._new_slot(tangent)
        self._given = {_storage(tangent) for tangent in tangents}
        self._linear = set(self._given)
        # Blank tensors made by an operation without tensors, in case a tangent is written to them.
        self._blank: dict[StorageWeakRef, list[tuple[Any, list[Any], TreeSpec, list[Any]]]] = {}
        self._captured: dict[StorageWeakRef, list[tuple[list[Any], int]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments, structure = tree_flatten((args, kwargs or {}))
        read = {_storage(a) for a in arguments if isinstance(a, Tensor)}
        overwritten = {_storage(t) for t in _overwritten(func, args, kwargs or {})}
        if not overwritten.isdisjoint(self._given):
            raise TapeError(f"{func} overwrites an argument")
        for storage in overwritten - self._linear:
            self._copy_captured(storage)
        returned = func(*args, **(kwargs or {}))
        results = tree_flatten(returned)[0]
        tensors = [r for r in results if isinstance(r, Tensor)]
        written = {_storage(t) for t in tensors} | overwritten
        call = (func, arguments, structure, results)
        if read.isdisjoint(self._linear):
            self._note_blank(call, read, written)
            return returned
        if not tensors and not overwritten:
            if func not in _SHAPE_QUESTIONS:
                raise TapeError(f"{func} looks at the values of a tangent")
            return returned
        for storage in overwritten - self._linear:
            if storage not in self._blank:
                raise TapeError(f"{func} writes a tangent into a constant")
            self._linear.add(storage)
            for earlier in self._blank.pop(storage):
                self._keep(*earlier, {storage})
        self._linear |= written
        self._keep(*call, written)
        return returned

    def _note_blank(
        self, call: Any, read: set[StorageWeakRef], written: set[StorageWeakRef]
    ) -> None:
        if not read and len(written) == 1:
            self._blank[next(iter(written))] = [call]
            return
        for storage in written:
            if storage in self._blank:
                self._blank[storage].append(call)

    def _keep(
        self, func: Any, arguments: list[Any], structure: TreeSpec, results: list[Any], writes: Any
    ) -> None:
        constants, sources = list(arguments), []
        for position, argument in enumerate(arguments):
            if not isinstance(argument, Tensor):
                continue
            storage = _storage(argument)
            if storage not in self._linear:
                self._captured.setdefault(storage, []).append((constants, position))
                continue
            slot = self.slots.get(argument)
            if slot is None:
                raise TapeError(f"{func} reads a tangent that no operation made")
            constants[position] = None
            sources.append((position, slot))
        numbers = [self._new_slot(r) if isinstance(r, Tensor) else None for r in results]
        reads = {_storage(arguments[position]) for position, _ in sources}
        operation = _REPLAYED_AS.get(func, func)
        fits = bool(results) and _alike(arguments[0], results[0])
        self.steps.append(
            _Step(operation, constants, structure, sources, numbers, reads, set(writes), fits)
        )

    def slots_alone(self) -> set[int]:
        """Return the slots whose memory no other slot sees."""
        crowds = [c for storage, c in self._residents.items() if storage not in self._given]
        return {slot for crowd in crowds if len(crowd) == 1 for slot in crowd}

    def _new_slot(self, tensor: Tensor) -> int:
        slot: int = self.slots.setdefault(tensor, self.n_slots)
        self.n_slots += slot == self.n_slots
        self._residents.setdefault(_storage(tensor), set()).add(slot)
        return slot

    def _copy_captured(self, storage: StorageWeakRef) -> None:
        for constants, position in self._captured.pop(storage, []):
            constants[position] = constants[position].clone()


def _needed(steps: list[_Step], result: StorageWeakRef) -> list[_Step]:
    """Drop steps that the result does not use: derivatives may compute more than is asked for."""
    wanted, kept = {result}, []
    for step in reversed(steps):
        if not step.writes.isdisjoint(wanted):
            wanted |= step.reads
            kept.append(step)
    return kept[::-1]


def _overwritten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    schema = func._schema
    if not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            found.extend(t for t in tree_flatten(given)[0] if isinstance(t, Tensor))
    return found


def _alike(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    )


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
