"""The error vectors that the kernel acts on, and which Jacobian belongs to each.

Five kinds, in one table: what e is, what J differentiates, and in which direction the parameters
move. All values here are bare; the operator divides both e and J by the root of the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spectralshell.models.language import IGNORED

_TOKEN_NDIM = 3

_BLOCK = 2**20
"""Numbers of log-probabilities that are made at a time: one array of them beside the outputs, of
tokens times vocabulary, would fill the memory before anything else does."""


@dataclass(frozen=True)
class Targets:
    """Targets checked against the outputs, ready for repeated use.

    Attributes
    ----------
    values : object
        Real values in the shape of the outputs; or the labels of the rows kept, shape (N,); or for
        a callable residual whatever the user passed.
    n_rows : int
        N, by whose root e and J are divided.
    is_labels : bool
        Whether ``values`` are class labels.
    rows : Tensor of int64 or None
        Positions of the rows kept among all rows of the outputs; None keeps all.
    class_axis : int
        Dimension of the outputs that counts classes, where ``values`` are labels.
    rows_per_sample : int
        Labels of one sample, kept or not.
    """

    values: Any
    n_rows: int
    is_labels: bool = False
    rows: Tensor | None = None
    class_axis: int = -1
    rows_per_sample: int = 1

    def to(self, device: torch.device, dtype: torch.dtype) -> Targets:
        """Return the targets on a device, real values in ``dtype``."""
        rows = None if self.rows is None else self.rows.to(device)
        return replace(self, values=_move(self.values, device, dtype), rows=rows)

    def samples(self, start: int, stop: int, n_samples: int) -> Targets:
        """Return the targets of some samples, ``n_rows`` still that of the whole batch."""
        if not self.is_labels:
            return replace(self, values=_slice_samples(self.values, start, stop, n_samples))
        first, last = start * self.rows_per_sample, stop * self.rows_per_sample
        if self.rows is None:
            return replace(self, values=self.values[first:last])
        inside = (self.rows >= first) & (self.rows < last)
        return replace(self, values=self.values[inside], rows=self.rows[inside] - first)


@dataclass(frozen=True)
class Residual:
    """One kind of error, with its Jacobian and its dynamics.

    Attributes
    ----------
    name : str
    dynamics_exact : bool
        Whether de/dt = −M e holds along the parameter velocity ``velocity_sign`` Jᵀe.
    velocity_sign : int
        +1 where J differentiates the prediction, −1 where it differentiates e itself.

    Notes
    -----
    ============= ========================== ================= ============
    name          e                          J of              velocity
    ============= ========================== ================= ============
    mse           y − f(x)                   f                 +Jᵀe
    brier         onehot(y) − softmax(z)     softmax(z)        +Jᵀe
    cross-entropy onehot(y) − softmax(z)     logits z          +Jᵀe
    nll           −log p(y | x), one per row e                 −Jᵀe
    callable      f(outputs, targets)        e                 −Jᵀe
    ============= ========================== ================= ============

    N counts the rows that have a label. Under ``"mse"`` with real targets it counts samples, but
    tokens where outputs have the three dimensions (B, T, V) of one prediction per token:
    N = B T, as for labels. A callable has N = number of samples.

    Under ``"cross-entropy"`` the velocity is that of training on the cross-entropy, but J is not
    the Jacobian of −e, so de/dt ≠ −M e. Under ``"nll"`` the velocity is the gradient flow of
    ½E‖e‖², while a language model trains on the mean of e: ``dynamics_exact`` is False.
    """

    name: str
    dynamics_exact: bool
    velocity_sign: int
    prepare_targets: Callable[[Any, Tensor, int | None], Targets]
    error_function: Callable[[Tensor, Targets], Tensor]
    differentiated_function: Callable[[Tensor, Targets], Tensor]
    error_sensitivity: Callable[[Tensor, Tensor], Tensor]

    @property
    def is_callable(self) -> bool:
        """Whether the user's own function computes e, of which nothing is known."""
        return self.prepare_targets is _prepare_anything

    def prepare(self, targets: Any, outputs: Tensor, class_axis: int | None = None) -> Targets:
        """Check targets against the model's outputs.

        Parameters
        ----------
        targets : object
            As the user passed them, on any device.
        outputs : Tensor
            Outputs of the model on the whole batch, samples first.
        class_axis : int, optional
            Dimension of the outputs that counts classes. None reads it off the shape of the
            labels: dimension 1, as torch's own losses have it, or the last one.

        Returns
        -------
        Targets

        Raises
        ------
        ValueError
            If lengths, shapes or class indices do not fit, both readings of the classes fit, there
            is one class only, or values are NaN or infinite.
        TypeError
            If the dtype is wrong: labels must be integers.
        """
        if isinstance(targets, Targets):
            return targets
        return self.prepare_targets(targets, outputs, class_axis)

    def error(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return e without its 1/√N, shape (rows, …); differentiable in ``outputs``."""
        return self.error_function(outputs, self.prepare(targets, outputs))

    def jacobian_of(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return what J differentiates, without its 1/√N, in the shape of :meth:`error`."""
        return self.differentiated_function(outputs, self.prepare(targets, outputs))

    def error_rate(self, values: Tensor, rate: Tensor) -> Tensor:
        """Return de/dt from the rate of what J differentiates.

        Parameters
        ----------
        values : Tensor, shape (rows, …)
            :meth:`jacobian_of`, without 1/√N.
        rate : Tensor, same shape
            Its derivative along some parameter direction, with or without 1/√N (it is linear).
        """
        return self.error_sensitivity(values, rate)

    def velocity_cotangent(self, residual_vector: Tensor) -> Tensor:
        """Return c such that the parameter velocity of the table is Jᵀc."""
        return self.velocity_sign * residual_vector

    def training_cotangent(self, residual_vector: Tensor, n_rows: int) -> Tensor:
        """Return c such that Jᵀc is minus the gradient of the usual training loss.

        It differs from :meth:`velocity_cotangent` for ``"nll"`` alone, where training follows the
        mean of e: c = −1/√N.
        """
        if self.name == "nll":
            return torch.full_like(residual_vector, -(n_rows**-0.5))
        return self.velocity_cotangent(residual_vector)


def resolve_residual(residual: str | Callable[[Tensor, Any], Tensor]) -> Residual:
    """Return the residual with a given name, or one around a callable.

    Parameters
    ----------
    residual : {"mse", "brier", "cross-entropy", "nll"} or callable
        A callable takes (outputs, targets) and returns a floating tensor, sample dimension first.

    Returns
    -------
    Residual

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If ``residual`` is neither a name nor callable.

    Examples
    --------
    >>> import torch
    >>> outputs = torch.tensor([[2.0, -1.0], [0.0, 0.5]])
    >>> resolve_residual("mse").error(outputs, torch.tensor([0, 1]))
    tensor([[-1.0000,  1.0000],
            [ 0.0000,  0.5000]])
    """
    if isinstance(residual, Residual):
        return residual
    if isinstance(residual, str):
        if residual not in _NAMED:
            listed = ", ".join(repr(name) for name in _NAMED)
            raise ValueError(f"residual must be one of {listed}, or a callable, got {residual!r}.")
        return _NAMED[residual]
    if not callable(residual):
        raise TypeError(f"residual must be a name or a callable, got {type(residual).__name__}.")
    error = partial(_call_residual, residual)
    label = getattr(residual, "__name__", type(residual).__name__)
    return Residual(label, True, -1, _prepare_anything, error, error, _same_rate)


def _prepare_labels(targets: Any, outputs: Tensor, class_axis: int | None) -> Targets:
    labels = _require_tensor(targets)
    if outputs.ndim < 2:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} have no class dimension: this residual needs "
            "outputs of shape (n_samples, n_classes, …) or (n_samples, …, n_classes)."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"targets must be integer class labels for this residual, got dtype {labels.dtype}; "
            'use residual="mse" for real values.'
        )
    axis = _find_class_axis(labels, outputs, class_axis)
    n_classes = outputs.shape[axis]
    if n_classes == 1:
        raise ValueError(
            f"targets: integers of shape {tuple(labels.shape)} beside outputs of shape "
            f"{tuple(outputs.shape)} are labels of a single class, or real values. For real values "
            'pass targets of the outputs\' shape with residual="mse"; a binary classifier with one '
            "logit needs two (0 and the logit), or a callable residual."
        )
    labels = labels.detach().reshape(-1).long()
    found = partial(
        Targets,
        is_labels=True,
        class_axis=axis,
        rows_per_sample=outputs.shape[1:].numel() // n_classes,
    )
    if labels.is_meta:
        return found(labels, labels.numel())
    kept = labels != IGNORED
    wrong = labels[kept & ((labels < 0) | (labels >= n_classes))]
    if wrong.numel():
        raise ValueError(
            f"targets hold the class index {int(wrong[0])}, out of range for {n_classes} classes "
            f"(dimension {axis} of the outputs); {IGNORED} leaves a row out."
        )
    n_rows = int(kept.sum())
    if n_rows == 0:
        raise ValueError(f"targets are all {IGNORED}, which leaves no row; label at least one.")
    if n_rows == labels.numel():
        return found(labels, n_rows)
    return found(labels[kept], n_rows, rows=kept.nonzero().reshape(-1))


