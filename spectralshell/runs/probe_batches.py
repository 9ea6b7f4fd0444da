"""Probe batches: read once from what the user passed, so that every state sees the same data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import DataLoader, SequentialSampler

from spectralshell.warning_categories import RunWarning

_LABELS = "labels"


def read_probe_batches(probe_batches: Any) -> list[Any]:
    """Return the batches as a list; warn of a loader that shuffles, refuse a batch of no labels."""
    if isinstance(probe_batches, (str, bytes, Mapping)) or not isinstance(probe_batches, Iterable):
        raise TypeError(
            "probe_batches must be an iterable of batches (inputs, targets), got "
            f"{type(probe_batches).__name__}; a single batch is [(inputs, targets)]."
        )
    if _shuffles(probe_batches):
        warnings.warn(
            "probe_batches: the loader draws its samples at random, so another call gives other "
            "batches and its figures cannot be compared with these. They are read once, and all "
            "states of this call see the same; pass a loader with shuffle=False or a list.",
            RunWarning,
            stacklevel=3,
        )
    batches = list(probe_batches)
    if not batches:
        raise ValueError("probe_batches is empty; pass at least one batch (inputs, targets).")
    for position, batch in enumerate(batches):
        _check_labels(batch, position)
    return batches


def _shuffles(batches: Any) -> bool:
    """Tell of a loader of torch whether its order is not the data's own."""
    if not isinstance(batches, DataLoader) or batches.batch_size is None:
        return False
    return type(getattr(batches, "sampler", None)) is not SequentialSampler


def _check_labels(batch: Any, position: int) -> None:
    if isinstance(batch, Mapping):
        if batch.get(_LABELS) is None:
            raise ValueError(
                f"probe_batches[{position}] has no {_LABELS!r}, only "
                f"{', '.join(map(str, batch)) or 'nothing'}; add them, or pass pairs (inputs, "
                "targets)."
            )
    elif not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = type(batch).__name__
        length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(
            f"probe_batches[{position}] must be a pair (inputs, targets), got {what}{length}: a "
            "batch without labels has no error to measure."
        )
