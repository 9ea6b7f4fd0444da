"""Rules for a parameter's gradient of each sample, from a layer's input and output gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any

from torch import Tensor
from torch.nn import functional as F


class Geometry(ABC):
    """Rule of one use of a parameter, and the tensors of the forward pass that it reads."""

    sources: tuple[Tensor, ...] = ()

    @abstractmethod
    def gradient(self, cotangent: Tensor, n_samples: int, rows: slice | None = None) -> Tensor:
        """Return the parameter's gradient for each sample, of some rows of it or of all.

        Shape (n_samples, n_rows, n_columns): the parameter flattened behind its first dimension.
        """


class Positions(Geometry):
    """A matrix applied at positions: gradient = Σ_p g_p a_pᵀ, in blocks for groups.

    ``fan_in`` and ``fan_out`` are those of one block.
    """

    n_groups = 1
    fan_in: int
    fan_out: int

    @abstractmethod
    def inputs(self, n_samples: int, samples: slice = slice(None)) -> Tensor:
        """Return the inputs of some samples, shape (samples, n_groups, fan_in, n_positions)."""

    @abstractmethod
    def outputs(self, cotangent: Tensor, n_samples: int) -> Tensor:
        """Return the output gradients, shape (n_samples, n_groups, fan_out, n_positions)."""


class Matrix(Positions):
    """``y = x Wᵀ``, or ``y = x W`` where transposed, on the last dimension of x."""

    def __init__(self, source: Tensor, *, transposed: bool = False) -> None:
        self.source = source.detach()
        self.sources = (source,)
        self.transposed = transposed
        self.fan_in = int(source.shape[-1])

    def inputs(self, n_samples: int, samples: slice = slice(None)) -> Tensor:
        """Return the inputs of some samples, shape (samples, 1, fan_in, n_positions)."""
        source = self.source.reshape(n_samples, 1, -1, self.fan_in)
        return source[samples].transpose(2, 3)

    def outputs(self, cotangent: Tensor, n_samples: int) -> Tensor:
        """Return the output gradients, shape (n_samples, 1, fan_out, n_positions)."""
        return cotangent.reshape(n_samples, 1, -1, cotangent.shape[-1]).transpose(2, 3)

    def gradient(self, cotangent: Tensor, n_samples: int, rows: slice | None = None) -> Tensor:
        """Return the gradient of each sample, shape (n_samples, n_rows, n_columns)."""
        left, right = self.outputs(cotangent, n_samples), self.inputs(n_samples)
        if self.transposed:
            left, right = right, left
        if rows is not None:
            left = left[:, :, rows]
        return (left @ right.transpose(2, 3)).squeeze(1)


class Convolution(Positions):
    """A convolution in any number of dimensions, its input unfolded into patches."""

    def __init__(
        self,
        source: Tensor,
        kernel: tuple[int, ...],
        stride: Any,
        padding: Any,
        dilation: Any,
        n_groups: int,
    ) -> None:
        self.source = source.detach()
        self.sources = (source,)
        self.kernel = kernel
        self.stride = _each(stride, len(kernel))
        self.dilation = _each(dilation, len(kernel))
        self.margins = _margins(padding, kernel, self.dilation)
        self.n_groups = n_groups
        self.fan_in = int(source.shape[1]) // n_groups * prod(kernel)

    def inputs(self, n_samples: int, samples: slice = slice(None)) -> Tensor:
        """Return the patches of some samples, shape (samples, n_groups, fan_in, n_positions)."""
        source = self.source.reshape(n_samples, -1, *self.source.shape[1:])[samples]
        repeats = source.shape[1]
        windows = source.flatten(0, 1)
        if any(self.margins):
            windows = F.pad(windows, self.margins)
        n_dims = len(self.kernel)
        for axis, (size, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True), start=2
        ):
            windows = windows.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        order = (0, 1, *range(2 + n_dims, 2 + 2 * n_dims), *range(2, 2 + n_dims))
        patches = windows.permute(order).reshape(
            -1, repeats, self.n_groups, self.fan_in, prod(windows.shape[2 : 2 + n_dims])
        )
        return _repeats_as_positions(patches)

    def outputs(self, cotangent: Tensor, n_samples: int) -> Tensor:
        """Return the output gradients, shape (n_samples, n_groups, fan_out, n_positions)."""
        fan_out = int(cotangent.shape[1]) // self.n_groups
        positions = prod(cotangent.shape[2:])
        split = cotangent.reshape(n_samples, -1, self.n_groups, fan_out, positions)
        return _repeats_as_positions(split)

    def gradient(self, cotangent: Tensor, n_samples: int, rows: slice | None = None) -> Tensor:
        """Return the gradient of each sample, shape (n_samples, n_rows, n_columns)."""
        outputs = self.outputs(cotangent, n_samples)
        by_group = outputs @ self.inputs(n_samples).transpose(2, 3)
        gradient = by_group.reshape(n_samples, -1, self.fan_in)
        return gradient if rows is None else gradient[:, rows]


class Lookup(Geometry):
    """An embedding: each row of the table collects the gradients of the places it went to."""

    def __init__(self, indices: Tensor, n_entries: int, padding: int | None) -> None:
        self.indices = indices.detach()
        self.sources = (indices,)
        self.n_entries = n_entries
        self.padding = padding

    def gradient(self, cotangent: Tensor, n_samples: int, rows: slice | None = None) -> Tensor:
        """Return the gradient of each sample, shape (n_samples, n_rows, n_columns)."""
        indices = self.indices.reshape(n_samples, -1)
        moved = cotangent.reshape(n_samples, indices.shape[1], -1)
        first, last, _ = (rows or slice(None)).indices(self.n_entries)
        inside = (indices >= first) & (indices < last)
        if self.padding is not None:
            inside = inside & (indices != self.padding % self.n_entries)
        moved = moved * inside.unsqueeze(-1)
        places = (indices - first).clamp(0, last - first - 1).unsqueeze(-1).expand_as(moved)
        table = moved.new_zeros(n_samples, last - first, moved.shape[2])
        return table.scatter_add_(1, places, moved)


class Affine(Geometry):
    """A factor of every sample's values, ``y = x̂ ∘ w``, as in the normalisations."""

    def __init__(self, factor: Tensor, shape: tuple[int, ...]) -> None:
        self.factor = factor
        self.sources = (factor,)
        self.shape = shape

    def gradient(self, cotangent: Tensor, n_samples: int, rows: slice | None = None) -> Tensor:
        """Return the gradient of each sample, shape (n_samples, n_rows, n_columns)."""
        return _as_rows(
            _sum_to(cotangent * self.factor, self.shape, n_samples), n_samples, self.shape, rows
        )


