"""Attributes, lists, closures and caches that a model may write to, recorded and put back.

A forward pass may leave a function of the weights there, and the next one would read it, whatever
the weights then are.
"""

from __future__ import annotations

import dis
import functools
import gc
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import is_
from types import (
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any
from weakref import ProxyTypes, WeakKeyDictionary

import numpy as np
from torch import Tensor, nn

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}

_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, ModuleType)

_OTHERS = ("torch", "numpy", "builtins", "typing", "logging", "threading")
"""Packages whose objects are not descended into."""

_NO_CODE = sys.stdlib_module_names - {"__main__"}
"""Packages whose functions keep nothing of a model, such as the patterns that ``re`` compiled."""

_DEPTH = 6

_LONGEST = 2000
"""Lists and dictionaries of more tensors, arrays or containers hold data."""

_LARGE = 2**24
"""Bytes."""

_STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]

_Cache = type(functools.lru_cache(lambda: None))

_MISSING = object()

_PLAIN = (dict, list, deque, set, tuple, FunctionType, MethodType, functools.partial)

_DESCRIPTORS = (
    FunctionType,
    property,
    staticmethod,
    classmethod,
    functools.cached_property,
    MemberDescriptorType,
    GetSetDescriptorType,
)

_CLASS_PLACES: WeakKeyDictionary[type, list[Link]] = WeakKeyDictionary()

