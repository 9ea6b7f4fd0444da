"""The user's model called without leaving a trace on it."""

from __future__ import annotations

import random
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_MODEL_LOCK = threading.RLock()
"""Held while any model is evaluated or read: its tensors and torch's global switches are exchanged,
and another thread would see, and restore, the wrong ones."""

_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")

_CONTAINERS = ("_parameters", "_buffers", "_modules")


@contextmanager
def exclusive() -> Iterator[None]:
    """Let a model be touched: no other thread does, and what is made can be differentiated.

    Tensors made under the inference mode of a caller could not.
    """
    with _MODEL_LOCK, torch.inference_mode(False):
        yield


@contextmanager
def guarded(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate a model inside, undisturbed and twice differentiable; put everything back after.

    Not seen: changes in a user's own lists, and in objects of hooks. Cost: linear in modules.
    """
    with exclusive(), ExitStack() as stack:
        stack.enter_context(_random_states(device))
        stack.enter_context(_module_attributes(model))
        stack.enter_context(_slow_attention_path())
        # Fused attention has no forward-mode derivative and no second derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(quiet_differentiation())
        stack.enter_context(full_precision(device))
        stack.enter_context(_native_recurrence(model, device))
        for module in model.modules():
            # model.eval() may be overridden, and merge or move weights.
            vars(module)["training"] = False
            # A gradient that hooks would see or change is not the user's.
            vars(module).update({name: OrderedDict() for name in _BACKWARD_HOOKS})
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                vars(module)["sparse"] = False  # sparse gradients cannot be differentiated
        yield


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off the caller's autocast, and what cuDNN takes of the precision of float32."""
    with ExitStack() as stack:
        if device.type != "meta" and torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(_exact_cudnn(enabled=True))
        yield


@contextmanager
def quiet_differentiation() -> Iterator[None]:
    """Silence what torch says about its own tracing, which a user can do nothing about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Attempted to insert a get_attr Node.*")
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated.*")
        warnings.filterwarnings("ignore", message=".*performance drop because we have not yet.*")
        # Of an evaluation that records nothing.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True.*")
        yield


@contextmanager
def _random_states(device: torch.device) -> Iterator[None]:
    cpu = torch.get_rng_state()
    python = random.getstate()
    legacy = np.random.get_state()  # noqa: NPY002  the global state is what has to be kept
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def _module_attributes(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass rebinds (caches, weights of weight_norm) or writes to."""
    records = [_record(module) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, containers, unsaved, tensors in records:
            _restore(vars(module), attributes)
            for name, content in containers.items():
                _restore(vars(module)[name], content)
            # In place: the set that the module has is the user's.
            module._non_persistent_buffers_set.intersection_update(unsaved)
            module._non_persistent_buffers_set.update(unsaved)
            for tensor, version, values in tensors:
                if tensor._version != version:
                    tensor.detach().copy_(values)


_Record = tuple[
    nn.Module,
    dict[str, Any],
    dict[str, dict[str, Any]],
    frozenset[str],
    list[tuple[Tensor, int, Tensor]],
]


def _record(module: nn.Module) -> _Record:
    attributes = dict(vars(module))
    containers = {name: dict(attributes[name]) for name in _CONTAINERS}
    tensors = [
        (value, value._version, value.detach().clone())
        for value in attributes.values()
        if isinstance(value, Tensor) and not value.is_inference()
    ]
    unsaved = frozenset(module._non_persistent_buffers_set)
    return module, attributes, containers, unsaved, tensors


def _restore(current: dict[str, Any], saved: dict[str, Any]) -> None:
    # Order counts: it is that of the user's parameters() and state_dict().
    same = list(current) == list(saved) and all(current[key] is saved[key] for key in saved)
    if not same:
        current.clear()
        current.update(saved)


def _exact_cudnn(*, enabled: bool) -> AbstractContextManager[Any]:
    """Return the context in which cuDNN keeps float32, or is off."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled and enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )


def _native_recurrence(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """Leave recurrent layers to torch: those of cuDNN have no backward pass in eval mode."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    return _exact_cudnn(enabled=False) if recurrent and device.type == "cuda" else nullcontext()


@contextmanager
def _slow_attention_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
