"""A forward pass watched for the places where parameters are used, and in which way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spectralshell.operators.layers.rules import (
    Affine,
    Convolution,
    Geometry,
    Lookup,
    Matrix,
    Positions,
    Translation,
)


class ParameterUse:
    """One use of one parameter: ``gradient`` of a sample follows from the output's gradient.

    ``call`` is shared by the weight and the bias of one call.
    """

    def __init__(
        self,
        name: str,
        geometry: Geometry,
        edge: GradientEdge,
        call: int,
        output: Tensor,
        n_samples: int,
    ) -> None:
        self.name = name
        self.geometry = geometry
        self.edge = edge
        self.call = call
        self.n_samples = n_samples
        self.output_shape = tuple(output.shape)
        self._sources = [(t, t._version) for t in geometry.sources]

    @property
    def n_leading(self) -> int:
        """Size of the output's first dimension: a multiple of the number of samples."""
        return self.output_shape[0] if self.output_shape else 0

    @property
    def fan_out(self) -> int:
        """Outputs of one group of a matrix at one position."""
        if isinstance(self.geometry, Convolution):
            return self.output_shape[1] // self.geometry.n_groups
        return self.output_shape[-1]

    @property
    def n_positions(self) -> int:
        """Positions at which a matrix is applied to one sample."""
        groups = self.geometry.n_groups if isinstance(self.geometry, Positions) else 1
        return prod(self.output_shape) // (self.n_samples * groups * self.fan_out)

    @property
    def by_samples(self) -> bool:
        """Whether the output and what the rule reads can have samples as first dimension."""
        sizes = [t.shape[0] if t.ndim else 0 for t in self.geometry.sources]
        return all(s > 0 and s % self.n_samples == 0 for s in (self.n_leading, *sizes))

    @property
    def intact(self) -> bool:
        """Whether the input still holds what the function saw."""
        return all(tensor._version == version for tensor, version in self._sources)


class UseRecorder(TorchFunctionMode):
    """While active, notes every use of the parameters, by ``id``, that has a known geometry.

    Functions are seen, not modules; others, as fused kernels, only by :func:`count_graph_uses`.
    """

    def __init__(self, names: Mapping[int, str], n_samples: int) -> None:
        super().__init__()
        self.uses: list[ParameterUse] = []
        self._names = names
        self._n_samples = n_samples
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and note the parameters it was given."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        describe = _DESCRIPTIONS.get(func)
        if describe is not None and isinstance(output, Tensor) and output.requires_grad:
            self._note(describe, args, kwargs, output)
        return output

    def _note(self, describe: _Description, args: Any, kwargs: Any, output: Tensor) -> None:
        given = [*args, *kwargs.values()]
        if not any(id(value) in self._names for value in given if isinstance(value, Tensor)):
            return
        tangent = unpack_dual(output).tangent  # type: ignore[no-untyped-call]
        if is_functorch_wrapped_tensor(output) or tangent is not None:
            return  # the model differentiates here: its graph is another, or uses them again
        edge = get_gradient_edge(output)  # of this output, whatever is written to it later
        try:
            with torch.no_grad():
                found = describe(*args, output=output, **kwargs)
        except TypeError:  # arguments of a form that is not known here
            return
        self._calls += 1
        for tensor, geometry in found:
            name = self._names.get(id(tensor))
            if name is not None:
                use = ParameterUse(name, geometry, edge, self._calls, output, self._n_samples)
                self.uses.append(use)


def count_graph_uses(
    output: Tensor, names: Mapping[int, str], uses: Iterable[ParameterUse]
) -> tuple[Counter[str], list[ParameterUse]]:
    """Count the places in a recorded graph that use each leaf, named by ``id``, if through views.

    Returned with the noted uses that are in the graph.
    """
    users: dict[Any, list[Any]] = defaultdict(list)
    pending, seen = [output.grad_fn], set()
    leaves: dict[Any, str] = {}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is None:
                continue
            users[following].append(node)
            leaf = getattr(following, "variable", None)
            if leaf is None:
                pending.append(following)
            elif id(leaf) in names:
                leaves[following] = names[id(leaf)]
    found = [use for use in uses if use.edge.node in seen]
    noted = {use.edge.node for use in found}

    def count(node: Any) -> int:
        # One view may serve several: a forward pass, and its derivative inside the model.
        single = node not in noted and sum(f is not None for f, _ in node.next_functions) == 1
        return max(sum(map(count, users[node])), 1) if single else 1

    counts: Counter[str] = Counter()
    for leaf, name in leaves.items():
        counts[name] += sum(map(count, users[leaf]))
    return counts, found


