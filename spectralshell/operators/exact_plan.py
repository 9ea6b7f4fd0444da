"""How an exact kernel fits in memory, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectralshell.operators.exact_noise import NOISE_SAMPLES
from spectralshell.operators.footprint import Footprint
from spectralshell.operators.layer_assembly import SLICES, UnitPlan, group_units
from spectralshell.operators.layer_units import GRADIENTS, GRAM, operation_counts

# Rates of a reference machine with two cores: they weigh the parts, and are never measured, so that
# the same problem always gets the same plan. Halved in float64.
MODEL_RATE = 1e11
"""Operations a second of a model's forward and backward passes."""
_CONTRACTION_RATE = 1e11
_MEMORY_RATE = 5e9
NODE_SECONDS = 1.5e-5
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

_PARAMETER_COPIES = 6
"""The model's own, a gradient with its temporaries, and those of the product along it."""

_FLOAT32_BYTES = 4
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


@dataclass(frozen=True)
class ExactPlan:
    """How an exact kernel is built.

    Attributes
    ----------
    chunk_size : int or None
        Samples recorded at a time; None takes all.
    layer_bytes : int
        What the layers may hold until they are contracted.
    n_groups : int
        Groups of layers, for each of which the passes are repeated.
    peak_bytes : int
        Predicted most memory at a time, the eigenproblem included.
    kernel_cost : float
        Predicted seconds of the reference machine for the kernel.
    cost : float
        The same with the eigenproblem.
    """

    chunk_size: int | None
    layer_bytes: int
    n_groups: int
    peak_bytes: int
    kernel_cost: float
    cost: float


def plan_exact(footprint: Footprint, max_bytes: int, chunk_size: int | None = None) -> ExactPlan:
    """Choose chunks of samples and groups of layers: the cheapest that fit.

    Parameters
    ----------
    footprint : Footprint
    max_bytes : int
        Working memory.
    chunk_size : int, optional
        Fixes the samples recorded at a time.

    Returns
    -------
    ExactPlan
        If nothing fits, the plan that takes the least memory: :func:`fits` is then false.
    """
    sizes = [chunk_size] if chunk_size is not None else _chunk_sizes(footprint)
    room = int(ROOM * max_bytes)
    plans = [_plan_chunks(footprint, room, size) for size in sizes]
    fitting = [plan for plan in plans if plan.peak_bytes <= room]
    if fitting:
        return min(fitting, key=lambda plan: plan.cost)
    return min(plans, key=lambda plan: plan.peak_bytes)


def fits(peak_bytes: int, max_bytes: int) -> bool:
    """Tell whether a predicted peak stays within a limit, with room for what it is too low."""
    return peak_bytes <= int(ROOM * max_bytes)


def eigen_cost(n: int) -> float:
    """Return the reference seconds of a dense symmetric eigenproblem in float64."""
    return _EIGENPROBLEM * float(n) ** 3 / _EIGEN_RATE


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
    noise = _noise_bytes(footprint) if footprint.itemsize == _FLOAT32_BYTES else 0
    building = fixed + sums + min(stored, held) + _IN_FLIGHT * max(passing, tables)
    peak = max(building, _ALLOCATOR * max(fixed + 2 * sums, noise), eigen)
    n_chunks = -(-footprint.n_samples // size)
    cost = _cost(footprint, len(groups), n_chunks)
    return ExactPlan(
        chunk_size=None if whole else size,
        layer_bytes=layer_bytes,
        n_groups=len(groups),
        peak_bytes=int(peak),
        kernel_cost=cost,
        cost=cost + eigen_cost(footprint.n_entries),
    )


def _cost(footprint: Footprint, n_groups: int, n_chunks: int) -> float:
    n, slots = footprint.n_samples * footprint.n_slots, footprint.n_slots
    slower = footprint.itemsize / 4
    passes = n_groups * (1 + slots) + _CHECK_PASSES
    samples = footprint.n_samples * (1 + slots) if footprint.n_others else 0
    model = (passes + (1 + slots if samples else 0)) * footprint.forward_flops
    contraction = sum(_operations(plan, footprint) for plan in footprint.units)
    contraction += float(n) ** 2 * footprint.n_others
    additions = 2.0 * footprint.itemsize * n**2 * len(footprint.units) / 2
    return (
        slower * model / MODEL_RATE
        + slower * contraction / _CONTRACTION_RATE
        + additions / _MEMORY_RATE
        + NODE_SECONDS * footprint.n_nodes * (n_chunks * passes + samples)
    )


def _operations(plan: UnitPlan, footprint: Footprint) -> float:
    """Return the floating-point operations of a contraction, two for a multiplication."""
    slots, samples = footprint.n_slots, footprint.n_samples
    matrix = plan.unit.matrix
    if matrix is None:
        return float(samples * slots) ** 2 * plan.n_numbers
    return 2.0 * operation_counts(matrix, plan.unit.merged, samples, slots)[plan.order]


def _fixed_bytes(footprint: Footprint) -> int:
    """Bytes of the model's own copy, and of the gradient and product that M is compared with."""
    return _PARAMETER_COPIES * footprint.n_parameters * footprint.itemsize


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


def _chunk_sizes(footprint: Footprint) -> list[int]:
    """Return the sizes to choose from: halvings, the first with graphs that stay near the cores."""
    size = footprint.n_samples
    while size > _FEWEST_SAMPLES and size * footprint.graph_bytes > _GRAPH_BYTES:
        size = (size + 1) // 2
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes
