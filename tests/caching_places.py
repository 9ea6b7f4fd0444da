"""Where else a layer may keep the inverse of its weight, and other ways past the state."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.caching_models import Square


class InPropertyCache(Square):
    @property
    @functools.cache  # noqa: B019
    def own(self) -> Tensor:
        return self.inverse()

    def kept(self) -> Tensor:
        return self.own


class InStaticCache(Square):
    @staticmethod
    @functools.cache
    def of(layer: Square) -> Tensor:
        return layer.inverse()

    def kept(self) -> Tensor:
        return self.of(self)


def memorised(method: Any) -> Any:
    """Remember results in the closure of a wrapper."""
    store: dict[int, Tensor] = {}

    @functools.wraps(method)
    def wrapper(self: Any) -> Tensor:
        if id(self) not in store:
            store[id(self)] = method(self)
        return store[id(self)]

    return wrapper


class InDecorator(Square):
    @memorised
    def kept(self) -> Tensor:
        return self.inverse()


class InDefault(Square):
    def kept(self, store: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
        if id(self) not in store:
            store[id(self)] = self.inverse()
        return store[id(self)]


class InKeywordDefault(Square):
    def kept(self, *, store: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
        if id(self) not in store:
            store[id(self)] = self.inverse()
        return store[id(self)]


class InFunction(Square):
    def kept(self) -> Tensor:
        home = vars(InFunction.kept)
        if id(self) not in home.setdefault("store", {}):
            home["store"][id(self)] = self.inverse()
        return home["store"][id(self)]


@dataclass(slots=True)
class Slot:
    """An object without a dictionary."""

    value: Tensor | None = None


class InSlot(Square):
    def __init__(self) -> None:
        super().__init__()
        self.slot = Slot()

    def kept(self) -> Tensor:
        if self.slot.value is None:
            self.slot.value = self.inverse()
        return self.slot.value


@dataclass(frozen=True, slots=True)
class FrozenSlot:
    """Nothing can be assigned to it, and yet it can be filled."""

    value: Tensor | None = None


class InFrozenSlot(Square):
    def __init__(self) -> None:
        super().__init__()
        self.slot = FrozenSlot()

    def kept(self) -> Tensor:
        if self.slot.value is None:
            object.__setattr__(self.slot, "value", self.inverse())
        return self.slot.value


class Store:
    """A registry whose class has the dictionary."""

    found: dict[int, Tensor] = {}

    def get(self, layer: Square) -> Tensor:
        """Return the inverse of a layer's weight, computed once."""
        if id(layer) not in self.found:
            self.found[id(layer)] = layer.inverse()
        return self.found[id(layer)]


REGISTRY = Store()


class InHelper(Square):
    def __init__(self) -> None:
        super().__init__()
        self.store = Store()

    def kept(self) -> Tensor:
        return self.store.get(self)


class InRegistry(Square):
    def kept(self) -> Tensor:
        return REGISTRY.get(self)


class InClass(Square):
    _kept: Tensor | None = None

    def kept(self) -> Tensor:
        if InClass._kept is None:
            InClass._kept = self.inverse()
        return InClass._kept


_BY_LAYER: dict[int, Tensor] = {}


def patched_forward(self: Any, x: Tensor) -> Tensor:
    """Compute with what a global dictionary holds."""
    if id(self) not in _BY_LAYER:
        _BY_LAYER[id(self)] = self.inverse()
    return x @ _BY_LAYER[id(self)] + self.bias


class Patched(Square):
    def __init__(self) -> None:
        super().__init__()
        self.forward = types.MethodType(patched_forward, self)


class ByLength(Square):
    def __init__(self) -> None:
        super().__init__()
        self.store: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.store:
            self.store[len(x)] = self.inverse()
        return x @ self.store[len(x)] + self.bias


class AmongMany(Square):
    def __init__(self) -> None:
        super().__init__()
        self.store: dict[Any, Any] = dict.fromkeys(range(3000))
        self.ones = {f"one {k}": torch.ones(1) for k in range(50)}

    def kept(self) -> Tensor:
        if "inverse" not in self.store:
            self.store["inverse"] = self.inverse()
        return self.store["inverse"] * torch.stack(list(self.ones.values())).mean()


PLACES = [
    InPropertyCache, InStaticCache, InDecorator, InDefault, InKeywordDefault, InFunction, InSlot,
    InFrozenSlot, InHelper, InRegistry, InClass, Patched, ByLength, AmongMany,
]  # fmt: skip


class Listed(nn.Module):
    """Reads a parameter from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 2, bias=False)
        self.tied = [self.encoder.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x)) @ self.tied[0]


class Partial(nn.Module):
    """Reads a parameter from the arguments of a function."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.function = functools.partial(F.linear, weight=self.encoder.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x)) + self.function(x)


def _fold(module: Any, keys: Any) -> None:
    module.folded = module.encoder.weight.detach() * 2.0


class Folding(nn.Module):
    """Computes a buffer when a state is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.register_buffer("folded", self.encoder.weight.detach() * 2.0, persistent=False)
        self.register_load_state_dict_post_hook(_fold)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x)) @ self.folded
