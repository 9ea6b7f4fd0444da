"""Costs of a kernel before it is built: memory and operations of either solver."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from spectralshell.operators.jacobian.ladder import (
    ReverseModeError,
    first_line,
    is_out_of_memory,
)
from spectralshell.operators.layers.assembly import (
    SLICES,
    LabelOf,
    Recording,
    UnitPlan,
    count_slots,
    group_units,
    plan_unit,
    record,
)
from spectralshell.operators.layers.rules import Affine
from spectralshell.operators.layers.stores import EntryLayout
from spectralshell.operators.layers.units import GRADIENTS, GRAM, operation_counts
from spectralshell.operators.noise import NOISE_SAMPLES, WHOLE_OUTPUTS
from spectralshell.operators.problem import Chunk, Evaluation

DEFAULT_MEMORY = 8 * 10**9
"""Bytes that a solver is chosen for where no limit was given: the same ones on every machine."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

_META_BYTES = 2**40

_MOST_BYTES = 2**63 - 1
"""What a file or an address can count: more is no limit."""

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files of a control group with its limit and what it uses, of either version."""

_COUNTED_SAMPLES = 2
"""One sample would not tell a dimension of samples from one that is broadcast over them."""

# Rates of a reference machine with two cores: they weigh the parts, and are never measured, so that
# the same problem always gets the same plan. Halved in float64.
_MODEL_RATE = 1e11
"""Operations a second of a model's forward and backward passes."""

_CONTRACTION_RATE = 1e11

_MEMORY_RATE = 5e9

_NODE_SECONDS = 1.5e-5
"""Overhead of an operation of the model."""

_EIGEN_RATE = 6e10

_EIGENPROBLEM = 9.0
"""Operations per entry of n³ of a dense symmetric eigenproblem with vectors."""

_EIGEN_COPIES = 5.6
"""n² float64 numbers: the matrix, and the work space of its reduction and of the energies."""

ROOM = 0.85
"""Part of a memory limit that is planned with: what is predicted can be that much too low."""

_ALLOCATOR = 1.27
"""Most memory of the process over what is in use: blocks of many sizes come and go."""

_IN_FLIGHT = 2.0
"""The same for a pass or a contraction, whose blocks are made before the last ones are freed."""

_EXACT_PARAMETER_COPIES = 6
"""The model's own, a gradient with its temporaries, and those of the product along it."""

_NOISE_COPIES = 5
"""Parameters in float64: their values, two gradients, and the temporaries of a product."""

_NOISE_GRAPHS = 2.5
"""Graphs of a stored double backward pass, in those of a forward pass."""

_CHECK_PASSES = 10.0
"""Evaluations that the checks of a kernel cost, in forward passes."""

_LARGEST_LAYERS = 2**31

_GRAPH_BYTES = 2**26
"""Of a chunk: larger ones are not faster, and need more memory."""

_FEWEST_SAMPLES = 8

_PRODUCT_PASSES = 4.0
"""A pull-back and a push-forward, each of two passes: through inputs and through weights."""

_STREAMED_PASSES = 8.0
"""A product in chunks records its graphs anew."""

_SETUP_PRODUCTS = 20.0
"""The ladder's test, and the probes of the noise."""

_NODES_PER_PRODUCT = 4.0

_GRAPHS = 1.25
"""Graph and tape of a stored product, in graphs of a recorded forward pass."""

_LANCZOS_PARAMETER_COPIES = 12
"""Own copy, pulled-back gradient and its temporaries, and those of the float64 reference."""

_PASS_OUTPUTS = 4
"""Arrays of outputs, in flight in a product: outputs, their rate, and cotangents on their way."""

_COMPARED_OUTPUTS = 8
"""The same where products are compared with float64: a stored graph, and dual numbers."""

_CHECKED_OUTPUTS = 2
"""Outputs of a second evaluation, and the difference from the first."""

_VECTORS = 6
"""Of the residual's length in float64: e, two vectors, an image, and temporaries of their sums."""

_LARGE_BASIS = 2**28
"""Bytes of a basis of output vectors from which one of parameter vectors is kept, if smaller."""

_DENSE_RATE = 2e10
"""Operations a second of the orthogonalisation in float64."""


