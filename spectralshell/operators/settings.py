"""Where, and in which precision, to compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def resolve_device(device: str | torch.device, model: nn.Module) -> torch.device:
    """Return the device to compute on; ``"auto"`` is where the model's parameters are.

    Raises
    ------
    ValueError
        If the device is unknown or not available, or the model's parameters lie on several.
    TypeError
        If ``device`` is neither a string nor a torch.device.
    """
    if isinstance(device, torch.device):
        return _available(device)
    if not isinstance(device, str):
        raise TypeError(
            f"device must be 'auto', a device string or a torch.device, got {device!r}."
        )
    if device != "auto":
        try:
            named = torch.device(device)
        except RuntimeError as error:
            raise ValueError(
                f"device={device!r} is not a torch device such as 'cpu' or 'cuda:0'."
            ) from error
        return _available(named)
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        listed = ", ".join(sorted(str(d) for d in devices)) or "none"
        raise ValueError(
            f"device='auto' needs all parameters on one device, got {listed}; name the device."
        )
    return devices.pop()


def _available(device: torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"device={str(device)!r} is not available here ({error}); use 'auto' or 'cpu'."
        ) from error
    return device


def resolve_dtype(
    dtype: Any, state: Mapping[str, Tensor], device: torch.device
) -> tuple[torch.dtype, list[str]]:
    """Return the dtype of products, and what the status should say about it.

    None takes the widest floating dtype in the state, at least float32.

    Raises
    ------
    ValueError
        If ``dtype`` is another than float32 and float64, or float64 is missing on the device.
    TypeError
        If the state holds complex numbers.
    """
    complex_names = [name for name, tensor in state.items() if tensor.is_complex()]
    if complex_names:
        raise TypeError(
            f"model: {complex_names[0]!r} is complex; kernels are defined for real parameters."
        )
    own = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if dtype is not None:
        chosen = _DTYPES.get(str(dtype).removeprefix("torch."))
        if chosen is None:
            raise ValueError(f"dtype must be None, 'float32' or 'float64', got {dtype!r}.")
        if chosen is torch.float64 and device.type == "mps":
            raise ValueError("dtype='float64' does not exist on this device; use 'float32'.")
        return chosen, _precision_notes(own, chosen)
    if torch.float64 in own and device.type != "mps":
        return torch.float64, []
    return torch.float32, _precision_notes(own, torch.float32)


def _precision_notes(own: set[torch.dtype], chosen: torch.dtype) -> list[str]:
    half = sorted(_short(d) for d in own & {torch.float16, torch.bfloat16})
    return [f"{', '.join(half)} model measured in {_short(chosen)}"] if half else []


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
