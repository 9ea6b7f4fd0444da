"""Where the tests of operators, Krylov methods and estimators compute.

``SPECTRALSHELL_TEST_DEVICE=cuda`` sends models, inputs and targets to a GPU. By default they stay
on the CPU, where dense references are computed and random numbers are drawn in any case.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spectralshell.snapshots import Snapshot

CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("SPECTRALSHELL_TEST_DEVICE", "cpu"))


def place(value: Any, device: torch.device = DEVICE) -> Any:
    """Move a model (in place), a tensor, or what a mapping, list or tuple holds of them."""
    if isinstance(value, (torch.Tensor, nn.Module)):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: place(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(place(item, device) for item in value)
    return value


def make_tensor(values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Make a tensor of values on the device."""
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def place_snapshot(model: nn.Module, inputs: Any, targets: Any, **more: Any) -> Snapshot:
    """Make a snapshot whose model (moved in place), inputs and targets are on the device."""
    return Snapshot(place(model), place(inputs), place(targets), **more)


def place_trajectory(snapshots: list[Snapshot]) -> list[Snapshot]:
    """Return the same snapshots on the device, where the models that they share go too."""
    if DEVICE == CPU:
        return snapshots
    return [
        place_snapshot(
            s.model,
            s.inputs,
            s.targets,
            tau=s.tau,
            batch=s.batch,
            state=s.load_state(),
            name=s.name,
        )
        for s in snapshots
    ]