def resolve_max_memory(max_memory: int | str | None) -> int:
    """Return the bytes of working memory that ``max_memory`` allows: a number, or one with a unit.

    None allows ``DEFAULT_MEMORY``, whatever is free, so that what is chosen by it is always alike.
    """
    if max_memory is None:
        return DEFAULT_MEMORY
    size = _parse_bytes(max_memory)
    if size <= 0:
        raise ValueError(f"max_memory must be positive, got {max_memory!r}.")
    return min(size, _MOST_BYTES)


def working_bytes(max_memory: int | str | None, device: torch.device) -> int:
    """Return what may be taken: what ``max_memory`` allows, by default no more than is free."""
    allowed = resolve_max_memory(max_memory)
    return allowed if max_memory is not None else min(allowed, free_bytes(device))


def _parse_bytes(size: int | str) -> int:
    """Return a size in bytes; see :func:`resolve_max_memory`."""
    if isinstance(size, Integral) and not isinstance(size, bool):
        return int(size)
    if not isinstance(size, str):
        raise TypeError(
            f"max_memory must be None, a number of bytes or a string such as '1GB', got "
            f"{type(size).__name__}."
        )
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"max_memory must be a number of bytes or a string such as '1GB' or '512 MiB', got "
            f"{size!r}."
        )
    return int(float(match[1]) * unit)


def free_bytes(device: torch.device) -> int:
    """Return what is free on a device; in main memory, also to the control group of the process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "meta":
        return _META_BYTES
    return min([int(psutil.virtual_memory().available), *_free_in_control_groups()])


def _free_in_control_groups() -> Iterator[int]:
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = _CGROUPS / controllers
            group = root / path.strip("/")
            # In a container the path is that outside, and the group is the root.
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):
                    yield from _free_in_control_group(folder)


def _free_in_control_group(folder: Path) -> Iterator[int]:
    for limit, used in _LIMITS:
        try:
            allowed = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
            cached = re.search(r"inactive_file (\d+)", (folder / "memory.stat").read_text())
        except (OSError, ValueError):  # not of this version, or no limit: "max"
            continue
        yield max(allowed - taken + (int(cached[1]) if cached else 0), 0)


def format_bytes(size: float) -> str:
    """Return a size for a message: three digits of the largest unit that it fills."""
    for unit in ("GB", "MB", "KB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.3g} {unit}"
    return f"{int(size)} B"


@dataclass(frozen=True)
class Footprint:
    """Sizes of a kernel problem; the same problem always has the same."""

    n_samples: int
    # Entries of the sample that has most.
    n_slots: int
    # Of the residual.
    n_entries: int
    n_parameters: int
    # Bytes of a number of the products.
    itemsize: int
    # Operations of one evaluation of the whole batch.
    forward_flops: float
    # What a recorded pass holds for each sample.
    graph_bytes: float
    # Numbers of the largest output of a layer for one sample.
    largest_activation: int
    # Nodes of the recorded graph, each an operation with its overhead.
    n_nodes: int
    # Layers and their orders of contraction.
    units: tuple[UnitPlan, ...]
    # Numbers of the parameters that need the gradients of each sample.
    n_others: int
    # Numbers of the model's outputs on the whole batch.
    n_outputs: int = 0


def measure_footprint(evaluation: Evaluation, label_of: LabelOf) -> Footprint:
    """Record two samples, and scale to the batch what the record holds; inside the model's guard.

    A model that does not run on two samples is recorded on the whole batch.
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
        recording, held, n_samples = _record_whole(evaluation, whole, label_of)
    function = problem.function
    layout = EntryLayout(
        problem.n_samples, count_slots(evaluation), None, function.dtype, function.device
    )
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
        n_outputs=evaluation.outputs.numel(),
    )


def _record_whole(
    evaluation: Evaluation, whole: Chunk, label_of: LabelOf
) -> tuple[Recording, int, int]:
    """Return :func:`_record_counting` of the batch; it has been evaluated, but not recorded."""
    try:
        return _record_counting(evaluation, whole, label_of)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ReverseModeError(
            f"model: {type(evaluation.problem.function.model).__name__} runs, but not where "
            f"gradients are recorded: {first_line(error)}"
        ) from error