_Found = list[tuple[Any, Geometry]]

_Description = Callable[..., _Found]


def _linear(input: Tensor, weight: Tensor, bias: Any = None, *, output: Tensor) -> _Found:
    if weight.ndim != 2 or input.ndim < 2:
        return []
    return [(weight, Matrix(input)), (bias, Translation(_trailing(bias, output)))]


def _matmul(input: Tensor, other: Tensor, *, output: Tensor) -> _Found:
    if other.ndim != 2 or input.ndim < 2:
        return []
    return [(other, Matrix(input, transposed=True))]


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1, output: Tensor
) -> _Found:
    if beta != 1 or alpha != 1:
        return []
    shift = (input, Translation(_trailing(input, output)))
    return [(mat2, Matrix(mat1, transposed=True)), shift]


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    output: Tensor,
) -> _Found:
    if input.ndim != weight.ndim:  # a single sample without its dimension
        return []
    geometry = Convolution(input, tuple(weight.shape[2:]), stride, padding, dilation, groups)
    return [(weight, geometry), (bias, Translation(_channels(output)))]


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    output: Tensor,
) -> _Found:
    if max_norm is not None or scale_grad_by_freq or input.ndim == 0:
        return []
    return [(weight, Lookup(input, int(weight.shape[0]), padding_idx))]


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    output: Tensor,
) -> _Found:
    shape = tuple(normalized_shape)
    unit = F.layer_norm(input, shape, None, None, eps)
    return [(weight, Affine(unit, shape)), (bias, Translation(shape))]


def _rms_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    eps: float | None = None,
    *,
    output: Tensor,
) -> _Found:
    shape = tuple(normalized_shape)
    return [(weight, Affine(F.rms_norm(input, shape, None, eps), shape))]


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    output: Tensor,
) -> _Found:
    unit = F.group_norm(input, num_groups, None, None, eps)
    return [(weight, Affine(unit, _channels(output))), (bias, Translation(_channels(output)))]


def _batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    output: Tensor,
) -> _Found:
    if training:  # then samples are coupled
        return []
    unit = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return [(weight, Affine(unit, _channels(output))), (bias, Translation(_channels(output)))]


def _product(input: Any, other: Any, *, output: Tensor) -> _Found:
    return [
        (factor, Affine(rest.detach(), tuple(factor.shape)))
        for factor, rest in ((input, other), (other, input))
        if _is_broadcast(factor, output) and _has_samples(rest, output)
    ]


def _sum(input: Any, other: Any, *, output: Tensor) -> _Found:
    return [
        (term, Translation(tuple(term.shape)))
        for term, rest in ((input, other), (other, input))
        if _is_broadcast(term, output) and _has_samples(rest, output)
    ]


def _is_broadcast(tensor: Any, output: Tensor) -> bool:
    """Tell whether every sample meets the same values."""
    return isinstance(tensor, Tensor) and (
        tensor.ndim < output.ndim or (output.ndim > 0 and tensor.shape[0] == 1)
    )


def _has_samples(tensor: Any, output: Tensor) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.ndim == output.ndim > 0
        and tensor.shape[0] == output.shape[0]
    )


def _channels(output: Tensor) -> tuple[int, ...]:
    """Shape in which one number a channel is broadcast over (samples, channels, …)."""
    return (int(output.shape[1]), *(1,) * (output.ndim - 2))


def _trailing(bias: Any, output: Tensor) -> tuple[int, ...]:
    return tuple(bias.shape) if isinstance(bias, Tensor) else (int(output.shape[-1]),)


_DESCRIPTIONS: dict[Any, _Description] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    torch.mul: _product,
    torch.Tensor.mul: _product,
    torch.Tensor.__mul__: _product,
    torch.Tensor.__rmul__: _product,
    torch.add: _sum,
    torch.Tensor.add: _sum,
    torch.Tensor.__add__: _sum,
    torch.Tensor.__radd__: _sum,
}
