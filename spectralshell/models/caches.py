"""Functions of the weights that a model keeps from earlier calls, found by taking them away.

What is read in a call beside state and inputs is emptied, at weights that were moved. If the model
fills it again, otherwise than at its own weights, it had computed with what belongs to others.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectralshell.models.function import ModelFunction
from spectralshell.models.guard import random_states
from spectralshell.models.holdings import Holdings, Kept, Link
from spectralshell.models.state import copy_state

_MOVE = 0.05
"""Of the size of each parameter."""

_SAME = 1e-5
"""Relative difference of outputs that a table computed anew, in another precision, may make."""

_MOST_GROUPS = 40

_ALONE = 3

_MODULE_FLAGS = frozenset(vars(nn.Module()))

_ORDINARY = ("torch.", "transformers.modeling_utils")
"""Modules whose methods of loading do nothing but to copy."""

_MOST_SWITCHES = 8
"""Flags of a module that are tried one by one."""


class StaleStateError(ValueError):
    """A model computes with what it kept from other weights than those asked for."""


def check_caches(
    function: ModelFunction, inputs: Any, examined: set[tuple[str, str]] | None = None
) -> bool:
    """Raise StaleStateError naming a module that computes with what it kept from other weights.

    True if it keeps what these samples do not make it read. ``examined`` is passed over, added to.
    """
    with function.guard():  # gradients stay enabled, for some models differentiate inside
        kept = Holdings(function.model).kept
        merged = list(_merged_modules(function.model))
        return _Search(function, inputs, kept).run(merged, set() if examined is None else examined)


def check_loading(function: ModelFunction, inputs: Any) -> None:
    """Raise StaleStateError where loading the state into the model would give other outputs.

    Cost: nothing for models that copy tensors on loading, else a copy and two calls.
    """
    loading = [name for name, m in function.model.named_modules() if _loads_otherwise(m)]
    if not loading:
        return
    try:
        loaded = copy.deepcopy(function.model).to(function.device, function.dtype).eval()
        loaded.load_state_dict(
            {name: tensor.clone() for name, tensor in function.state().items()}, strict=False
        )
    except Exception:  # what cannot be copied, or refuses to load, tells nothing
        return
    copied = ModelFunction(loaded, copy_state(loaded), [], function.device, function.dtype)
    with function.guard():
        differ = _differ(copied.evaluate(inputs), function.evaluate(inputs))
    if differ:
        name = loading[0]
        raise StaleStateError(
            f"model: {_named(name, type(function.model.get_submodule(name)))} computes something "
            "when a state is loaded, which putting tensors in place leaves out; load the state "
            "into the model, and make the snapshot without state=."
        )


def _loads_otherwise(module: nn.Module) -> bool:
    """Tell whether a module of the user does more on loading than to copy tensors."""
    if module._load_state_dict_post_hooks:
        return True
    methods = (type(module)._load_from_state_dict, type(module).load_state_dict, type(module).train)
    return any(not (method.__module__ or "").startswith(_ORDINARY) for method in methods)


def _merged_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the adapters that say of themselves that they are merged into their base."""
    for name, module in model.named_modules():
        if getattr(module, "merged", False) is True:
            yield name, module


@dataclass(frozen=True)
class _Run:
    """Outputs of one call, names of the state it read, and what then lay in some places."""

    outputs: Tensor
    names: frozenset[str]
    left: tuple[Any, ...] = ()
    # Whether all places hold something, and not what they held before.
    filled: bool = False
    changed: bool = False