def _find_class_axis(labels: Tensor, outputs: Tensor, class_axis: int | None) -> int:
    """Return the dimension of the outputs that counts classes; where two fit, the user decides."""
    shape = outputs.shape
    if class_axis is not None and not (
        1 <= class_axis < len(shape) or 1 - len(shape) <= class_axis < 0
    ):
        raise ValueError(
            f"class_axis={class_axis} cannot count the classes of outputs of shape {tuple(shape)}: "
            "the first dimension counts samples, and one of the others is needed."
        )
    allowed = [1, len(shape) - 1] if class_axis is None else [class_axis % len(shape)]
    rows = {axis: shape[:axis] + shape[axis + 1 :] for axis in allowed}
    fitting = [axis for axis, size in rows.items() if labels.shape == size]
    if not fitting:
        expected = " or ".join(f"{tuple(size)}" for size in dict.fromkeys(rows.values()))
        raise ValueError(
            f"targets of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(shape)}: "
            f"expected shape {expected}, one class label per row, with the classes in dimension "
            f"{' or '.join(map(str, rows))} of the outputs."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"targets of shape {tuple(labels.shape)} fit outputs of shape {tuple(shape)} in two "
            f"ways: the classes may be in dimension {fitting[0]}, as in torch's losses, or in "
            f"dimension {fitting[1]}; say which with Snapshot(..., class_axis={fitting[0]}) or "
            f"class_axis={fitting[1]}."
        )
    return fitting[0]


