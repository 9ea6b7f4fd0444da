"""Layers that keep a function of their weights between calls, and honest neighbours that keep more.

All are square (width 4), invertible, and used through :func:`network`.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

WIDTH = 4

_BY_MODULE: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()

_LAST: Tensor | None = None


class Square(nn.Module):
    """A weight near the identity, so that its inverse is tame."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(0.3 * torch.randn(WIDTH))

    def inverse(self) -> Tensor:
        return torch.linalg.inv(self.weight)

    def kept(self) -> Tensor:
        return self.inverse()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept() + self.bias


class Attribute(Square):
    def __init__(self) -> None:
        super().__init__()
        self._w: Any = None

    def kept(self) -> Tensor:
        if self._w is None:
            self._w = self.inverse()
        return self._w


class DetachedAttribute(Attribute):
    def inverse(self) -> Tensor:
        return super().inverse().detach()


class LateAttribute(Square):
    def kept(self) -> Tensor:
        if not hasattr(self, "_w"):
            self._w = self.inverse()
        return self._w


class CachedProperty(Square):
    @functools.cached_property
    def _w(self) -> Tensor:
        return self.inverse()

    def kept(self) -> Tensor:
        return self._w


class LuFactor(Attribute):
    def forward(self, x: Tensor) -> Tensor:
        if self._w is None:
            self._w = torch.linalg.lu_factor(self.weight)
        return torch.linalg.lu_solve(*self._w, x.T, adjoint=True).T + self.bias


class InDictionary(Square):
    def __init__(self) -> None:
        super().__init__()
        self._cache: dict[str, Tensor] = {}

    def kept(self) -> Tensor:
        if "w" not in self._cache:
            self._cache["w"] = self.inverse()
        return self._cache["w"]


class InList(Square):
    def __init__(self) -> None:
        super().__init__()
        self._cache: list[Any] = []

    def kept(self) -> Tensor:
        if not self._cache:
            self._cache.append(self.inverse())
        return self._cache[0]


class Nested(Square):
    def __init__(self) -> None:
        super().__init__()
        self._cache = SimpleNamespace(parts=[{"w": None}])

    def kept(self) -> Tensor:
        inner = self._cache.parts[0]
        if inner["w"] is None:
            inner["w"] = self.inverse()
        return inner["w"]


class InClosure(Square):
    def __init__(self) -> None:
        super().__init__()
        cache: dict[str, Tensor] = {}

        def kept() -> Tensor:
            if "w" not in cache:
                cache["w"] = self.inverse()
            return cache["w"]

        self._kept = kept

    def kept(self) -> Tensor:
        return self._kept()


class InNonlocal(Square):
    def __init__(self) -> None:
        super().__init__()
        found = None

        def kept() -> Tensor:
            nonlocal found
            if found is None:
                found = self.inverse()
            return found

        self._kept = kept

    def kept(self) -> Tensor:
        return self._kept()


class InLruCache(Square):
    @functools.cache  # noqa: B019  as people have it
    def kept(self) -> Tensor:
        return self.inverse()


class InOwnLruCache(Square):
    def __init__(self) -> None:
        super().__init__()
        self._kept = functools.lru_cache(maxsize=2)(self.inverse)

    def kept(self) -> Tensor:
        return self._kept()


class InModuleDictionary(Square):
    def kept(self) -> Tensor:
        if self not in _BY_MODULE:
            _BY_MODULE[self] = self.inverse()
        return _BY_MODULE[self]


class InGlobal(Square):
    def kept(self) -> Tensor:
        global _LAST
        if _LAST is None:
            _LAST = self.inverse()
        return _LAST


class ByFlag(Square):
    def __init__(self) -> None:
        super().__init__()
        self._ready = False

    def kept(self) -> Tensor:
        if not self._ready:
            self._w, self._ready = self.inverse(), True
        return self._w


class ByVersion(Square):
    def __init__(self) -> None:
        super().__init__()
        self._version: int | None = None

    def kept(self) -> Tensor:
        if self._version != self.weight._version:
            self._w, self._version = self.inverse(), self.weight._version
        return self._w


