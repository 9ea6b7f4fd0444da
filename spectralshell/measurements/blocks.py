"""Blocks of one snapshot's Jacobian: norms, coherence, and what moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectralshell.krylov import EigenPairs, dense_pairs, lanczos, ritz_pairs
from spectralshell.measurements.couplings import (
    find_direction,
    find_held_gates,
    find_step_fault,
    set_in_motion,
    unit_of,
    unit_status,
    unwarned_gates,
    without_motion,
)
from spectralshell.measurements.settings import KernelSettings, MotionSettings
from spectralshell.measurements.solver import SolverPlan, plan_blocks, plan_by_memory
from spectralshell.models.state import unwrap
from spectralshell.operators import Direction, KernelDerivative, KernelMotion
from spectralshell.operators.layers.units import LAYER_OPTIONS, resolve_layers
from spectralshell.operators.motion.directions import PER_TAU
from spectralshell.snapshots import Snapshot
from spectralshell.statuses import (
    FROZEN_KERNEL,
    OK,
    ONE_BLOCK,
    RATE_FROM_BELOW,
    STEP_TOO_SHORT,
    difference_good_to,
    gates_held,
    join_statuses,
    zero_kernel_of,
)

AUTO = "auto"

Blocks = str | Mapping[str, str] | Callable[[str], str]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Floats = NDArray[np.float64]

_RATE_STEPS = 24

_RATE_TOLERANCE = 1e-3
"""Lanczos steps for ‖dJ/dt‖², and the relative residual norm above which the status says so."""

_STEP_TOLERANCE = 1e-2
"""Relative change with half the step above which the status says so."""

_ROUNDINGS = 10.0
"""Rates of a kernel below this many of their roundings are none."""


@dataclass(frozen=True)
class BlockSettings:
    """Settings of :func:`measure_blocks`."""

    kernel: KernelSettings  # of which the solver and its steps do not matter
    motion: MotionSettings
    blocks: Blocks = AUTO


@dataclass(frozen=True)
class Grouping:
    """Labels of blocks in the order of depth, and the names of each one's parameters."""

    labels: tuple[str, ...]
    members: dict[str, tuple[str, ...]]

    def label_of(self, name: str) -> str:
        """Return the label of a parameter."""
        return next(label for label, names in self.members.items() if name in names)


def check_blocks(blocks: Any) -> None:
    """Check that ``blocks`` is a known option, a mapping or a callable."""
    options = (AUTO, *LAYER_OPTIONS)
    if isinstance(blocks, str):
        if blocks not in options:
            raise ValueError(
                f"blocks must be one of {', '.join(map(repr, options))}, a mapping of regular "
                f"expressions to labels or a callable, got {blocks!r}."
            )
    elif not isinstance(blocks, Mapping) and not callable(blocks):
        raise TypeError(
            f"blocks must be one of {', '.join(map(repr, options))}, a mapping of regular "
            f"expressions to labels or a callable, got {type(blocks).__name__}."
        )


def group_parameters(model: nn.Module, blocks: Blocks, names: Sequence[str]) -> Grouping:
    """Return the blocks of the parameters that count, in the order of depth.

    That is the order of a mapping's labels, else the one in which the model registers parameters.
    """
    check_blocks(blocks)
    if blocks == AUTO:
        label_of = _automatic(unwrap(model))
    else:
        label_of = resolve_layers(blocks, names, option="blocks")
    members: dict[str, list[str]] = {}
    if isinstance(blocks, Mapping):
        members = {label: [] for label in blocks.values()}
    for name in names:
        members.setdefault(label_of(name), []).append(name)
    empty = [label for label, found in members.items() if not found]
    if empty:
        raise ValueError(
            f"blocks: no parameter got the label {empty[0]!r}; its expression finds none, or one "
            "before it finds them first."
        )
    return Grouping(tuple(members), {label: tuple(found) for label, found in members.items()})


