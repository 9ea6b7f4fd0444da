"""The exact kernel M = Σ M_l: recorded forward passes, one backward pass a slot, contractions."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralshell.operators.jacobian.linearizations import check_depends
from spectralshell.operators.layers.recording import UseRecorder, count_graph_uses
from spectralshell.operators.layers.stores import (
    EntryLayout,
    KernelSum,
    LayerStore,
    make_store,
    passing_numbers,
    store_bytes,
)
from spectralshell.operators.layers.units import RecordedUnit, Unit, choose_order, find_units
from spectralshell.operators.problem import Chunk, Evaluation

_RecordSample = Callable[[int], tuple[Tensor, Tensor, Sequence[Tensor]]]
"""Maps a sample to its entries (with their graph), their slots, and the leaves."""

LabelOf = Callable[[str], str]

OnRecord = Callable[[Tensor, tuple[Tensor, ...]], None]

SLICES = 8
"""A table that a contraction makes at a time is this part of what the layers may take."""


@dataclass(frozen=True)
class LayerKernels:
    """Kernels by label, and how they were found."""

    kernels: dict[str, Tensor]
    # By the unit's first parameter; ``"samples"`` for per-sample gradients.
    orders: dict[str, str]
    # Parameters that were contracted together.
    units: tuple[tuple[str, ...], ...]
    rung: str = "layers"
    # Products behind the kernels, and products spent on checks.
    n_matvecs: int = 0
    n_probes: int = 1
    # Relative rounding error, where it is known.
    noise: float | None = None
    # What the status should say.
    notes: tuple[str, ...] = ()

    def total(self) -> Tensor:
        """Return M = Σ M_l."""
        kernels = list(self.kernels.values())
        if len(kernels) == 1:
            return kernels[0]
        total = kernels[0].clone()
        for kernel in kernels[1:]:
            total += kernel
        return total


class StructureError(ValueError):
    """Chunks use parameters in different ways; ``args[1]`` names those parameters."""


@dataclass(frozen=True)
class Recording:
    """A forward pass with its graph, and the parameters sorted into units."""

    entries: Tensor
    leaves: tuple[Tensor, ...]
    units: list[RecordedUnit]
    others: list[str]


@dataclass(frozen=True)
class UnitPlan:
    """How a unit is contracted, and the bytes that it holds until then."""

    unit: Unit
    order: str
    n_numbers: int
    held_bytes: int

    @property
    def passing_numbers(self) -> int:
        """Numbers held for each entry of a chunk, until its end."""
        return passing_numbers(self.unit, self.order, self.n_numbers)


def contract_layers(
    evaluation: Evaluation,
    *,
    label_of: LabelOf,
    refused: Collection[str] = (),
    only: Collection[str] | None = None,
    max_bytes: int,
    record_size: int | None = None,
    on_record: OnRecord | None = None,
) -> LayerKernels:
    """Build the kernel of every label, of the parameters in ``only``, without ``refused`` units.

    Inside the model's guard; ``on_record`` sees each chunk's graph once, with its leaves.
    """
    names = evaluation.problem.function.names if only is None else only
    chunks = [chunk for _, chunk in evaluation.chunks_with_entries(record_size)]
    layout = entry_layout(evaluation)
    first = record(evaluation, chunks[0], names, label_of, refused)
    plans = [plan_unit(found.unit, layout, evaluation) for found in first.units]
    others = first.others
    kept: Recording | None = first
    del first  # the graph must go when ``kept`` goes
    sums = {label_of(name): KernelSum(layout) for name in names}
    # A group costs a forward pass, and as many backward passes as a sample has entries.
    # Without a unit there is still a pass to be watched.
    for turn, group in enumerate(group_units(plans, max_bytes) or [slice(0, 0)]):
        stores = [
            make_store(plan.unit, layout, plan.order, plan.n_numbers, max_bytes // SLICES)
            for plan in plans[group]
        ]
        for chunk in chunks:
            if kept is None:
                kept = record(evaluation, chunk, names, label_of, refused)
                _check_same(kept, plans, others)
            if on_record is not None and turn == 0:
                on_record(kept.entries, kept.leaves)
            _run_backward(kept, group, stores, chunk, _slots(evaluation, chunk), layout)
            if len(chunks) > 1 or group.stop == len(plans):
                kept = None
        while stores:
            store = stores.pop()
            store.add_to(sums[store.unit.label])
            del store
    kept = None
    _add_others(evaluation, others, label_of, sums, max_bytes // SLICES)
    orders = {plan.unit.names[0]: plan.order for plan in plans}
    return LayerKernels(
        {label: total.finish() for label, total in sums.items()},
        orders=orders | dict.fromkeys(others, "samples"),
        units=(*(plan.unit.names for plan in plans), *((name,) for name in others)),
    )


def record(
    evaluation: Evaluation,
    chunk: Chunk,
    names: Collection[str],
    label_of: LabelOf,
    refused: Collection[str] = (),
) -> Recording:
    """Evaluate the model on a chunk with its graph, and sort its parameters into units."""
    function = evaluation.problem.function
    leaves = tuple(parameter.detach().requires_grad_() for parameter in function.parameters)
    by_id = {id(leaf): name for leaf, name in zip(leaves, function.names, strict=True)}
    with torch.enable_grad(), UseRecorder(by_id, chunk.n_samples) as recorder, _cut_graphs_fail():
        entries = evaluation.vector_function(chunk)(*leaves)
    check_depends(entries)
    counts, uses = count_graph_uses(entries, by_id, recorder.uses)
    units, others = find_units(uses, counts, names, label_of, refused)
    return Recording(entries, leaves, units, others)


@contextmanager
def _cut_graphs_fail() -> Iterator[None]:
    """Refuse a checkpoint that hides its parameters from the graph, where torch only warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
        try:
            yield
        except UserWarning as warning:
            raise ValueError(
                "model: torch.utils.checkpoint with use_reentrant=True gives the parameters inside "
                "no gradients where none of its inputs has one; set use_reentrant=False."
            ) from warning


