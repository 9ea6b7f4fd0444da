"""Digests of what a model or a function runs: alike for equal things, unlike for others.

Data count by value, functions and classes by what they run: bytecode, constants, defaults, closures
and the globals they name, transitively. Installed packages count by their version, modules that
are imported inside a function by their file, and what cannot be pickled by its type and text. Not
seen: what code looks up by a name that it computes.
"""

from __future__ import annotations

import dis
import gc
import hashlib
import importlib.util
import marshal
import os
import platform
import reprlib
import site
import sys
import sysconfig
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property
from importlib import metadata
from numbers import Number
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_BOOKKEEPING = frozenset(vars(nn.Module()))

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")

_PLAIN = (
    *(str, bytes, bytearray, Number, np.generic, np.dtype, type(None), type(...)),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, PurePath, range),
)
"""Types whose text tells any two values apart."""

_ORDERED, _UNORDERED = (list, tuple), (set, frozenset)

_MANY = 100
"""Longer containers are taken in one go if they hold nothing but plain values, however nested."""

_NESTED, _TEXTUAL = {list, tuple, dict}, {int, float, complex, bool, str, bytes, type(None)}

_DEEPEST = 50

_MARSHAL_VERSION = 2
"""Without references, which would tell apart equal values by how often an object occurs."""

_CACHED = type(cache(lambda: None))