def _record_counting(
    evaluation: Evaluation, chunk: Chunk, label_of: LabelOf
) -> tuple[Recording, int, int]:
    """Return a recording, the bytes that it holds beside the parameters, and its samples."""
    names = evaluation.problem.function.names
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:  # others have no storage of their own
            storage = tensor.untyped_storage()
            held[storage._cdata] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            recording = record(evaluation, chunk, names, label_of)
    except RuntimeError as error:  # torch.func, where a model uses it, bears no hooks
        if is_out_of_memory(error):
            raise
        with _TensorsMade() as made:
            recording = record(evaluation, chunk, names, label_of)
        held = made.still_held()
    for parameter in evaluation.problem.function.parameters:
        held.pop(parameter.untyped_storage()._cdata, None)
    factors = {
        id(use.geometry.factor): use.geometry.factor.untyped_storage().nbytes()
        for found in recording.units
        for use in found.uses
        if isinstance(use.geometry, Affine)
    }
    return recording, sum(held.values()) + sum(factors.values()), chunk.n_samples


class _TensorsMade(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, notes the memory of all tensors that operations give, without holding it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        returned = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(returned)[0]:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self._sizes[StorageWeakRef(storage)] = storage.nbytes()  # type: ignore[no-untyped-call]
        return returned

    def still_held(self) -> dict[int, int]:
        """Return the bytes of what something still refers to, such as a graph, by its storage."""
        return {
            reference.cdata: size
            for reference, size in self._sizes.items()
            if not reference.expired()  # type: ignore[no-untyped-call]
        }


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


def fits(peak_bytes: int, max_bytes: int) -> bool:
    """Tell whether a predicted peak stays within a limit, with room for what it is too low."""
    return peak_bytes <= int(ROOM * max_bytes)


@dataclass(frozen=True)
class ExactPlan:
    """How an exact kernel is built, and what it takes."""

    # Samples recorded at a time; None takes all.
    chunk_size: int | None
    # What the layers may hold until they are contracted.
    layer_bytes: int
    # Groups of layers, for each of which the passes are repeated.
    n_groups: int
    # Most memory at a time, the eigenproblem included.
    peak_bytes: int
    # Seconds of the reference machine for the kernel alone, then with the eigenproblem.
    kernel_cost: float
    cost: float


def plan_exact(footprint: Footprint, max_bytes: int, chunk_size: int | None = None) -> ExactPlan:
    """Choose chunks of samples and groups of layers: the cheapest that fit in ``max_bytes``.

    ``chunk_size`` fixes the first. If nothing fits, the plan takes the least memory.
    """
    sizes = [chunk_size] if chunk_size is not None else _chunk_sizes(footprint)
    room = int(ROOM * max_bytes)
    plans = [_plan_chunks(footprint, room, size) for size in sizes]
    fitting = [plan for plan in plans if plan.peak_bytes <= room]
    if fitting:
        return min(fitting, key=lambda plan: plan.cost)
    return min(plans, key=lambda plan: plan.peak_bytes)


def _chunk_sizes(footprint: Footprint) -> list[int]:
    """Return the sizes to choose from: halvings, the first with graphs that stay near the cores."""
    size = footprint.n_samples
    while size > _FEWEST_SAMPLES and size * footprint.graph_bytes > _GRAPH_BYTES:
        size = (size + 1) // 2
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def _plan_chunks(footprint: Footprint, max_bytes: int, size: int) -> ExactPlan:
    whole = size >= footprint.n_samples
    fixed = _fixed_bytes(footprint)
    passing = min(size, footprint.n_samples) * _passing_bytes(footprint)
    sums = _sum_bytes(footprint)
    held = sum(plan.held_bytes for plan in footprint.units)
    largest = max((plan.held_bytes for plan in footprint.units), default=0)
    left = int(max_bytes - fixed - sums - _IN_FLIGHT * passing)
    # Beside a layer's own store, its contraction makes tables of a part of this.
    layer_bytes = max(largest, min(left * SLICES // (SLICES + 2), _LARGEST_LAYERS), 1)
    groups = list(group_units(footprint.units, layer_bytes))
    stored = max((_held(footprint.units[group]) for group in groups), default=0)
    tables = max(
        (_table_bytes(footprint, plan, layer_bytes) for plan in footprint.units), default=0
    )
    eigen = _EIGEN_COPIES * 8 * footprint.n_entries**2
    noise = _noise_bytes(footprint) if footprint.itemsize == torch.float32.itemsize else 0
    building = fixed + sums + min(stored, held) + _IN_FLIGHT * max(passing, tables)
    peak = max(building, _ALLOCATOR * max(fixed + 2 * sums, noise), eigen)
    n_chunks = -(-footprint.n_samples // size)
    cost = _exact_cost(footprint, len(groups), n_chunks)
    return ExactPlan(
        chunk_size=None if whole else size,
        layer_bytes=layer_bytes,
        n_groups=len(groups),
        peak_bytes=int(peak),
        kernel_cost=cost,
        cost=cost + _eigen_cost(footprint.n_entries),
    )


def _fixed_bytes(footprint: Footprint) -> int:
    """Bytes of the model's own copy, and of the gradient and product that M is compared with."""
    copies = _EXACT_PARAMETER_COPIES * footprint.n_parameters
    return (copies + footprint.n_outputs) * footprint.itemsize


def _passing_bytes(footprint: Footprint) -> float:
    """Bytes that a recorded sample takes: its graph, and output gradients on their way."""
    waiting = sum(plan.passing_numbers for plan in footprint.units) * footprint.n_slots
    return footprint.graph_bytes + footprint.itemsize * (4 * footprint.largest_activation + waiting)


def _noise_bytes(footprint: Footprint) -> float:
    """Bytes of the float64 products of a few samples that tell the rounding error."""
    graphs = 2 * _NOISE_GRAPHS * footprint.graph_bytes * NOISE_SAMPLES
    return _NOISE_COPIES * 8 * footprint.n_parameters + graphs


def _sum_bytes(footprint: Footprint) -> int:
    """Bytes of the matrices that layer kernels are added to."""
    orders = {plan.order for plan in footprint.units}
    by_slot = GRAM in orders
    by_sample = bool(orders - {GRAM}) or footprint.n_others > 0
    n = footprint.n_samples * footprint.n_slots
    return max(1, by_slot + by_sample) * footprint.itemsize * n**2


def _table_bytes(footprint: Footprint, plan: UnitPlan, layer_bytes: int) -> int:
    """Bytes of the tables that a contraction makes beside the store."""
    matrix, itemsize = plan.unit.matrix, footprint.itemsize
    if matrix is None or plan.order == GRAM:
        return 0
    limit = layer_bytes // SLICES
    n = footprint.n_samples * footprint.n_slots
    unfolded = matrix.n_groups * matrix.fan_in * matrix.n_positions * itemsize
    if plan.order == GRADIENTS:
        table = n * matrix.fan_in * matrix.fan_out * itemsize
        return min(table, limit) + 2 * min(footprint.n_samples * unfolded, limit // 4)
    products = n * matrix.fan_out * matrix.n_positions * itemsize
    gram = (footprint.n_samples * matrix.n_positions) ** 2 * itemsize
    return 2 * footprint.n_samples * unfolded + min(gram, limit // 2) + min(products, limit // 2)


def _held(plans: Sequence[UnitPlan]) -> int:
    return sum(plan.held_bytes for plan in plans)


def _exact_cost(footprint: Footprint, n_groups: int, n_chunks: int) -> float:
    n, slots = footprint.n_samples * footprint.n_slots, footprint.n_slots
    slower = footprint.itemsize / 4
    passes = n_groups * (1 + slots) + _CHECK_PASSES
    samples = footprint.n_samples * (1 + slots) if footprint.n_others else 0
    model = (passes + (1 + slots if samples else 0)) * footprint.forward_flops
    contraction = sum(_operations(plan, footprint) for plan in footprint.units)
    contraction += float(n) ** 2 * footprint.n_others
    additions = 2.0 * footprint.itemsize * n**2 * len(footprint.units) / 2
    return (
        slower * model / _MODEL_RATE
        + slower * contraction / _CONTRACTION_RATE
        + additions / _MEMORY_RATE
        + _NODE_SECONDS * footprint.n_nodes * (n_chunks * passes + samples)
    )


def _operations(plan: UnitPlan, footprint: Footprint) -> float:
    """Return the floating-point operations of a contraction, two for a multiplication."""
    slots, samples = footprint.n_slots, footprint.n_samples
    matrix = plan.unit.matrix
    if matrix is None:
        return float(samples * slots) ** 2 * plan.n_numbers
    return 2.0 * operation_counts(matrix, plan.unit.merged, samples, slots)[plan.order]


def _eigen_cost(n: int) -> float:
    """Return the reference seconds of a dense symmetric eigenproblem in float64."""
    return _EIGENPROBLEM * float(n) ** 3 / _EIGEN_RATE


@dataclass(frozen=True)
class LanczosPlan:
    """How a Lanczos run is done, and what it takes."""

    # Samples whose graph is recorded at a time; None keeps the graph of all.
    chunk_size: int | None
    # Most memory at a time.
    peak_bytes: int
    # Seconds of the reference machine.
    cost: float
    # Whether the basis is one of parameter vectors.
    in_parameters: bool = False


def plan_lanczos(
    footprint: Footprint,
    n_steps: int,
    max_bytes: int,
    chunk_size: int | None = None,
    *,
    needs_basis: bool = True,
) -> LanczosPlan:
    """Choose the largest chunks that fit in ``max_bytes``, or ``chunk_size`` where it is given.

    If nothing fits, for single samples. A basis not needed may be one of parameter vectors.
    """
    n, n_parameters = footprint.n_entries, footprint.n_parameters
    large = 8 * n * min(n_steps, n) > _LARGE_BASIS
    in_parameters = not needs_basis and large and n_parameters < n
    length = n_parameters if in_parameters else n
    size = footprint.n_samples if chunk_size is None else chunk_size
    while (
        chunk_size is None
        and size > 1
        and not fits(_peak_bytes(footprint, n_steps, size, length), max_bytes)
    ):
        size = (size + 1) // 2
    whole = size >= footprint.n_samples
    return LanczosPlan(
        chunk_size=None if whole else size,
        peak_bytes=_peak_bytes(footprint, n_steps, size, length),
        cost=_lanczos_cost(footprint, n_steps, size),
        in_parameters=in_parameters,
    )


def _peak_bytes(footprint: Footprint, n_steps: int, size: int, length: int) -> int:
    """Bytes of the set-up and a run, whichever takes more; basis vectors have ``length``."""
    samples = min(size, footprint.n_samples)
    outputs, itemsize = footprint.n_outputs, footprint.itemsize
    of_sample = outputs / footprint.n_samples
    parameters = _LANCZOS_PARAMETER_COPIES * footprint.n_parameters * itemsize
    # The outputs in float64, and what the error is made of.
    checked = (8 + _CHECKED_OUTPUTS * itemsize) * outputs + 4 * 8.0 * footprint.n_entries
    graphs = _GRAPHS * footprint.graph_bytes * samples
    passing = _PASS_OUTPUTS * itemsize * samples * of_sample
    vectors = 8.0 * _VECTORS * footprint.n_entries
    basis = 8.0 * length * min(n_steps, footprint.n_entries)
    compared = 0.0
    if itemsize == torch.float32.itemsize:
        compared = 8 * _COMPARED_OUTPUTS * min(outputs, max(WHOLE_OUTPUTS, of_sample))
    running = graphs + passing + vectors + max(basis, compared)
    return int(parameters + itemsize * outputs + max(checked, running))


def _lanczos_cost(footprint: Footprint, n_steps: int, size: int) -> float:
    steps = min(n_steps, footprint.n_entries)
    product = product_cost(footprint, None if size >= footprint.n_samples else size)
    dense = 4.0 * footprint.n_entries * float(steps) ** 2 / _DENSE_RATE
    return (steps + _SETUP_PRODUCTS) * product + dense


def product_cost(footprint: Footprint, chunk_size: int | None) -> float:
    """Return the reference seconds of one product, its graphs stored or recorded in chunks."""
    n_chunks = 1 if chunk_size is None else -(-footprint.n_samples // chunk_size)
    passes = _PRODUCT_PASSES if n_chunks == 1 else _STREAMED_PASSES
    return (
        passes * footprint.forward_flops * footprint.itemsize / 4 / _MODEL_RATE
        + _NODES_PER_PRODUCT * footprint.n_nodes * n_chunks * _NODE_SECONDS
    )