def _automatic(model: nn.Module) -> Callable[[str], str]:
    """Return the labels of the module tree's units.

    What has nothing but vectors (normalisations) joins the unit before it, or the one after it.
    """
    labels: dict[str, str] = {}
    waiting: list[str] = []
    last: str | None = None
    total = len(list(model.parameters()))
    for label, owned in _units(model, "", total):
        if all(parameter.ndim <= 1 for parameter in owned.values()):
            if last is None:
                waiting += owned
                continue
            labels.update(dict.fromkeys(owned, last))
            continue
        labels.update(dict.fromkeys([*waiting, *owned], label))
        waiting, last = [], label
    labels.update(dict.fromkeys(waiting, type(model).__name__))
    return labels.__getitem__


def _units(
    module: nn.Module, path: str, total: int
) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Yield label and parameters of the pieces of a module, in the order of registration."""
    prefix = f"{path}." if path else ""
    if path and not _is_taken_apart(module, total):
        owned = {prefix + name: parameter for name, parameter in module.named_parameters()}
        if owned:
            yield path, owned
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, {prefix + name: parameter}
    for name, child in module.named_children():
        yield from _units(child, prefix + name, total)


def _is_taken_apart(module: nn.Module, total: int) -> bool:
    if isinstance(module, _CONTAINERS):
        return True
    share = len(list(module.parameters()))
    return 2 * share > total and any(
        isinstance(part, _CONTAINERS) and _n_members(part) > 1 for part in module.modules()
    )


def _n_members(container: nn.Module) -> int:
    return sum(any(True for _ in child.parameters()) for child in container.children())


@dataclass(frozen=True, eq=False)
class BlockMeasure:
    """The L blocks of one snapshot's Jacobian, by depth; independent of band and null."""

    blocks: tuple[str, ...]
    block_sizes: NDArray[np.int64]  # (L,), parameters of each
    norms: Floats  # (L,), ‖J_l‖ = √λ_max(M_l), in 1/√τ
    traces: Floats  # (L,), tr M_l, in 1/τ
    coherence: Floats  # (L, L), ‖J_l* J_m‖, in 1/τ; ‖J_l‖² on the diagonal
    uncertainty: Floats  # (L, L), what rounding of the kernels may have changed in it
    # (L, L, L), ⟨D_lm, D_lm'⟩ (Frobenius), D_lm the rate of M_l as block m alone moves.
    gram: Floats
    jacobian_norm: float  # ‖J‖, in 1/√τ
    jacobian_rate: float  # ‖dJ/dt‖ along the direction
    direction: str
    direction_norm: float
    derivative: str
    n_outputs: int
    n_rows: int
    n_parameters: int
    dynamics_exact: bool  # whether ė = −M e along the direction
    unit: str = PER_TAU  # what rates are per
    held_gates: tuple[str, ...] = ()  # functions whose kinks the derivative does not see
    solver: str = "exact"
    n_matvecs: int = 0  # products with M: kernels come from layers
    plan: dict[str, Any] | None = None  # what was predicted, a row of ``plan_``
    tau: float = 0.0
    batch: int | str = 0
    name: str | None = None
    status: str = OK

    def relabel(self, *, tau: float, batch: int | str, name: str | None) -> BlockMeasure:
        """Return the same measurement with the labels of a snapshot."""
        labels: dict[str, Any] = {"tau": tau, "batch": batch, "name": name}
        return replace(self, **labels)


def measure_blocks(
    snapshot: Snapshot, settings: BlockSettings, probe_seed: int = 0, verbose: int = 0
) -> BlockMeasure:
    """Measure the blocks of one snapshot; unlabelled, and not remembered."""
    how = settings.motion
    with set_in_motion(snapshot, settings.kernel, probe_seed) as motion:
        grouping = group_parameters(snapshot.model, settings.blocks, motion.parameter_names)
        plan = plan_by_memory(
            settings.kernel,
            motion.device,
            lambda max_bytes, _: plan_blocks(
                motion.survey.footprint,
                max_bytes,
                n_blocks=len(grouping.labels),
                chunk_size=motion.survey.evaluation.chunk_size,
            ),
        )
        plan.announce(snapshot, verbose)
        spectra = _measure_spectra(motion, plan, grouping)
        direction = find_direction(snapshot, motion, how)
        with unwarned_gates():
            rate = _measure_rate(motion, direction, how, spectra)
            gram = _measure_gram(motion, direction, grouping, replace(how, step=rate.step))
        step = rate.step
        rounding = spectra.noise * spectra.norm
        rounding *= rate.norm + (spectra.norm / step if step else 0.0)
        gram[np.sqrt(np.einsum("lmm->l", gram)) <= _ROUNDINGS * rounding] = 0.0
        unit, held = unit_of(direction), find_held_gates(motion, direction, how.derivative)
        phrases = [spectra.status, rate.status, *_phrases(grouping, spectra, gram)]
        phrases += [unit_status(unit), gates_held(held)]
        fault = find_step_fault(motion, direction, how)
        if fault == STEP_TOO_SHORT:
            phrases = [without_motion(phrase) for phrase in phrases]
        phrases.append(fault)
        return BlockMeasure(
            blocks=grouping.labels,
            block_sizes=_sizes(motion, grouping),
            norms=spectra.norms,
            traces=spectra.traces,
            coherence=spectra.coherence,
            uncertainty=spectra.uncertainty,
            gram=gram,
            jacobian_norm=spectra.norm,
            jacobian_rate=rate.norm,
            direction=direction.name,
            direction_norm=direction.norm,
            derivative=how.derivative,
            n_outputs=motion.n,
            n_rows=motion.n_rows,
            n_parameters=motion.n_parameters,
            dynamics_exact=motion.dynamics_exact and direction.name == "gradient-flow",
            unit=unit,
            held_gates=held,
            plan=plan.as_row(),
            status=join_statuses(phrases),
        )


@dataclass(frozen=True)
class _Spectra:
    """Of the whole kernel and its blocks; the noise is relative to the whole's norm."""

    norm: float
    noise: float
    norms: Floats
    traces: Floats
    coherence: Floats
    uncertainty: Floats
    status: str


def _measure_spectra(motion: KernelMotion, plan: SolverPlan, grouping: Grouping) -> _Spectra:
    with motion.survey.build_exact(plan.exact, grouping.label_of) as kernel:
        wide = [kernel.layers[label].to(kernel.residual_vector) for label in grouping.labels]
        norm = _largest(kernel.to_dense())
        relative = kernel.noise
        status = kernel.status
    noise = relative * norm
    factors = [_factor(matrix, noise) for matrix in wide]
    squares = np.array([_largest(factor.T @ factor) for factor in factors])
    n_blocks = len(factors)
    coherence = np.diag(squares)
    for row in range(n_blocks):
        for column in range(row):
            found = _cross_norm(factors[row], factors[column])
            coherence[row, column] = coherence[column, row] = found
    # |δ λ_max(M_l^½ M_m M_l^½)| ≤ ‖δM_l‖ ‖M_m‖ + ‖M_l‖ ‖δM_m‖, of the square of the coherence.
    shift = noise * (squares[:, None] + squares)
    uncertainty = np.sqrt(coherence**2 + shift) - coherence
    traces = np.array([float(matrix.diagonal().sum()) for matrix in wide])
    return _Spectra(
        float(np.sqrt(norm)), relative, np.sqrt(squares), traces, coherence, uncertainty, status
    )


