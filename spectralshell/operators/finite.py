"""States and inputs looked through for NaN and infinity, before a model meets them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MAX_SAMPLES = 5
"""Positions that a message names."""


def check_finite_state(state: Mapping[str, Tensor], parameters: set[str]) -> None:
    """Raise ValueError naming the first tensor of a state with NaN (or, a parameter, infinity).

    Buffers may be infinite: attention masks are.
    """
    for name, tensor in state.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        bad = ~torch.isfinite(tensor) if name in parameters else torch.isnan(tensor)
        if bool(bad.any()):
            raise ValueError(
                f"model: {name!r} holds NaN or infinite values ({int(bad.sum())} of "
                f"{tensor.numel()}); measure a state from before the run diverged."
            )


def check_finite_inputs(inputs: Any, label: str = "inputs") -> None:
    """Raise ValueError naming the first floating input that holds NaN, and in which samples."""
    if isinstance(inputs, Mapping):
        for key, value in inputs.items():
            check_finite_inputs(value, f"{label}[{key!r}]")
    elif isinstance(inputs, (tuple, list)):
        for position, value in enumerate(inputs):
            check_finite_inputs(value, f"{label}[{position}]")
    elif isinstance(inputs, Tensor) and inputs.is_floating_point() and not inputs.is_meta:
        where = _samples_with_nan(inputs)
        if where:
            raise ValueError(f"{label} hold NaN{where}; remove those samples.")


def _samples_with_nan(tensor: Tensor) -> str:
    """Return in which of the first dimension a tensor holds NaN, "" if nowhere."""
    bad = torch.isnan(tensor)
    if not bool(bad.any()):
        return ""
    if tensor.ndim == 0:
        return ", a single number"
    found = torch.nonzero(bad.reshape(bad.shape[0], -1).any(dim=1)).flatten().tolist()
    more = f" and {len(found) - _MAX_SAMPLES} more" if len(found) > _MAX_SAMPLES else ""
    return f" in samples {', '.join(map(str, found[:_MAX_SAMPLES]))}{more}"
