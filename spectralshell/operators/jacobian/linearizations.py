"""Products with a Jacobian and its transpose: the rungs of the ladder.

All share the pull-back u ↦ Jᵀu, which replays one recorded backward graph, and differ in the
push-forward t ↦ J t. Blocks have their columns along the first dimension.

A tape is the push-forward as a linear map alone: a tangent is sent through the computation while
every operation of torch is watched. Those that depend on the tangent are kept, everything else has
become a constant: no forward pass, no graph to walk, and nothing that its result does not need.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from spectralshell.models.function import Parameters, widen
from spectralshell.models.guard import quiet_differentiation

VectorFunction = Callable[..., Tensor]

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


_RANGE = {torch.float64: (1e-140, 1e140), torch.float32: (1e-36, 1e36)}
"""Of rates: squares are taken in float64, products of float32 keep their type."""


class IndependenceError(ValueError):
    """The residual does not depend on the parameters."""


class PullBack:
    """Jᵀ at a point along a recorded graph, by plain reverse mode: rungs are tested against it."""

    def __init__(self, function: VectorFunction, parameters: Parameters) -> None:
        self.function = function
        self.parameters = parameters
        self.leaves = tuple(parameter.detach().requires_grad_() for parameter in parameters)
        self._output: Tensor | None = None

    @property
    def output(self) -> Tensor:
        """The vector, with the graph that leads to it; recorded at first use."""
        if self._output is None:
            with torch.enable_grad():
                self._output = self.function(*self.leaves)
        return self._output

    def pull(self, cotangent: Tensor) -> Parameters:
        """Return Jᵀu for u of shape (n,): zero where the vector depends on no parameter."""
        if not self.output.requires_grad:
            return tuple(torch.zeros_like(p) for p in self.parameters)
        return self._grad(self.output, self.leaves, cotangent)

    def pull_block(self, cotangents: Tensor) -> Parameters:
        """Return Jᵀu for each row u of a block (k, n), stacked along the first dimension."""
        if not self.output.requires_grad:
            return tuple(p.new_zeros(len(cotangents), *p.shape) for p in self.parameters)
        return self._grad(self.output, self.leaves, cotangents, batched=True)

    @staticmethod
    def _grad(
        output: Any, inputs: Sequence[Tensor], cotangent: Any, *, batched: bool = False
    ) -> Parameters:
        with quiet_differentiation():
            found = torch.autograd.grad(
                output,
                inputs,
                cotangent,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        if all(part is not None for part in found):
            return found
        # torch would fill in zeros of one input for a block of cotangents.
        first = cotangent if isinstance(cotangent, Tensor) else cotangent[0]
        block = (first.shape[0],) if batched else ()
        return tuple(
            part if part is not None else point.new_zeros(block + point.shape)
            for part, point in zip(found, inputs, strict=True)
        )


class Linearization(PullBack, ABC):
    """Pull-back and push-forward: a rung of the ladder."""

    name: str
    calls_model = False
    """Whether a product evaluates the model anew, so that it has to be guarded."""

    @abstractmethod
    def push(self, tangents: Parameters) -> Tensor:
        """Return J t, shape (n,)."""

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J t for each of k stacked tangents, shape (k, n)."""
        block: Tensor = vmap(lambda *t: self.push(t))(*tangents)
        return block


Rung = Callable[[VectorFunction, Parameters], Linearization]


class LinearizedForward(Linearization):
    """Rung 1: forward mode once, on tape; a push-forward replays what depends on the tangent.

    It takes one jvp to make, where ``torch.func.linearize`` takes seconds to trace.
    """

    name = "linearize"

    def __init__(self, function: VectorFunction, parameters: Parameters) -> None:
        super().__init__(function, parameters)

        def compute(*tangents: Tensor) -> Tensor:
            pushed: Tensor = jvp(function, parameters, tangents)[1]
            return pushed

        with quiet_differentiation():
            self._tape = Tape(compute, tuple(torch.ones_like(p) for p in parameters))

    def push(self, tangents: Parameters) -> Tensor:
        """Return J t, shape (n,)."""
        return self._tape(*tangents)