def _factor(matrix: Tensor, noise: float) -> Tensor:
    """Return F with F Fᵀ the matrix, without the modes below its noise."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > noise
    return vectors[:, kept] * values[kept].sqrt()


def _cross_norm(left: Tensor, right: Tensor) -> float:
    """Return ‖F_lᵀ F_m‖ = √λ_max(M_l^½ M_m M_l^½)."""
    cross = left.T @ right
    if cross.shape[0] > cross.shape[1]:
        cross = cross.T
    return float(np.sqrt(_largest(cross @ cross.T)))


def _largest(matrix: Tensor) -> float:
    if not len(matrix):
        return 0.0
    return max(float(dense_pairs(matrix, 1).eigenvalues[0]), 0.0)


@dataclass(frozen=True)
class _JacobianRate:
    """‖dJ/dt‖, and the step of the difference that found it."""

    norm: float
    step: float | None
    status: str


def _measure_rate(
    motion: KernelMotion, direction: Direction, how: MotionSettings, spectra: _Spectra
) -> _JacobianRate:
    with motion.derivative(direction, method=how.derivative, step=how.step) as derivative:
        step = (derivative.step or None) if how.derivative == "difference" else None
        if derivative.is_zero:
            return _JacobianRate(0.0, step, derivative.status)
        pairs = _rate_pairs(motion, derivative, _RATE_STEPS)
        square = max(float(pairs.eigenvalues[0]), 0.0)
        phrases = [derivative.status]
        if pairs.residual_norms[0] > _RATE_TOLERANCE * square > 0.0:
            phrases.append(RATE_FROM_BELOW)
        if step is not None and step * square**0.5 > _ROUNDINGS * spectra.noise * spectra.norm:
            share = _defect_of_step(motion, direction, derivative, pairs.vectors[:, 0])
            phrases += [difference_good_to(share)] if share > _STEP_TOLERANCE else []
        return _JacobianRate(square**0.5, step, join_statuses(phrases))


def _rate_pairs(motion: KernelMotion, derivative: KernelDerivative, n_steps: int) -> EigenPairs:
    start = torch.randn(motion.n, generator=torch.Generator().manual_seed(0))
    return ritz_pairs(lanczos(derivative.rate_gram, start.to(motion.residual_vector), n_steps), 1)


def _defect_of_step(
    motion: KernelMotion, direction: Direction, derivative: KernelDerivative, vector: Tensor
) -> float:
    """Return what half the step changes along the fastest change of J, relative to the whole."""
    found = derivative.rate_gram(vector)
    with motion.derivative(direction, method="difference", step=derivative.step / 2) as half:
        gap = float(torch.linalg.vector_norm(half.rate_gram(vector) - found))
    return gap / float(torch.linalg.vector_norm(found))


def _measure_gram(
    motion: KernelMotion, direction: Direction, grouping: Grouping, how: MotionSettings
) -> Floats:
    """Return ⟨D_lm, D_lm'⟩ for all blocks l, m, m'."""
    n_blocks = len(grouping.labels)
    rates: list[list[Tensor]] = [[] for _ in range(n_blocks)]
    for derivative in _restricted(motion, direction, grouping, how):
        with derivative:
            parts = derivative.layers(grouping.label_of)
        for kept, label in zip(rates, grouping.labels, strict=True):
            kept.append(_packed(parts[label]))
    gram = np.empty((n_blocks,) * 3)
    for position, kept in enumerate(rates):
        stacked = torch.stack(kept)
        gram[position] = (stacked @ stacked.T).cpu().numpy()
        kept.clear()
    return gram


def _restricted(
    motion: KernelMotion, direction: Direction, grouping: Grouping, how: MotionSettings
) -> Iterator[KernelDerivative]:
    """Yield the derivative along the direction of each block's parameters alone, by depth."""
    tangents = dict(zip(motion.parameter_names, direction.tangents, strict=True))
    for label in grouping.labels:
        part: Mapping[str, Tensor] = {name: tangents[name] for name in grouping.members[label]}
        yield motion.derivative(motion.direction(part), method=how.derivative, step=how.step)


def _packed(matrix: Tensor) -> Tensor:
    """Return the lower half of a symmetric matrix as a vector with the same inner products."""
    rows, columns = torch.tril_indices(*matrix.shape, device=matrix.device)
    # From ones of its own type: a root of two in single precision would be the rounding of all.
    weights = torch.where(rows == columns, matrix.new_ones(()), 2.0**0.5)
    return matrix[rows, columns] * weights


def _sizes(motion: KernelMotion, grouping: Grouping) -> NDArray[np.int64]:
    function = motion.survey.evaluation.problem.function
    numbers = dict(zip(function.names, (p.numel() for p in function.parameters), strict=True))
    return np.array(
        [sum(numbers[name] for name in grouping.members[label]) for label in grouping.labels]
    )


def _phrases(grouping: Grouping, spectra: _Spectra, gram: Floats) -> list[str]:
    phrases = [ONE_BLOCK] if len(grouping.labels) == 1 else []
    zero = [label for label, norm in zip(grouping.labels, spectra.norms, strict=True) if norm == 0]
    phrases += [zero_kernel_of(zero)] if zero else []
    return phrases if gram.any() else [*phrases, FROZEN_KERNEL]