def plan_unit(unit: Unit, layout: EntryLayout, evaluation: Evaluation) -> UnitPlan:
    """Choose a unit's order of contraction, and count what it holds until then."""
    function = evaluation.problem.function
    n_numbers = sum(function.parameters[function.names.index(name)].numel() for name in unit.names)
    order = choose_order(unit, layout.n_samples, layout.n_slots)
    return UnitPlan(unit, order, n_numbers, store_bytes(unit, layout, order, n_numbers))


def group_units(plans: Sequence[UnitPlan], max_bytes: int) -> list[slice]:
    """Return ranges of units whose stores fit together, in the order of the forward pass."""
    groups: list[slice] = []
    start, held = 0, 0
    for index, plan in enumerate(plans):
        if index > start and held + plan.held_bytes > max_bytes:
            groups.append(slice(start, index))
            start, held = index, 0
        held += plan.held_bytes
    return [*groups, slice(start, len(plans))] if plans else groups


def _run_backward(
    recording: Recording,
    group: slice,
    stores: Sequence[LayerStore],
    chunk: Chunk,
    slots: Tensor,
    layout: EntryLayout,
) -> None:
    uses = [unit.uses for unit in recording.units[group]]
    for store, found in zip(stores, uses, strict=True):
        store.begin(found, chunk.samples)
    slots = slots.to(recording.entries.device)
    edges = list({use.edge: None for found in uses for use in found})
    if not edges:
        return
    for slot in range(layout.n_slots):
        # One entry of each sample: samples do not interact, so their gradients stay apart.
        chosen = (slots == slot).to(recording.entries)
        cotangents = torch.autograd.grad(
            recording.entries, edges, chosen, retain_graph=True, allow_unused=True
        )
        arrived = dict(zip(edges, cotangents, strict=True))
        for store, found in zip(stores, uses, strict=True):
            store.put(found, [arrived[use.edge] for use in found], chunk.samples, slot)
    for store in stores:
        store.end(chunk.samples)


def _check_same(recording: Recording, plans: Sequence[UnitPlan], others: Sequence[str]) -> None:
    """Raise if a chunk's units are not those that the first chunk was planned with."""
    planned = [plan.unit.names for plan in plans]
    found = [recorded.unit.names for recorded in recording.units]
    differing = {name for unit in set(planned) ^ set(found) for name in unit}
    differing |= set(recording.others) - set(others)
    if differing or planned != found:
        names = sorted(differing) or sorted(name for unit in planned for name in unit)
        raise StructureError("chunks use parameters in different ways", names)


