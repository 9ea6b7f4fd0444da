"""A model's complete observable state, to show that it was left alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return parameters, buffers, gradients, flags, modes, hooks and random states, comparable."""
    return {
        "parameters": {n: (id(p), _bytes(p)) for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {
            n: None if p.grad is None else (id(p.grad), _bytes(p.grad))
            for n, p in model.named_parameters()
        },
        "buffers": {n: (id(b), _bytes(b)) for n, b in model.named_buffers()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            (n, kind): [id(hook) for hook in getattr(m, kind).values()]
            for n, m in model.named_modules()
            for kind in _HOOKS
            if getattr(m, kind)
        },
        "attributes": {
            n: {key: id(value) for key, value in vars(m).items()} for n, m in model.named_modules()
        },
        "torch random state": torch.get_rng_state().numpy().tobytes(),
        "python random state": random.getstate(),
        "numpy random state": np.random.get_state()[1].tobytes(),  # noqa: NPY002
        "gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "attention": (
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        ),
    }


def _bytes(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_meta:
        return tensor.dtype, tuple(tensor.shape)
    values = tensor.detach()
    return tensor.dtype, tuple(tensor.shape), values.cpu().contiguous().numpy().tobytes()