class Translation(Geometry):
    """A term of every sample's values, ``y = x + b``: biases, learned positions."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def gradient(self, cotangent: Tensor, n_samples: int, rows: slice | None = None) -> Tensor:
        """Return the gradient of each sample, shape (n_samples, n_rows, n_columns)."""
        return _as_rows(_sum_to(cotangent, self.shape, n_samples), n_samples, self.shape, rows)


def _repeats_as_positions(values: Tensor) -> Tensor:
    """Join (samples, repeats, groups, features, positions) to (…, repeats · positions)."""
    if values.shape[1] == 1:
        return values.squeeze(1)
    return values.permute(0, 2, 3, 1, 4).flatten(3)


def _sum_to(values: Tensor, shape: tuple[int, ...], n_samples: int) -> Tensor:
    """Sum (rows, …) over what a tensor of this shape was broadcast over, but for the samples."""
    values = values.reshape(n_samples, -1, *values.shape[1:])
    while len(shape) > values.ndim - 2:
        if shape[0] != 1:
            raise ValueError(f"a tensor of shape {shape} is not broadcast over samples")
        shape = shape[1:]
    front = values.ndim - len(shape)
    repeated = [axis for axis in range(1, values.ndim) if axis < front or shape[axis - front] == 1]
    return values.sum(repeated)


def _as_rows(values: Tensor, n_samples: int, shape: tuple[int, ...], rows: slice | None) -> Tensor:
    wide = [size for size in shape if size != 1]
    first = wide[0] if wide and shape[0] != 1 else 1
    table = values.reshape(n_samples, first, -1)
    return table if rows is None else table[:, rows]


def _each(value: Any, n_dims: int) -> tuple[int, ...]:
    return (int(value),) * n_dims if isinstance(value, int) else _spread(tuple(value), n_dims)


def _spread(values: tuple[int, ...], n_dims: int) -> tuple[int, ...]:
    return values * n_dims if len(values) == 1 else values


def _margins(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """Return the padding as ``torch.nn.functional.pad`` takes it, last dimension first."""
    if padding == "valid":
        return (0,) * (2 * len(kernel))
    if padding == "same":
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(size, size) for size in _each(padding, len(kernel))]
    return tuple(size for side in reversed(sides) for size in side)