_NOT_RUN = frozenset(
    (
        *("__module__", "__doc__", "__dict__", "__weakref__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
        *(
            "__dataclass_fields__",
            "__dataclass_params__",
            "__static_attributes__",
            "__firstlineno__",
        ),
        *("__orig_bases__", "__parameters__", "__type_params__", "_abc_impl"),
        *("_backward_cls", "__slotnames__"),
    )
)
"""What a class holds beside what its instances do."""

_INSTALLED = ("site-packages", "dist-packages")


def model_digest(model: nn.Module) -> str:
    """Return a digest of what a model runs and of its settings: all but its parameters, buffers."""
    return _unless_too_deep(lambda: _Fingerprint().of_model(model)).hex()


def value_digest(value: Any) -> bytes:
    """Return the digest of anything: of data, of a function and what it runs, of an object."""
    return _unless_too_deep(lambda: _Fingerprint().of(value))


def _unless_too_deep(find: Callable[[], bytes]) -> bytes:
    try:
        return find()
    except Exception:  # too deep, or whatever an object raises: like nothing else
        return os.urandom(32)


def data_parts(data: Any) -> Iterable[bytes]:
    """Return numbers, strings, tensors, arrays and what is made of them by value; refuse others."""
    if isinstance(data, Tensor):
        yield from _tensor_parts(data)
    elif isinstance(data, np.ndarray) and data.dtype != object:
        yield from _array_parts(data)
    elif isinstance(data, Mapping):
        for key in data:
            yield repr(key).encode()
            yield from data_parts(data[key])
    elif isinstance(data, _ORDERED):
        for value in data:
            yield from data_parts(value)
    elif isinstance(data, _PLAIN):
        yield repr(data).encode()
    else:
        # The text of other things may leave out what tells them apart.
        raise TypeError(
            f"cannot tell by its value whether {type(data).__name__} {reprlib.repr(data)} has "
            "changed; pass numbers, strings, tensors, numpy arrays, or lists and mappings of them."
        )


def _tensor_parts(tensor: Tensor) -> Iterable[bytes]:
    yield f"{tensor.dtype}{tuple(tensor.shape)}{tensor.layout}".encode()
    if tensor.is_meta:
        return
    dense = tensor.dequantize() if tensor.is_quantized else tensor
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    flat = dense.detach().cpu().contiguous().reshape(-1)
    yield flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _array_parts(array: np.ndarray) -> Iterable[bytes]:
    yield f"array {array.dtype.str}{array.shape}".encode()
    yield np.ascontiguousarray(array).tobytes()


class _Fingerprint:
    """Digests of values, functions and classes, each object once; what is visited stays alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, bytes]] = {}

    def of(self, value: Any) -> bytes:
        """Return the digest of anything."""
        if isinstance(value, _PLAIN):
            return f"{type(value).__name__} {value!r}".encode()
        if id(value) not in self._known:
            self._known[id(value)] = value, b"circle"
            self._known[id(value)] = value, _digest(self._parts(value))
        return self._known[id(value)][1]

    def of_model(self, model: nn.Module) -> bytes:
        """Return the digest of a model without the tensors that a state gives."""
        return _digest(self._model_parts(model))

    def _parts(self, value: Any) -> Iterator[bytes]:
        for kinds, parts in self._KINDS:
            if isinstance(value, kinds):
                yield parts.__name__.encode()
                yield from parts(self, value)
                return
        yield from self._instance_parts(value)

    def _several(self, values: Iterable[Any]) -> Iterator[bytes]:
        for value in values:
            yield self.of(value)

    def _container_parts(self, value: Any) -> Iterator[bytes]:
        plain = _plain_bytes(value) if len(value) > _MANY else None
        if plain is not None:
            yield plain
        elif type(value) in (*_ORDERED, dict, OrderedDict):
            yield from self._several(value.items() if isinstance(value, dict) else value)
        elif type(value) in _UNORDERED:
            yield from sorted(self._several(value))
        else:
            yield from self._instance_parts(value)

    def _ndarray_parts(self, array: np.ndarray) -> Iterator[bytes]:
        yield from self._several(array.tolist()) if array.dtype == object else _array_parts(array)

    def _function_parts(self, function: FunctionType) -> Iterator[bytes]:
        code = function.__code__
        if _is_installed(code.co_filename):
            yield _library_name(function, code.co_filename)
        else:
            yield from self._code_parts(code)
            for chain in _global_chains(code):
                yield from self._global_parts(chain, code, function.__globals__)
            for name in _imports(code):
                yield _imported_bytes(name, function.__globals__.get("__package__"))
        yield from self._several((function.__defaults__, function.__kwdefaults__))
        # A decorator, also one of a library, calls what it closes over.
        for cell in function.__closure__ or ():
            yield self.of(cell.cell_contents) if _is_filled(cell) else b"empty"
        yield self.of(vars(function))

    def _code_parts(self, code: CodeType) -> Iterator[bytes]:
        yield code.co_code + code.co_exceptiontable
        yield repr((code.co_argcount, code.co_kwonlyargcount, code.co_flags)).encode()
        yield repr((code.co_names, code.co_freevars, code.co_cellvars)).encode()
        yield from self._several(code.co_consts)

    def _global_parts(
        self, chain: tuple[str, ...], code: CodeType, namespace: Mapping[str, Any]
    ) -> Iterator[bytes]:
        """Return what a chain of names finds, through modules to the first other thing."""
        yield ".".join(chain).encode()
        if chain[0] not in namespace:
            return  # a builtin
        found = namespace[chain[0]]
        for name in chain[1:]:
            if not isinstance(found, ModuleType) or name not in vars(found):
                break
            found = vars(found)[name]
        yield self.of(found)
        if isinstance(found, ModuleType) and not _is_library(found.__name__):
            # Passed on as a whole: any of its names that the function uses may be meant.
            used = sorted(_names(code) & vars(found).keys())
            yield from self._several(vars(found)[name] for name in used)

    def _method_parts(self, method: MethodType) -> Iterator[bytes]:
        yield from self._several((method.__func__, method.__self__))

    def _builtin_parts(self, function: Any) -> Iterator[bytes]:
        file = _file_of(getattr(function, "__module__", None))
        yield _library_name(function, file)
        if file is not None and not _is_installed(file):
            yield _file_bytes(file)
        bound = getattr(function, "__self__", None)
        if not isinstance(bound, (ModuleType, type)):
            yield self.of(bound)

    def _module_parts(self, module: ModuleType) -> Iterator[bytes]:
        yield f"{module.__name__} {_version(_file_of(module.__name__))}".encode()

    def _class_parts(self, kind: type) -> Iterator[bytes]:
        for base in kind.__mro__[:-1]:
            yield f"{base.__module__}.{base.__qualname__}".encode()
            if _is_library(base.__module__):
                # A method that a user put into a class of a library is the user's.
                yield _version(_file_of(base.__module__)).encode()
                members = {n: m for n, m in vars(base).items() if _is_own_function(m)}
            else:
                members = {n: m for n, m in vars(base).items() if n not in _NOT_RUN}
            yield from self._several(sorted(members.items(), key=lambda item: item[0]))
        if type(kind) is not type:
            yield self.of(type(kind))

    def _wrapper_parts(self, wrapper: Any) -> Iterator[bytes]:
        yield self.of(wrapper.__func__)

    def _property_parts(self, found: property) -> Iterator[bytes]:
        yield from self._several((found.fget, found.fset, found.fdel))

    def _cached_parts(self, found: cached_property[Any]) -> Iterator[bytes]:
        yield self.of(found.func)

    def _with_tensors(self, model: nn.Module) -> Iterator[bytes]:
        """Return a module that no state reaches: one of a list, a closure, a residual."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            yield name.encode()
            yield from _tensor_parts(tensor)
        yield from self._model_parts(model)

    def _model_parts(self, model: nn.Module) -> Iterator[bytes]:
        for kind, named in (
            ("tensor", model.named_parameters(remove_duplicate=False)),
            ("tensor", model.named_buffers(remove_duplicate=False)),
            ("module", model.named_modules(remove_duplicate=False)),
        ):
            # What the state gives counts by its name, wherever the model holds it.
            for name, part in named:
                first = self._known.setdefault(id(part), (part, f"{kind} {name}".encode()))[1]
                yield name.encode() + first
        for name, module in model.named_modules():
            yield name.encode()
            yield self.of(type(module))
        for module in model.modules():
            yield from self._setting_parts(module)
        for hooks in (
            nn.modules.module._global_forward_hooks,
            nn.modules.module._global_forward_pre_hooks,
        ):
            yield from self._several(hooks.values())

    def _setting_parts(self, module: nn.Module) -> Iterator[bytes]:
        """Return what a module holds beside tensors and submodules: its scale, flags, hooks."""
        for name, value in sorted(vars(module).items()):
            if name in _HOOKS:
                yield from self._several(value.values())
            elif name in _HOOK_FLAGS:
                yield str(len(value)).encode()
            # The rest of torch's own bookkeeping follows from the state; the mode is set to eval.
            elif name not in _BOOKKEEPING:
                yield name.encode()
                yield self.of(value)

    def _instance_parts(self, value: Any) -> Iterator[bytes]:
        """Return an object as pickle sees it, and by its attributes if its class is the user's."""
        yield self.of(type(value))
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # a lock, a weak reference: whatever a class raises that has no state
            reduced = ()
            yield repr(value).encode()
        if isinstance(value, _CACHED):
            yield self.of(value.__wrapped__)
        if isinstance(reduced, str):
            yield reduced.encode()
            return
        yield from self._several(reduced[:3])
        for items in reduced[3:5]:
            yield from self._several(items or ())
        if not _is_library(type(value).__module__):
            yield self.of(dict(getattr(value, "__dict__", {})))

    def _tensor_parts(self, tensor: Tensor) -> Iterator[bytes]:
        # What autograd made of the model's parameters follows from the state.
        made = tensor.grad_fn is not None and self._comes_from_state(tensor)
        yield from [str(tensor.shape).encode()] if made else _tensor_parts(tensor)

    def _comes_from_state(self, tensor: Tensor) -> bool:
        """Tell whether all leaves of what autograd made are parameters of the model."""
        nodes, seen = [tensor.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                _, known = self._known.get(id(node.variable), (None, b""))
                if not known.startswith(b"tensor "):
                    return False
            nodes += [following for following, _ in node.next_functions]
        return True

    def _reference_parts(self, reference: weakref.ref[Any]) -> Iterator[bytes]:
        yield self.of(reference())

    _KINDS: tuple[tuple[Any, Callable[[Any, Any], Iterable[bytes]]], ...] = (
        (Tensor, _tensor_parts),
        (weakref.ref, _reference_parts),
        (np.ndarray, _ndarray_parts),
        ((*_ORDERED, *_UNORDERED, dict), _container_parts),
        (FunctionType, _function_parts),
        (MethodType, _method_parts),
        (type, _class_parts),
        (ModuleType, _module_parts),
        (nn.Module, _with_tensors),
        (CodeType, _code_parts),
        ((staticmethod, classmethod), _wrapper_parts),
        (property, _property_parts),
        (cached_property, _cached_parts),
        (
            (
                BuiltinFunctionType,
                MethodWrapperType,
                MethodDescriptorType,
                WrapperDescriptorType,
                GetSetDescriptorType,
                MemberDescriptorType,
            ),
            _builtin_parts,
        ),
    )


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None or True
    except ValueError:  # a name that is bound later
        return False


def _is_own_function(member: Any) -> bool:
    plain = getattr(member, "__func__", member)
    code = getattr(plain, "__code__", None)
    return isinstance(code, CodeType) and not _is_installed(code.co_filename)


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


@cache
def _global_chains(code: CodeType) -> tuple[tuple[str, ...], ...]:
    """Return the globals that code reads, each with the attributes that follow, sorted."""
    found: set[tuple[str, ...]] = set()
    chain: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain += (instruction.argval,)
            continue
        found.add(chain)
        named = instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        chain = (instruction.argval,) if named else ()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found.update(_global_chains(constant))
    return tuple(sorted(found - {()}))


@cache
def _imports(code: CodeType) -> tuple[str, ...]:
    """Return the modules that code imports when it runs, and names in them that may be some."""
    found: set[str] = set()
    module = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            module = instruction.argval
            found.add(module)
        elif instruction.opname == "IMPORT_FROM":
            found.add(f"{module}.{instruction.argval}".strip("."))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found.update(_imports(constant))
    return tuple(sorted(found - {""}))


def _imported_bytes(name: str, package: str | None) -> bytes:
    """Return name and content of a user's module that need not be loaded yet."""
    for candidate in (f"{package}.{name}", name) if package else (name,):
        top, *rest = candidate.split(".")
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            continue
        if spec is None or (spec.origin is None or _is_installed(spec.origin)):
            continue
        for place in spec.submodule_search_locations or [str(Path(spec.origin).parent)]:
            path = Path(place, *rest) if rest else Path(spec.origin)
            for file in (path, path.with_suffix(".py"), path / "__init__.py"):
                if file.is_file():
                    return name.encode() + _file_bytes(str(file))
    return name.encode()


def _library_name(thing: Any, file: str | None) -> bytes:
    name = getattr(thing, "__qualname__", None) or repr(thing)
    return f"{getattr(thing, '__module__', None)}.{name} {_version(file)}".encode()


def _file_of(module: str | None) -> str | None:
    """Return the file of a loaded module, None where there is none, as in an interpreter."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file if isinstance(file, str) else None


def _is_library(module: Any) -> bool:
    if not isinstance(module, str):  # classes of compiled code may have a descriptor there
        return True
    file = _file_of(module)
    if file is None:
        return module.partition(".")[0] in sys.stdlib_module_names
    return _is_installed(file)


@cache
def _is_installed(file: str) -> bool:
    """Tell whether code is of the interpreter or an installed package, which have versions."""
    if file.startswith("<frozen "):
        return True
    path = Path(file)
    if any(part in _INSTALLED for part in path.parts):
        return True
    if path.is_relative_to(_PACKAGE):
        return True
    return any(path.is_relative_to(root) for root in _library_roots())


_PACKAGE = Path(__file__).parents[1]


@cache
def _library_roots() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return (
        *(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    )


@cache
def _version(file: str | None) -> str:
    """Return the version of the installed package that a file belongs to, or of Python."""
    parts = Path(file).parts if file is not None else ()
    places = [place for place, part in enumerate(parts) if part in _INSTALLED]
    if not places or places[-1] + 1 == len(parts):
        return platform.python_version()
    top = parts[places[-1] + 1].removesuffix(".py")
    try:
        return f"{top} {metadata.version(top)}"
    except metadata.PackageNotFoundError:  # its distribution has another name
        names = _distributions().get(top, [])
    found = [f"{name} {metadata.version(name)}" for name in names]
    return " ".join([top, *found, str(getattr(sys.modules.get(top), "__version__", ""))])


@cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _file_bytes(file: str | None) -> bytes:
    """Return the digest of a file, nothing for what has none."""
    if file is None:
        return b""
    try:
        return hashlib.sha256(Path(file).read_bytes()).digest()
    except OSError:
        return b""


def _plain_bytes(container: Any) -> bytes | None:
    """Return lists, tuples and dictionaries of numbers and text as bytes, None for all else."""
    level = [container]
    for _ in range(_DEEPEST):
        kinds = set(map(type, level))
        if not kinds <= _NESTED | _TEXTUAL:
            return None
        nested = [value for value in level if type(value) in _NESTED]
        if not nested:
            return marshal.dumps(container, _MARSHAL_VERSION)
        level = gc.get_referents(*nested)
    return None  # so deep, or a circle
