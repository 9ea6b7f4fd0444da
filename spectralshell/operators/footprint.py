"""Counting what a kernel will cost, on a few samples, before the work is begun."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectralshell.operators.kernel_problem import Chunk, Evaluation
from spectralshell.operators.ladder import is_out_of_memory
from spectralshell.operators.layer_assembly import (
    LabelOf,
    Recording,
    UnitPlan,
    entry_layout,
    plan_unit,
    record,
)
from spectralshell.operators.layer_geometry import Affine

_COUNTED_SAMPLES = 2
"""One sample would not tell a dimension of samples from one that is broadcast over them."""


@dataclass(frozen=True)
class Footprint:
    """Sizes of a kernel problem; the same problem always has the same.

    Attributes
    ----------
    n_samples, n_slots : int
        Samples B, and the most entries C of one.
    n_entries : int
        Entries of the residual.
    n_parameters : int
    itemsize : int
        Bytes of a number of the products.
    forward_flops : float
        Operations of one evaluation of the whole batch.
    graph_bytes : float
        What a recorded pass holds for each sample.
    largest_activation : int
        Numbers of the largest output of a layer for one sample.
    n_nodes : int
        Nodes of the recorded graph, each an operation with its overhead.
    units : tuple of UnitPlan
        Layers and their orders of contraction.
    n_others : int
        Numbers of the parameters that need the gradients of each sample.
    """

    n_samples: int
    n_slots: int
    n_entries: int
    n_parameters: int
    itemsize: int
    forward_flops: float
    graph_bytes: float
    largest_activation: int
    n_nodes: int
    units: tuple[UnitPlan, ...]
    n_others: int


def measure_footprint(evaluation: Evaluation, label_of: LabelOf) -> Footprint:
    """Record two samples, and scale to the batch what the record holds.

    A model that does not run on two samples is recorded on the whole batch. To be called inside
    the model's guard.
    """
    problem = evaluation.problem
    n_few = min(_COUNTED_SAMPLES, problem.n_samples)
    try:
        recording, held, n_samples = _record_counting(
            evaluation, evaluation.take(0, n_few), label_of
        )
    except Exception as error:  # whatever a model raises that was built for another batch
        if is_out_of_memory(error):
            raise
        whole = evaluation.take(0, problem.n_samples)
        recording, held, n_samples = _record_counting(evaluation, whole, label_of)
    layout = entry_layout(evaluation)
    function = problem.function
    sizes = {n: p.numel() for n, p in zip(function.names, function.parameters, strict=True)}
    outputs = [use.output_shape for found in recording.units for use in found.uses]
    return Footprint(
        n_samples=layout.n_samples,
        n_slots=layout.n_slots,
        n_entries=int(evaluation.residual_vector.numel()),
        n_parameters=function.n_parameters,
        itemsize=layout.itemsize,
        forward_flops=evaluation.forward_flops,
        graph_bytes=held / n_samples,
        largest_activation=max(
            (torch.Size(shape).numel() // n_samples for shape in outputs), default=0
        ),
        n_nodes=_count_nodes(recording.entries),
        units=tuple(plan_unit(found.unit, layout, evaluation) for found in recording.units),
        n_others=sum(sizes[name] for name in recording.others),
    )


def _record_counting(
    evaluation: Evaluation, chunk: Chunk, label_of: LabelOf
) -> tuple[Recording, int, int]:
    """Return a recording, the bytes that it holds beside the parameters, and its samples."""
    names = evaluation.problem.function.names
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        recording = record(evaluation, chunk, names, label_of)
    for parameter in evaluation.problem.function.parameters:
        held.pop(parameter.untyped_storage()._cdata, None)
    factors = {
        id(use.geometry.factor): use.geometry.factor.untyped_storage().nbytes()
        for found in recording.units
        for use in found.uses
        if isinstance(use.geometry, Affine)
    }
    n_samples = chunk.samples.stop - chunk.samples.start
    return recording, sum(held.values()) + sum(factors.values()), int(n_samples)


def _count_nodes(output: Tensor) -> int:
    pending: list[Any] = [output.grad_fn]
    seen: Counter[Any] = Counter()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen[node] += 1
        pending += [following for following, _ in node.next_functions]
    return len(seen)