def _prepare_real_or_labels(targets: Any, outputs: Tensor, class_axis: int | None) -> Targets:
    values = _require_tensor(targets)
    if values.shape == outputs.shape:
        if values.is_complex():
            raise TypeError(f"targets must be real, got dtype {values.dtype}.")
        values = values.detach()
        if not values.is_floating_point():
            values = values.to(torch.float64)
        if not values.is_meta and not bool(torch.isfinite(values).all()):
            raise ValueError("targets hold NaN or infinite values; remove those samples.")
        # Labels of token outputs (B, T, V) give one row per token: so do their one-hot values.
        n_rows = outputs.shape[0]
        if outputs.ndim == _TOKEN_NDIM:
            n_rows = outputs.numel() // outputs.shape[-1 if class_axis is None else class_axis]
        return Targets(values, n_rows)
    if not values.is_floating_point() and values.ndim == outputs.ndim - 1:
        return _prepare_labels(values, outputs, class_axis)
    raise ValueError(
        f"targets of shape {tuple(values.shape)} and dtype {values.dtype} do not fit outputs of "
        f"shape {tuple(outputs.shape)}: expected the same shape, or integer class labels of shape "
        f"{tuple(outputs.shape[:-1])}."
    )


def _prepare_anything(targets: Any, outputs: Tensor, class_axis: int | None) -> Targets:
    return Targets(targets, int(outputs.shape[0]))


def _label_rows(outputs: Tensor, targets: Targets) -> Tensor:
    last = outputs.movedim(targets.class_axis, -1)
    rows = last.reshape(-1, last.shape[-1])
    return rows if targets.rows is None else rows.index_select(0, targets.rows)


def _one_hot(rows: Tensor, targets: Targets) -> Tensor:
    hot: Tensor = torch.zeros_like(rows).scatter(1, targets.values.unsqueeze(1), 1.0)
    return hot


def _mse_error(outputs: Tensor, targets: Targets) -> Tensor:
    if targets.is_labels:
        rows = _label_rows(outputs, targets)
        return _one_hot(rows, targets) - rows
    values: Tensor = targets.values.to(outputs.dtype)
    return values - outputs