_FUNCTION_PLACES: WeakKeyDictionary[FunctionType, list[Link]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Link:
    """A place to take a value from and put one into: of a mapping, list, cell, class or slot."""

    home: Any
    key: Any = None
    wrap: Callable[[Any], Any] | None = None  # what a class has around it, such as a property

    def read(self) -> Any:
        """Return what is there, or a mark that nothing is."""
        try:
            if type(self.home) is dict:  # most of them
                return self.home[self.key]
            if isinstance(self.home, CellType):
                return self.home.cell_contents
            if isinstance(self.home, type):
                value = vars(self.home).get(self.key, _MISSING)
                return value if self.wrap is None else list(_layers(value))[-1]
            if self._is_slot:
                return object.__getattribute__(self.home, self.key)
            if isinstance(self.home, dict):  # a subclass may make something else of what it holds
                return dict.__getitem__(self.home, self.key)
            return self.home[self.key]
        except (AttributeError, KeyError, IndexError, ValueError):
            return _MISSING

    def write(self, value: Any) -> None:
        """Put a value there."""
        if isinstance(self.home, CellType):
            self.home.cell_contents = value
        elif isinstance(self.home, type):
            setattr(self.home, self.key, value if self.wrap is None else self.wrap(value))
        elif self._is_slot:  # of a frozen dataclass as well
            object.__setattr__(self.home, self.key, value)
        else:
            self.home[self.key] = value

    def remove(self) -> None:
        """Leave nothing there."""
        if isinstance(self.home, CellType):
            del self.home.cell_contents
        elif isinstance(self.home, type):
            delattr(self.home, self.key)
        elif self._is_slot:
            object.__delattr__(self.home, self.key)
        else:
            del self.home[self.key]

    @property
    def _is_slot(self) -> bool:
        return not isinstance(self.home, (dict, list, tuple, deque))


@dataclass(frozen=True)
class Kept:
    """A tensor, array or number that a module keeps, and the places to find it, outer first."""

    module: str
    kind: type
    value: Any
    path: tuple[Link, ...]

    @property
    def label(self) -> str:
        """The attribute, as in ``_cache['w']``."""
        first, *others = [link.key for link in self.path]
        return str(first) + "".join(f"[{key!r}]" for key in others if isinstance(key, (str, int)))


class Holdings:
    """What a model keeps now, to be put back; ``kept`` lists the tensors and arrays in it."""

    def __init__(self, model: nn.Module) -> None:
        self.kept: list[Kept] = []
        self._contents: list[tuple[Any, Any]] = []
        self._state: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._links: list[tuple[Link, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        self._caches: list[tuple[Any, int]] = []
        self._fresh: list[tuple[Link, Any]] = []
        self._sets: list[tuple[set[str], frozenset[str]]] = []
        self._seen = {id(t) for t in (*model.parameters(), *model.buffers())}
        for name, module in model.named_modules():
            self._record_module(name, module)
        self._freshen()

    def put_back(self) -> None:
        """Restore all containers, and the tensors that were written to."""
        for container, content in self._state:
            _refill(container, content)
        self._put_back_contents()

    def renew(self) -> None:
        """Put back all but the tensors of the state, as before a first call."""
        for container, content in self._state:
            for name in [name for name in container if content.get(name) is None]:
                if name not in content:
                    del container[name]
                else:
                    container[name] = None
        self._put_back_contents()
        self._freshen()

    def _put_back_contents(self) -> None:
        for container, content in self._contents:
            _refill(container, content)
        for names, before in self._sets:
            # In place: the set that the module has is the user's.
            names.intersection_update(before)
            names.update(before)
        for link, value in self._links:
            if link.read() is not value:
                _put(link, value)
        for position, (tensor, version, values) in enumerate(self._tensors):
            if tensor._version != version:
                tensor.detach().copy_(values)
                self._tensors[position] = (tensor, tensor._version, values)
        for cache, size in self._caches:
            if cache.cache_info().currsize != size and _holds_tensors(cache):
                cache.cache_clear()

    def _freshen(self) -> None:
        for link, cache in self._fresh:
            cache.cache_clear()
            link.write(cache)

    def _record_module(self, name: str, module: nn.Module) -> None:
        attributes = vars(module)
        self._seen.add(id(module))
        for part in ("_parameters", "_buffers", "_modules"):
            self._state.append((attributes[part], dict(attributes[part])))
        self._contents.append((attributes, dict(attributes)))
        unsaved = module._non_persistent_buffers_set
        self._sets.append((unsaved, frozenset(unsaved)))
        visit = functools.partial(self._visit, name, type(module))
        for buffer in unsaved:
            value = module._buffers.get(buffer)
            if value is not None:
                path = (Link(module._buffers, buffer),)
                self.kept.append(Kept(name, type(module), value, path))
                self._keep_values(value)
        for key, value in attributes.items():
            if key not in _BOOKKEEPING:
                visit(value, (Link(attributes, key),))
        if not _is_foreign(type(module)):
            for key, value in attributes.items():
                if type(value) is float:
                    path = (Link(attributes, key),)
                    self.kept.append(Kept(name, type(module), value, path))
            for kind in type(module).__mro__:
                if not _is_foreign(kind):
                    self._record_class(kind, visit)

    def _record_class(self, kind: type, visit: Callable[[Any, tuple[Link, ...]], None]) -> None:
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        self._contents.append((kind, dict(vars(kind))))
        for link in _places_of_class(kind):
            value = link.read()
            self._links.append((link, value))
            visit(value, (link,))

    def _visit(self, name: str, kind: type, value: Any, path: tuple[Link, ...]) -> None:
        if isinstance(value, (*_ATOMS, *ProxyTypes)) or value is _MISSING or len(path) > _DEPTH:
            return
        if isinstance(value, (Tensor, np.ndarray)):
            if id(value) not in self._seen:
                self.kept.append(Kept(name, kind, value, path))
                self._seen.add(id(value))
                # Large tensors beyond the attributes are data, which a copy would double.
                if len(path) == 1 or value.nbytes < _LARGE:
                    self._keep_values(value)
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, _Cache):
            self._visit_cache(value, path[-1])
            return
        for inner, link in self._open(value):
            self._visit(name, kind, inner, path if link is None else (*path, link))
        if not isinstance(value, (*_PLAIN, nn.Module)) and not _is_foreign(type(value)):
            self._record_class(type(value), functools.partial(self._visit, name, kind))

    def _keep_values(self, value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_inference():
            self._tensors.append((value, value._version, value.detach().clone()))

    def _visit_cache(self, cache: Any, link: Link) -> None:
        if _holds_tensors(cache):
            fresh = functools.lru_cache(**cache.cache_parameters())(cache.__wrapped__)
            self._links.append((link, cache))
            self._fresh.append((link, fresh))
        else:
            self._caches.append((cache, cache.cache_info().currsize))

    def _open(self, value: Any) -> Iterator[tuple[Any, Link | None]]:
        """Record what a container holds, and yield its values with their places."""
        if isinstance(value, (dict, list, deque, set)):
            content = _raw(value)
            self._contents.append((value, content))
            if isinstance(value, set):
                return
            pairs = content.items() if isinstance(content, dict) else enumerate(content)
            found = [(inner, key) for key, inner in pairs if not isinstance(inner, _ATOMS)]
            if len(found) <= _LONGEST:
                yield from [(inner, Link(value, key)) for inner, key in found]
        elif isinstance(value, tuple):
            yield from ((inner, None) for inner in value[:_LONGEST])
        elif isinstance(value, FunctionType):
            for link in _places_of_function(value):
                content = link.read()
                self._links.append((link, content))
                yield content, link
        elif isinstance(value, MethodType):
            yield value.__self__, None
            yield value.__func__, None
        elif isinstance(value, functools.partial):
            yield from ((part, None) for part in (value.func, value.args, value.keywords))
        elif isinstance(value, nn.Module) or not _is_foreign(type(value)):
            yield from self._open(getattr(value, "__dict__", ()))
            for slot in _slots(type(value)):
                content = Link(value, slot).read()
                self._links.append((Link(value, slot), content))
                yield content, Link(value, slot)


def _slots(kind: type) -> list[str]:
    return [
        name
        for base in kind.__mro__
        for name, member in vars(base).items()
        # Members of types written in C, such as the flags of a pattern, may be read only.
        if isinstance(member, MemberDescriptorType)
        and "__slots__" in vars(base)
        and not _is_foreign(base)
    ]


def _raw(container: Any) -> Any:
    """Return a plain copy of what a mapping or list really holds."""
    if isinstance(container, dict):
        return dict(zip(dict.keys(container), dict.values(container), strict=True))
    return container.copy()


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, type):
        now = vars(container)
        if len(now) == len(content) and all(map(is_, now.values(), content.values())):
            return
        for name in [name for name in now if name not in content]:
            delattr(container, name)
        for name, value in content.items():
            if now.get(name, _MISSING) is not value and name != "__dict__":
                setattr(container, name, value)
        return
    if isinstance(container, set):
        if container != content:
            container.clear()
            container.update(content)
        return
    if isinstance(container, dict):
        if _is_same(container, content):
            return
        container.clear()
        for key, value in content.items():
            container[key] = value
    elif len(container) != len(content) or any(
        a is not b for a, b in zip(container, content, strict=True)
    ):
        container.clear()
        container.extend(content)


def _is_same(container: dict[Any, Any], content: dict[Any, Any]) -> bool:
    """Tell whether a mapping holds the same objects in the same order.

    Order counts: it is that of the user's parameters() and state_dict().
    """
    return (
        dict.__len__(container) == len(content)
        and all(map(is_, dict.values(container), content.values()))
        and all(map(is_, dict.keys(container), content))
    )


def _put(link: Link, value: Any) -> None:
    if value is _MISSING:
        link.remove()
    else:
        link.write(value)


def _is_foreign(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in _OTHERS


def _holds_tensors(cache: Any) -> bool:
    """Tell whether the cache of a function holds tensors or models, as keys or results."""
    found: list[Any] = list(gc.get_referents(cache))
    seen: set[int] = set()
    for _ in range(_LONGEST):
        if not found:
            break
        value = found.pop()
        if isinstance(value, (Tensor, nn.Module)):
            return True
        if id(value) in seen or isinstance(value, (*_ATOMS, FunctionType)):
            continue
        seen.add(id(value))
        if isinstance(value, (dict, list, tuple)) or "lru" in type(value).__name__:
            found += gc.get_referents(value)
    return False


def _places_of_class(kind: type) -> list[Link]:
    """Return closures, globals and class attributes that methods of a class may keep things in."""
    if kind not in _CLASS_PLACES:
        places: list[Link] = []
        seen: set[int] = set()
        for name, value in vars(kind).items():
            layers = list(_layers(value))
            if isinstance(layers[-1], _Cache) and len(layers) > 1:
                places.append(Link(kind, name, type(value)))
            elif not (name.startswith("__") or isinstance(value, _DESCRIPTORS)):
                places.append(Link(kind, name))
            for layer in layers:
                _collect(layer.__wrapped__ if isinstance(layer, _Cache) else layer, places, seen)
        _CLASS_PLACES[kind] = places
    return _CLASS_PLACES[kind]


def _places_of_function(function: FunctionType) -> list[Link]:
    """Return what a function closes over, its defaults and the globals it may keep things in."""
    if function not in _FUNCTION_PLACES:
        places: list[Link] = []
        _collect(function, places, set())
        _FUNCTION_PLACES[function] = places
    return _FUNCTION_PLACES[function]


def _collect(function: Any, places: list[Link], seen: set[int], depth: int = 0) -> None:
    if not isinstance(function, FunctionType) or id(function) in seen or depth > 2:
        return
    seen.add(id(function))
    package = (function.__module__ or "").partition(".")[0]
    if package in _OTHERS or package in _NO_CODE:
        return
    places += map(Link, function.__closure__ or ())
    places.append(Link(function, "__dict__"))
    places += [Link(function.__kwdefaults__, key) for key in function.__kwdefaults__ or ()]
    defaults = function.__defaults__ or ()
    places += [Link(defaults, k) for k, value in enumerate(defaults) if _may_hold(value, package)]
    _collect(vars(function).get("__wrapped__"), places, seen, depth)
    stored = _stores_globals(function.__code__)
    for name in _names(function.__code__):
        value = function.__globals__.get(name, _MISSING)
        if _may_hold(value, package) or value is None or (stored and not callable(value)):
            places.append(Link(function.__globals__, name))
        else:
            _collect(value, places, seen, depth + 1)


def _may_hold(value: Any, package: str) -> bool:
    if isinstance(value, (dict, list, deque, set, Tensor, np.ndarray, _Cache)):
        return True
    kind = type(value)
    if kind.__module__ == "weakref":
        return hasattr(value, "data")
    return not callable(value) and kind.__module__.partition(".")[0] == package


def _layers(value: Any) -> Iterator[Any]:
    """Yield what stands around a method of a class, outer first, and the method or its cache."""
    yield value
    while isinstance(value, (property, staticmethod, classmethod, functools.cached_property)):
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools.cached_property):
            value = value.func
        else:
            value = value.__func__
        yield value


def _names(code: CodeType) -> Iterable[str]:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return {*code.co_names, *(name for c in inner for name in _names(c))}


def _stores_globals(code: CodeType) -> bool:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return _STORE_GLOBAL in code.co_code[::2] or any(map(_stores_globals, inner))
