"""Labels that a snapshot took out of a batch, held against the loss that the model computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from spectralshell.models.function import ModelFunction, map_tensors
from spectralshell.models.language import IGNORED, move_back, move_by_one
from spectralshell.statuses import own_loss_differs

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot

_SAMPLES = 2
"""On which the two are compared."""

_TOLERANCE = 1e-3
"""Relative: far above float32, in which models compute their loss, and below what a shift does."""

_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, MemoryError)
"""What a model may raise of some samples alone."""


def compare_with_own_loss(
    snapshot: Snapshot, function: ModelFunction, inputs: Any, n_samples: int
) -> tuple[str, ...]:
    """Return what the status should say of a model's own loss; ValueError if it shifts otherwise.

    Only where the model's class decided on that. Cost: one evaluation of two samples.
    """
    moved, targets = snapshot.labels_moved, snapshot.targets
    if moved is None or function.device.type == "meta" or len(targets) != n_samples:
        return ()
    labelled = (targets != IGNORED).flatten(1).any(dim=1).nonzero().flatten()[:_SAMPLES]
    targets = targets[labelled].to(function.device)
    labels = move_back(targets) if moved else targets
    found = _ask(function, _pick(inputs, labelled.to(function.device), n_samples), labels)
    if found is None:
        return ()
    own, logits = found
    measured = _mean_nll(logits, targets)
    if measured is None or _close(own, measured):
        return ()
    other = _mean_nll(logits, labels if moved else move_by_one(labels))
    if other is not None and _close(own, other):
        raise ValueError(
            f"inputs['labels']: {type(function.model).__name__} was taken for a model that "
            f"{'predicts the next token' if moved else 'takes labels as they are'}, and its own "
            f"loss says otherwise (it is {own:.4g}, and {measured:.4g} as read here); pass "
            f"shift={not moved}, or shift={moved} if the reading here is meant."
        )
    return (own_loss_differs(own, measured),)


def _ask(function: ModelFunction, inputs: Any, labels: Tensor) -> tuple[float, Tensor] | None:
    try:
        with function.guard():
            found = function.own_loss(inputs, labels)
    except _FAILURES:
        return None
    return None if found is None else (float(found[0]), found[1])


def _pick(inputs: Any, positions: Tensor, n_samples: int) -> Any:
    def pick(tensor: Tensor) -> Tensor:
        counts = tensor.ndim > 0 and tensor.shape[0] == n_samples
        return tensor.index_select(0, positions) if counts else tensor

    return map_tensors(pick, inputs)


def _mean_nll(logits: Tensor, targets: Tensor) -> float | None:
    """Return the mean cross-entropy, classes last; None where shapes or labels do not fit."""
    if logits.shape[:-1] != targets.shape or not bool((targets != IGNORED).any()):
        return None
    if int(targets.max()) >= logits.shape[-1]:  # the residual names the label
        return None
    return float(F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED))


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _TOLERANCE * max(abs(b), _TOLERANCE)