def _mse_values(outputs: Tensor, targets: Targets) -> Tensor:
    return _label_rows(outputs, targets) if targets.is_labels else outputs


def _probability_error(outputs: Tensor, targets: Targets) -> Tensor:
    rows = _label_rows(outputs, targets)
    return _one_hot(rows, targets) - rows.softmax(-1)


def _probabilities(outputs: Tensor, targets: Targets) -> Tensor:
    return _label_rows(outputs, targets).softmax(-1)


def _negative_log_likelihood(outputs: Tensor, targets: Targets) -> Tensor:
    if outputs.numel() <= _BLOCK:
        return _nll_of(_label_rows(outputs, targets), targets.values)
    # All rows in blocks that are views, where a choice of rows would be a copy of them.
    rows = _label_rows(outputs, replace(targets, rows=None))
    labels = targets.values
    if targets.rows is not None:
        labels = labels.new_zeros(len(rows)).index_copy(0, targets.rows, labels)
    size = max(1, _BLOCK // rows.shape[-1])
    blocks = zip(rows.split(size), labels.split(size), strict=True)
    nll = torch.cat([_nll_of(*block) for block in blocks])
    return nll if targets.rows is None else nll.index_select(0, targets.rows)


def _nll_of(rows: Tensor, labels: Tensor) -> Tensor:
    log_p: Tensor = rows.log_softmax(-1)
    picked: Tensor = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    return -picked


def _call_residual(
    function: Callable[[Tensor, Any], Any], outputs: Tensor, targets: Targets
) -> Tensor:
    label = getattr(function, "__name__", type(function).__name__)
    try:
        error = function(outputs, targets.values)
    except (RuntimeError, ValueError, TypeError) as failure:
        # The same type, by which differentiation tells what it may try next; not its subclasses.
        raised = type(failure)
        if raised not in (RuntimeError, ValueError, TypeError):
            raise
        raise raised(
            f"residual {label!r} failed on outputs of shape {tuple(outputs.shape)}: {failure}"
        ) from failure
    if not isinstance(error, Tensor) or not error.is_floating_point():
        kind = error.dtype if isinstance(error, Tensor) else type(error).__name__
        raise TypeError(f"residual {label!r} must return a floating tensor, got {kind}.")
    if error.ndim == 0 or error.shape[0] != outputs.shape[0]:
        raise ValueError(
            f"residual {label!r} returned shape {tuple(error.shape)} for {outputs.shape[0]} "
            "samples: return one entry or row per sample, sample dimension first, not a mean or "
            "a sum."
        )
    return error


def _opposite_rate(values: Tensor, rate: Tensor) -> Tensor:
    return -rate


def _same_rate(values: Tensor, rate: Tensor) -> Tensor:
    return rate


def _softmax_rate(values: Tensor, rate: Tensor) -> Tensor:
    p = values.softmax(-1)
    return -(p * rate - p * (p * rate).sum(-1, keepdim=True))


def _require_tensor(targets: Any) -> Tensor:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor or an array, got {type(targets).__name__}.")
    return targets


def _move(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        value = value.detach()
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, tuple):
        return tuple(_move(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _move(item, device, dtype) for key, item in value.items()}
    return value


def _slice_samples(value: Any, start: int, stop: int, n_samples: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim and value.shape[0] == n_samples else value
    if isinstance(value, tuple):
        return tuple(_slice_samples(item, start, stop, n_samples) for item in value)
    if isinstance(value, dict):
        return {k: _slice_samples(item, start, stop, n_samples) for k, item in value.items()}
    return value


_NAMED = {
    "mse": Residual(
        "mse", True, 1, _prepare_real_or_labels, _mse_error, _mse_values, _opposite_rate
    ),
    "brier": Residual(
        "brier", True, 1, _prepare_labels, _probability_error, _probabilities, _opposite_rate
    ),
    "cross-entropy": Residual(
        "cross-entropy", False, 1, _prepare_labels, _probability_error, _label_rows, _softmax_rate
    ),
    "nll": Residual(
        "nll",
        False,
        -1,
        _prepare_labels,
        _negative_log_likelihood,
        _negative_log_likelihood,
        _same_rate,
    ),
}