def _add_others(
    evaluation: Evaluation,
    others: Sequence[str],
    label_of: LabelOf,
    sums: dict[str, KernelSum],
    max_bytes: int,
) -> None:
    function = evaluation.problem.function
    by_label: dict[str, list[int]] = defaultdict(list)
    for name in others:
        by_label[label_of(name)].append(function.names.index(name))
    for label, positions in by_label.items():

        def record_sample(
            sample: int, positions: list[int] = positions
        ) -> tuple[Tensor, Tensor, list[Tensor]]:
            chunk = evaluation.take(sample, sample + 1)
            parameters = [parameter.detach() for parameter in function.parameters]
            leaves = [parameters[index].requires_grad_() for index in positions]
            with torch.enable_grad():
                entries = evaluation.vector_function(chunk)(*parameters)
            return entries, _slots(evaluation, chunk), leaves

        sizes = [function.parameters[index].numel() for index in positions]
        _add_sample_gradients(sums[label], record_sample, sizes, max_bytes)


def _add_sample_gradients(
    total: KernelSum, record: _RecordSample, sizes: Sequence[int], max_bytes: int
) -> None:
    """Add J Jᵀ of some parameters of ``sizes``, one sample and one entry at a time.

    Columns are taken in turns of ``max_bytes``: each costs n backward passes, and all n² p / 2.
    """
    layout = total.layout
    width = max(1, max_bytes // (layout.n * layout.itemsize))
    for columns in _column_ranges(sum(sizes), width):
        table = torch.zeros(
            (layout.n_samples, layout.n_slots, len(columns)),
            dtype=layout.dtype,
            device=layout.device,
        )
        for sample in range(layout.n_samples):
            entries, slots, leaves = record(sample)
            if not entries.requires_grad:  # this sample does not use them
                continue
            for entry, slot in zip(entries, slots.tolist(), strict=True):
                gradients = torch.autograd.grad(
                    entry, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
                table[sample, slot] = joined[columns.start : columns.stop]
        total.add_gradients(table)


def _column_ranges(n_columns: int, width: int) -> Iterator[range]:
    for start in range(0, n_columns, width):
        yield range(start, min(start + width, n_columns))


def entry_layout(evaluation: Evaluation) -> EntryLayout:
    """Return how the residual's entries are spread over samples and slots."""
    problem = evaluation.problem
    n_slots = count_slots(evaluation)
    samples, slots = _places(evaluation)
    table = samples * n_slots + slots
    everywhere = len(table) == problem.n_samples * n_slots
    kept = None if everywhere else table.to(problem.function.device)
    return EntryLayout(
        problem.n_samples, n_slots, kept, problem.function.dtype, problem.function.device
    )


def count_slots(evaluation: Evaluation) -> int:
    """Return the entries of the sample that has most."""
    samples, row_size = row_samples(evaluation)
    return int(torch.bincount(samples).max()) * row_size


def row_samples(evaluation: Evaluation) -> tuple[Tensor, int]:
    """Return the sample of each row of the residual, on the CPU, and the entries of a row."""
    targets, n_samples = evaluation.targets, evaluation.problem.n_samples
    per_sample = targets.rows_per_sample if targets.is_labels else 1
    kept = torch.arange(n_samples * per_sample) if targets.rows is None else targets.rows.cpu()
    return kept // per_sample, evaluation.residual_vector.numel() // len(kept)


def _slots(evaluation: Evaluation, chunk: Chunk) -> Tensor:
    """Return the slot of each entry of a chunk, on the CPU, where labels have values."""
    samples, slots = _places(evaluation)
    inside = (samples >= chunk.samples.start) & (samples < chunk.samples.stop)
    return slots[inside]


def _places(evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    """Return the sample and the slot of each entry of the residual."""
    samples, row_size = row_samples(evaluation)
    counts = torch.bincount(samples)
    before = torch.cumsum(counts, 0) - counts
    positions = torch.arange(len(samples)) - before[samples]
    slots = positions[:, None] * row_size + torch.arange(row_size)
    return samples.repeat_interleave(row_size), slots.reshape(-1)