class _Search:
    """Calls of one model at its weights and at others, with some of what it keeps taken away."""

    def __init__(self, function: ModelFunction, inputs: Any, kept: list[Kept]) -> None:
        self._function = function
        self._inputs = inputs
        self._here = function.state()
        self._there: dict[str, Tensor] = {}
        self._buffers = {
            id(module._buffers): f"{name}." if name else ""
            for name, module in function.model.named_modules()
        }
        self._modules = dict(function.model.named_modules())
        self._kept = kept
        self._own = {_place(p): name for name, p in function.model.named_parameters()}

    def run(self, merged: list[tuple[str, nn.Module]], examined: set[tuple[str, str]]) -> bool:
        """Raise for what is stale; return whether something was not read."""
        reading = _Reading()
        plain = self._call(self._here, reading=reading)
        for name, module in merged:
            own = {f"{name}.{key}" if name else key for key, _ in module.named_parameters()}
            unread = sorted((own & set(self._here)) - plain.names)
            if unread:
                raise StaleStateError(
                    f"model: {_named(name, type(module))} says that it is merged, and computes "
                    f"without {unread[0]!r}, whatever state is asked for; unmerge it before "
                    "measuring."
                )
        groups: dict[tuple[type, str], list[Kept]] = defaultdict(list)
        for kept in self._kept:
            if reading.saw(self._installed(kept)):
                groups[kept.kind, kept.label].append(kept)
                self._check_apart(kept)
        for place, name in self._own.items():
            if reading.saw_place(place):
                raise StaleStateError(
                    f"model: {type(self._function.model).__name__} reads the parameter {name!r} "
                    "by another way than its module, such as a list, a closure or "
                    "functools.partial, where no state reaches it; read it from the module in "
                    "forward."
                )
        some_unread = sum(map(len, groups.values())) < len(self._kept)
        groups = {key: g for key, g in groups.items() if not {_place_of(k) for k in g} <= examined}
        if not groups:
            return some_unread
        self._there = _moved(self._function, self._here)
        filled = self._call(self._there)
        apart = list(groups.values())
        # Constants without number are taken away together.
        rest = [kept for group in apart[_MOST_GROUPS:] for kept in group]
        for group in [*apart[:_MOST_GROUPS], *([rest] if rest else [])]:
            if torch.isfinite(filled.outputs).all():
                self._examine(group, filled, plain.names)
                examined.update(map(_place_of, group))
        return some_unread

    def _check_apart(self, kept: Kept) -> None:
        """Raise if what a model keeps and reads lies in the memory of one of its parameters."""
        if not isinstance(kept.value, Tensor):
            return
        name = self._own.get(_place(kept.value))
        if name is not None:
            raise StaleStateError(
                f"model: {_named(kept.module, kept.kind)} computes with {kept.label!r}, which "
                f"shares the memory of the parameter {name!r} without being it, so its part in the "
                "Jacobian is missing and no other state reaches it; use the parameter itself in "
                "forward, for example as weight.t()."
            )

    def _examine(self, group: list[Kept], filled: _Run, names: frozenset[str]) -> None:
        switches = () if isinstance(group[0].value, float) else self._switches(group)
        for position, take_away in enumerate([*self._ways(group), *switches]):
            alone = position < _ALONE
            try:
                emptied = self._call(self._there, take_away, group)
            except Exception:  # it cannot do without, or not so
                continue
            if not _differ(filled.outputs, emptied.outputs):
                if alone and emptied.filled:
                    return
                continue
            here = self._call(self._here, take_away, group)
            depends = emptied.changed and not _equal(emptied.left, here.left)
            # An optional constant is not filled again, and what is merged gives way to its parts.
            if depends or (alone and not emptied.filled and emptied.names - names):
                first = group[0]
                raise StaleStateError(
                    f"model: {_named(first.module, first.kind)} keeps {first.label!r}, a function "
                    "of its weights or of earlier inputs, and computes with it whatever state is "
                    "asked for; empty it before measuring (model.train() does so in many models, "
                    "else set it as it was before the first call)."
                )

    def _ways(self, group: list[Kept]) -> list[Callable[[], None]]:
        """Return the ways to take away what a model keeps and nothing else: ``_ALONE`` of them."""

        def remove() -> None:
            for kept in group:
                kept.path[-1].remove()

        def empty_whole() -> None:
            for kept in group:
                home = kept.path[0].read()
                kept.path[0].write(type(home)() if isinstance(home, (dict, list)) else None)

        return [partial(_empty, group), remove, empty_whole]

    def _switches(self, group: list[Kept]) -> Iterator[Callable[[], None]]:
        """Yield the same with a flag the other way or a count forgotten, and in training mode."""
        homes: list[Any] = [vars(self._modules[kept.module]) for kept in group]

        def switch(key: str) -> None:
            for home in homes:
                home[key] = not home[key] if isinstance(home[key], bool) else None

        flags = [
            key
            for key, value in homes[0].items()
            if type(value) in (bool, int) and key != "training" and key not in _MODULE_FLAGS
        ]
        for key in flags[:_MOST_SWITCHES]:

            def both(key: str = key) -> None:
                switch(key)
                _empty(group)

            yield partial(switch, key)
            yield both

        def train() -> None:
            for module in self._modules.values():
                module.__dict__["training"] = True

        yield train

    def _call(
        self,
        state: Mapping[str, Tensor],
        take_away: Callable[[], None] | None = None,
        group: list[Kept] | None = None,
        reading: _Reading | None = None,
    ) -> _Run:
        """Call the model with a state, after something was taken away, and put that back."""
        reading = reading or _Reading()
        group = group or []
        # Outer and inner: a container may be replaced, and a function may not be looked into.
        ends = {id(link): link for kept in group for link in (kept.path[0], kept.path[-1])}
        homes = list(ends.values())
        before = [link.read() for link in homes]
        values = [_values(value) for value in before]
        own = {self._buffer_name(kept.path[0]) for kept in group}
        carried = {name: tensor for name, tensor in state.items() if name not in own}
        function = self._function
        # All calls draw the same numbers, so that a table filled anew is the same table.
        with random_states(function.device), function.continued():
            try:
                if take_away is not None:
                    take_away()
                with reading:
                    outputs = function.outputs_at(carried, self._inputs).detach()
                left = [_values(link.read()) for link in homes]
            finally:
                for link, value in zip(homes, before, strict=True):
                    if link.read() is not value:
                        link.write(value)
        return _Run(
            outputs=outputs,
            names=frozenset(name for name, tensor in carried.items() if reading.saw(tensor)),
            left=tuple(value for part in left for value in part),
            filled=all(len(now) >= len(then) for now, then in zip(left, values, strict=True)),
            changed=any(
                now and not _equal(now, then) for now, then in zip(left, values, strict=True)
            ),
        )

    def _installed(self, kept: Kept) -> Any:
        name = self._buffer_name(kept.path[0])
        return kept.value if name is None else self._here[name]

    def _buffer_name(self, link: Link) -> str | None:
        prefix = self._buffers.get(id(link.home))
        return None if prefix is None else f"{prefix}{link.key}"