class DoubleReverse(Linearization):
    """Rung 2: Jᵀu is linear in u, and J t is its transpose, by a second stored backward pass."""

    name = "double-vjp"

    def __init__(self, function: VectorFunction, parameters: Parameters) -> None:
        super().__init__(function, parameters)
        self._transposed: tuple[Tensor, tuple[Tensor, ...], list[int]] | None = None

    def push(self, tangents: Parameters) -> Tensor:
        """Return J t, shape (n,)."""
        return self._push(tangents, batched=False)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J t for each of k stacked tangents, shape (k, n)."""
        return self._push(tangents, batched=True)

    def _push(self, tangents: Parameters, *, batched: bool) -> Tensor:
        if self._transposed is None:
            self._transposed = self._record_transpose()
        dummy, pulled, active = self._transposed
        chosen = tuple(tangents[index] for index in active)
        return self._grad(pulled, (dummy,), chosen, batched=batched)[0]

    def _record_transpose(self) -> tuple[Tensor, tuple[Tensor, ...], list[int]]:
        with torch.enable_grad():
            dummy = torch.zeros_like(self.output).requires_grad_()
            pulled = torch.autograd.grad(
                self.output, self.leaves, dummy, create_graph=True, allow_unused=True
            )
        # Parameters that the output does not use have no gradient, and add nothing to J t.
        active = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        return dummy, tuple(pulled[index] for index in active), active


class ForwardMode(Linearization):
    """Rung 3: dual numbers through the model, one evaluation per product."""

    name = "jvp"
    calls_model = True

    def push(self, tangents: Parameters) -> Tensor:
        """Return J t, shape (n,)."""
        with quiet_differentiation():
            pushed: Tensor = jvp(self.function, self.parameters, tangents)[1]
        return pushed


STREAMED = " (streamed)"


class Streamed(Linearization):
    """Any rung without storage: graphs are recorded for one product and dropped.

    Used for chunks, whose graphs together would not fit in memory.
    """

    calls_model = True

    def __init__(
        self, name: str, rung: Rung, function: VectorFunction, parameters: Parameters
    ) -> None:
        super().__init__(function, parameters)
        self._rung = rung
        self.name = f"{name}{STREAMED}"

    def pull(self, cotangent: Tensor) -> Parameters:
        """Return Jᵀu for u of shape (n,)."""
        return self._fresh().pull(cotangent)

    def pull_block(self, cotangents: Tensor) -> Parameters:
        """Return Jᵀu for each row of a block (k, n)."""
        return self._fresh().pull_block(cotangents)

    def push(self, tangents: Parameters) -> Tensor:
        """Return J t, shape (n,)."""
        return self._fresh().push(tangents)

    def push_block(self, tangents: Parameters) -> Tensor:
        """Return J t for each of k stacked tangents, shape (k, n)."""
        return self._fresh().push_block(tangents)

    def _fresh(self) -> Linearization:
        return self._rung(self.function, self.parameters)


RUNGS: dict[str, type[Linearization]] = {
    rung.name: rung for rung in (LinearizedForward, DoubleReverse, ForwardMode)
}
"""The ladder, cheapest product first."""

STREAMED_RUNGS = ("jvp", "double-vjp")
"""Order for chunks: tracing a tangent map anew for each product would cost more than it saves."""


def record(
    name: str, rung: Rung, function: VectorFunction, parameters: Parameters, *, streamed: bool
) -> Linearization:
    """Return a rung at a point; streamed, it records anew for each product."""
    return Streamed(name, rung, function, parameters) if streamed else rung(function, parameters)


def check_depends(output: Tensor) -> None:
    """Raise ValueError if a vector does not depend on any parameter."""
    if not output.requires_grad:
        raise IndependenceError(
            "the residual does not depend on the selected parameters: the model's forward detaches "
            "its outputs, runs under no_grad, or differentiates without create_graph=True (some do "
            "so in eval mode alone), or `parameters=` selects unused ones."
        )


def check_finite_gradient(names: list[str], gradient: Parameters) -> None:
    """Raise ValueError naming the first parameter whose derivative is NaN or infinite."""
    for name, part in zip(names, gradient, strict=True):
        if not part.is_meta and not bool(torch.isfinite(part).all()):
            raise ValueError(
                f"model: the derivative with respect to {name!r} is NaN or infinite although the "
                "outputs are finite, for example from a root or a norm at 0, or from infinite "
                "inputs; change the data or the model there."
            )


def check_range(gradient: Parameters) -> None:
    """Raise ValueError if rates of the size of ‖Jᵀu‖² cannot be multiplied by each other."""
    if gradient[0].is_meta:
        return
    largest = max(float(widen(part).abs().max()) for part in gradient if part.numel())
    dtype = gradient[0].dtype
    low, high = _RANGE[dtype]
    if largest > 0.0 and not low < inner(gradient, gradient) < high:
        raise ValueError(
            f"model: its kernel has rates near 1e{round(2.0 * math.log10(largest)):+d}, and "
            f"products of rates are right in {str(dtype).removeprefix('torch.')} from {low:.0e} to "
            f"{high:.0e} alone; scale the outputs and targets by a factor, whose square the rates "
            "go with, or look whether the outputs saturate."
        )


def added(total: Parameters, more: Parameters) -> Parameters:
    """Return the sum of two tangents; nothing yet counts as zero."""
    return tuple(a + b for a, b in zip(total, more, strict=True)) if total else tuple(more)


def inner(a: Parameters, b: Parameters) -> float:
    """Return the inner product of two tangents, in float64."""
    terms = [(widen(x) * widen(y)).sum() for x, y in zip(a, b, strict=True)]
    return float(torch.stack(terms).sum())


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