class ByMode(Square):
    """Computes in training, and keeps what it computed last for evaluation."""

    def kept(self) -> Tensor:
        if self.training:
            self._w = self.inverse().detach()
            return self.inverse()
        return self._w


class InBuffer(Square):
    """A buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_w", None, persistent=False)

    def kept(self) -> Tensor:
        if self._w is None:
            self._w = self.inverse().detach()
        return self._w


class Determinant(Square):
    """A number of the weights, beside the weights themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._log: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._log is None:
            self._log = torch.linalg.slogdet(self.weight)[1].item()
        return x @ self.weight + self.bias + self._log


class Merged(Square):
    """A low-rank adapter, merged into a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(0.3 * torch.randn(WIDTH, 1))
        self.up = nn.Parameter(0.3 * torch.randn(1, WIDTH))
        self._merged: Any = None

    def merge(self) -> None:
        self._merged = (self.weight + self.down @ self.up).detach()

    def kept(self) -> Tensor:
        if self._merged is not None:
            return self._merged
        return self.weight + self.down @ self.up


class MergedInPlace(Merged):
    def __init__(self) -> None:
        super().__init__()
        self.merged = False

    def merge(self) -> None:
        self.weight.data += self.down.detach() @ self.up.detach()
        self.merged = True

    def kept(self) -> Tensor:
        return self.weight if self.merged else super().kept()


class MovingAverage(Square):
    """Evaluates with an average of its weights that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self._average = torch.eye(WIDTH)

    def kept(self) -> Tensor:
        if self.training:
            self._average = 0.5 * self._average + 0.5 * self.weight.detach()
            return self.weight
        return self._average.to(self.weight)


class HiddenState(Square):
    """Goes on from where the last call ended."""

    def __init__(self) -> None:
        super().__init__()
        self._h: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(WIDTH).to(x) if self._h is None else self._h
        y = torch.tanh(x @ self.weight + 0.3 * h)
        self._h = y.detach().mean(0)
        return y


class Table(Square):
    """Keeps a table that its weights have no part in, an optional constant and what it saw last."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self._places: Any = None
        self._offset = 0.1 * torch.ones(WIDTH)
        self._random: Any = None
        self.last: Any = None
        self.eps = 1e-5
        self.unused = nn.Parameter(torch.ones(2))
        self.use_unused = False

    def forward(self, x: Tensor) -> Tensor:
        if self._places is None:
            self._places = torch.arange(WIDTH, dtype=x.dtype, device=x.device).cos()
        if self._random is None:
            self._random = torch.randn(WIDTH)
        if self._offset is not None:
            x = x + self._offset.to(x)
        self.last = x @ self.weight * self._places + self._random.to(x)
        if self.use_unused:
            self.last = self.last + self.unused.sum()
        return self.last / (self.last.norm(dim=-1, keepdim=True) + self.eps)


STALE = [
    Attribute, DetachedAttribute, LateAttribute, CachedProperty, LuFactor, InDictionary, InList,
    Nested, InClosure, InNonlocal, InLruCache, InOwnLruCache, InModuleDictionary, InGlobal, ByFlag,
    ByVersion, ByMode, InBuffer, Determinant, Merged, MergedInPlace, MovingAverage, HiddenState,
]  # fmt: skip

HONEST = {
    "table": Table,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
    "recurrent": lambda: _Recurrent(),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
}


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, None])[0][:, 0]


def network(layer: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Put a layer between others, so that only a part of the Jacobian is in question."""
    return nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh(), layer, nn.Tanh(), nn.Linear(WIDTH, 2)).to(
        dtype
    )


def fill(model: nn.Module, x: Tensor, *, grad: bool = True) -> None:
    """Use a model as people do before they measure: train, evaluate, merge."""
    global _LAST
    _LAST = None
    with torch.set_grad_enabled(grad):
        model.train()
        model(x)
        for module in model.modules():
            if isinstance(module, Merged):
                module.merge()
        model.eval()
        model(x)