def _place_of(kept: Kept) -> tuple[str, str]:
    return kept.module, kept.label


def _empty(group: list[Kept]) -> None:
    for kept in group:
        kept.path[-1].write(None)


class _Reading(TorchDispatchMode):
    """Notes the memory that operations read; what holds no tensor always counts as read."""

    def __init__(self) -> None:
        super().__init__()
        self._places: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in _flat((args, kwargs or {})):
            if isinstance(value, Tensor):
                self._places.add(_place(value))
        return func(*args, **(kwargs or {}))

    def saw_place(self, place: int) -> bool:
        """Tell whether some memory was read."""
        return place in self._places

    def saw(self, value: Any) -> bool:
        """Tell whether a tensor's memory was read."""
        return not isinstance(value, Tensor) or _place(value) in self._places


def _place(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except RuntimeError:  # a sparse tensor has no storage
        return id(tensor)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for inner in value:
            yield from _flat(inner)
    else:
        yield value


def _values(value: Any, depth: int = 0) -> tuple[Any, ...]:
    """Return copies of the tensors, arrays and floats in a value."""
    if isinstance(value, Tensor):
        return (value.detach().clone(),)
    if isinstance(value, (np.ndarray, np.generic, float)):
        return (torch.as_tensor(np.array(value)),) if np.asarray(value).dtype != object else ()
    if depth > 4:
        return ()
    if hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        value = vars(value)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return tuple(found for inner in value for found in _values(inner, depth + 1))
    return ()


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x.double(), y.double(), rtol=_SAME, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    return not float((a - b).abs().max()) <= _SAME * float(a.abs().max())


def _moved(function: ModelFunction, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with all parameters moved, frozen ones too."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name for name, _ in function.model.named_parameters()}
    moved = dict(state)
    for name, tensor in state.items():
        if name in parameters and tensor.is_floating_point():
            size = float(tensor.norm()) / max(tensor.numel(), 1) ** 0.5 or 1.0
            numbers = torch.randn(tensor.shape, generator=generator).to(tensor)
            moved[name] = tensor + _MOVE * size * numbers
    return moved


def _named(name: str, kind: type) -> str:
    return f"module {name!r} ({kind.__name__})" if name else kind.__name__
