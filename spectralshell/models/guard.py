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
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from spectralshell.models.holdings import Holdings

_MODEL_LOCK = threading.RLock()
"""Held while any model is evaluated or read: its tensors and torch's global switches are exchanged,
and another thread would see, and restore, the wrong ones."""

_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")

_ACTIVE: list[tuple[nn.Module, Holdings]] = []
"""Models guarded now, and what they kept before."""

_CONTINUED: list[nn.Module] = []


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

    Cost: linear in modules and in what they keep. Not seen: what libraries keep outside Python.
    """
    with exclusive(), ExitStack() as stack:
        stack.enter_context(random_states(device))
        stack.enter_context(_own_parametrizations())
        stack.enter_context(_evaluating(model))
        stack.enter_context(_held(model))
        stack.enter_context(_slow_attention_path())
        # Fused attention has no forward-mode derivative and no second derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(quiet_differentiation())
        stack.enter_context(full_precision(device))
        stack.enter_context(_native_recurrence(model, device))
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
def random_states(device: torch.device) -> Iterator[None]:
    """Put the random states of torch, NumPy and Python back after; of the CPU and a device."""
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
def _held(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass rebinds (caches, weights of weight_norm) or writes to."""
    if any(guarded_model is model for guarded_model, _ in _ACTIVE):  # what it kept is recorded
        try:
            yield
        finally:
            renew(model)
        return
    holdings = Holdings(model)
    _ACTIVE.append((model, holdings))
    try:
        yield
    finally:
        _ACTIVE.pop()
        holdings.put_back()


def renew(model: nn.Module) -> None:
    """Make a guarded model as it was before it was called: what it has cached is forgotten."""
    for guarded_model, holdings in reversed(_ACTIVE):
        if guarded_model is model and not _CONTINUED:
            holdings.renew()
            return


@contextmanager
def continued(model: nn.Module) -> Iterator[None]:
    """Let each call inside find what the one before has left, as those of a user do."""
    _CONTINUED.append(model)
    try:
        yield
    finally:
        _CONTINUED.pop()
        renew(model)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch modules to evaluation, without hooks on gradients; a user may have overridden eval."""
    switched = []
    for module in model.modules():
        attributes = vars(module)
        # A gradient that hooks would see or change is not the user's.
        changes: dict[str, Any] = {name: OrderedDict() for name in _BACKWARD_HOOKS}
        changes["training"] = False  # model.eval() may be overridden, and merge or move weights
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            changes["sparse"] = False  # sparse gradients cannot be differentiated
        switched.append((attributes, {k: attributes[k] for k in changes if k in attributes}))
        attributes.update(changes)
    try:
        yield
    finally:
        for attributes, before in switched:
            for name in _BACKWARD_HOOKS:
                if name not in before:
                    attributes.pop(name, None)
            attributes.update(before)


@contextmanager
def _own_parametrizations() -> Iterator[None]:
    """Let parametrized weights be computed anew, whatever ``cached()`` of the caller holds."""
    cache, enabled = parametrize._cache, parametrize._cache_enabled
    parametrize._cache, parametrize._cache_enabled = {}, 0
    try:
        yield
    finally:
        parametrize._cache, parametrize._cache_enabled = cache, enabled


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
