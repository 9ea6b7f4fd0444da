"""Couplings between the modes of one snapshot's moving kernel.

A warning raised while a snapshot is measured stays in the worker that measured it, and in a cache
there is none; a field reaches everybody.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectralshell.krylov import EigenPairs, block_lanczos, block_ritz_pairs, dense_pairs
from spectralshell.measurements.settings import KernelSettings, MotionSettings
from spectralshell.measurements.solver import (
    SolverPlan,
    carry_out,
    plan_by_memory,
    plan_couplings,
    survey_snapshot,
)
from spectralshell.operators import Direction, KernelDerivative, KernelMotion
from spectralshell.operators.motion.directions import AS_GIVEN, PER_TAU
from spectralshell.operators.motion.gates import warn_of_gates
from spectralshell.shells import noise_floor
from spectralshell.snapshots import Snapshot
from spectralshell.statuses import (
    FROZEN_KERNEL,
    LOST_COUPLINGS,
    OK,
    STEP_TOO_SHORT,
    ZERO_ERROR,
    gates_held,
    join_statuses,
    rates_in,
)
from spectralshell.warning_categories import GateWarning

Floats = NDArray[np.float64]

_CONVERGED = 1e-2
"""Largest residual norm of a mode, relative to its eigenvalue: it then stays in its shell."""


@dataclass(frozen=True)
class CouplingSettings:
    """Settings of :func:`measure_couplings`; the seed is of the start block and directions too."""

    kernel: KernelSettings
    motion: MotionSettings
    block_size: int = 8  # vectors of a block: the error and random ones
    n_random: int = 0  # random directions


@contextmanager
def unwarned_gates() -> Iterator[None]:
    """Keep quiet of gates, for the measure says which were held."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateWarning)
        yield


def find_held_gates(motion: KernelMotion, direction: Direction, derivative: str) -> tuple[str, ...]:
    """Return the functions with kinks whose jumps a derivative misses."""
    return motion.gates if derivative == "exact" and direction.norm > 0.0 else ()


def find_step_fault(motion: KernelMotion, direction: Direction, how: MotionSettings) -> str:
    """Return what is wrong with the step of a difference, ``"ok"`` if nothing or there is none."""
    if how.derivative == "exact" or direction.norm == 0.0:
        return OK
    step = motion.default_step(direction) if how.step is None else how.step
    return motion.step_fault(direction, step)


def without_motion(status: str) -> str:
    """Return a status that does not call a kernel frozen whose motion was lost in rounding."""
    return join_statuses(phrase for phrase in status.split("; ") if phrase != FROZEN_KERNEL)


def warn_of_held_gates(measures: Iterable[Any], *, stacklevel: int) -> None:
    """Warn once (GateWarning) of the ``held_gates`` of the measures."""
    names = dict.fromkeys(chain.from_iterable(measure.held_gates for measure in measures))
    warn_of_gates(list(names), option="derivative", stacklevel=stacklevel + 1)


def set_in_motion(snapshot: Snapshot, settings: KernelSettings, probe_seed: int) -> KernelMotion:
    """Return the motion of a snapshot, to be closed; the seed is that of the operators' probes."""
    probes = torch.Generator().manual_seed(probe_seed)
    survey = survey_snapshot(snapshot, settings, probes)
    return KernelMotion(snapshot, survey, max_memory=settings.max_memory, generator=probes)


def find_direction(
    snapshot: Snapshot,
    motion: KernelMotion,
    settings: MotionSettings,
    draws: torch.Generator | None = None,
) -> Direction:
    """Return the direction that the settings name; a random one is of the seed, or of ``draws``."""
    if draws is None:
        draws = torch.Generator().manual_seed(settings.random_seed)
    return motion.direction(settings.settled(snapshot).direction, generator=draws)


def unit_of(direction: Direction) -> str:
    """Return what rates along a direction are per; a random one is as long as gradient flow."""
    return PER_TAU if direction.name == "random" else direction.unit


def unit_status(unit: str) -> str:
    """Return what a status says of rates in a unit, ``"ok"`` if they are simply per τ."""
    if unit == PER_TAU:
        return OK
    return rates_in(f"per unit of the direction {unit}" if unit == AS_GIVEN else unit)


@dataclass(frozen=True, eq=False)
class ModeCouplings:
    """V = Uᵀ (dM/dt) U between k modes of M, and the error along them, whatever the shells."""

    eigenvalues: Floats  # (k,), ascending, 1/τ; rounding may leave some below zero
    amplitudes: Floats  # (k,), g = ⟨e, u⟩; their squares sum to ‖e‖²
    error_rates: Floats  # (k,), ⟨ė, u⟩; what ė has outside the span is missing
    couplings: Floats  # (k, k), V along the direction, symmetric, 1/τ²
    random_couplings: Floats  # (n_random, k, k), along random directions of the same norm
    residual_norms: Floats  # (k,), ‖M u − λ u‖, rounding included
    converged: NDArray[np.bool_]  # (k,), whether that is small beside the eigenvalue
    lambda_max: float  # 1/τ, as the next two
    floor: float  # the λ below which modes are unresolved
    noise: float  # norm of the rounding error of M
    total: float  # ½‖e‖²
    total_rate: float  # ⟨ė, e⟩: how fast ½‖e‖² changes along the direction
    direction: str
    derivative: str
    direction_norm: float
    solver: str
    n_matvecs: int  # products with M behind the modes
    n_outputs: int
    n_rows: int
    n_parameters: int  # those that move
    dynamics_exact: bool  # whether ė = −M e along the direction
    unit: str = PER_TAU  # what rates are per
    rate_noise: float = 0.0  # 2-norm of the rounding error of dM/dt
    held_gates: tuple[str, ...] = ()  # functions whose kinks the derivative does not see
    step_fault: str = OK  # of the step of a difference
    plan: dict[str, Any] | None = None  # what was predicted, a row of ``plan_``
    tau: float = 0.0
    batch: int | str = 0
    name: str | None = None
    status: str = OK

    @cached_property
    def resolved(self) -> NDArray[np.bool_]:
        """Modes that a statistic may use: converged, positive, above the floor, and known.

        See :func:`known_couplings` for the last.
        """
        # ‖error‖_F ≤ √n ‖error‖: the root mean square of an entry.
        noise = self.rate_noise / self.n_outputs**0.5 if self.rate_noise else 0.0
        known = known_couplings(self.couplings, self.eigenvalues, noise)
        known &= self.step_fault != STEP_TOO_SHORT
        return np.asarray(self._above_floor & known, dtype=np.bool_)

    @property
    def lost(self) -> bool:
        """Whether modes that are resolved by themselves have couplings lost in rounding."""
        return bool((self._above_floor & ~self.resolved).any())

    @property
    def frozen(self) -> bool:
        """Whether the kernel does not move along the direction, or nothing moves."""
        return not self.couplings.any()

    @property
    def _above_floor(self) -> NDArray[np.bool_]:
        above = (self.eigenvalues >= self.floor) & (self.eigenvalues > 0.0)
        return np.asarray(self.converged & above, dtype=np.bool_)

    def relabel(self, *, tau: float, batch: int | str, name: str | None) -> ModeCouplings:
        """Return the same measurement with the labels of a snapshot."""
        labels: dict[str, Any] = {"tau": tau, "batch": batch, "name": name}
        return replace(self, **labels)


def known_couplings(couplings: Floats, eigenvalues: Floats, noise: float) -> NDArray[np.bool_]:
    """Tell which modes have couplings that are more than noise, the root mean square of its entry.

    From the top down, as long as it is below λ_u times that of V_uv/√(λ_u λ_v) in the modes above.
    """
    known = np.full(eigenvalues.shape, True)
    if noise <= 0.0 or not couplings.any():
        return known
    order = np.argsort(-eigenvalues, kind="stable")
    order = order[eigenvalues[order] > 0.0]
    rates = eigenvalues[order]
    squares = couplings[np.ix_(order, order)] ** 2 / (rates[:, None] * rates)
    sums = np.diagonal(squares.cumsum(axis=0).cumsum(axis=1))
    sizes = np.sqrt(sums) / np.arange(1, rates.size + 1)
    above = np.append(sizes[:1], sizes[:-1])
    known[order] = np.logical_and.accumulate(noise <= rates * above)
    return known


def plan_motion(motion: KernelMotion, settings: KernelSettings, **load: Any) -> SolverPlan:
    """Plan what moves with a kernel; ``load`` is for `plan_couplings`."""
    return plan_by_memory(
        settings,
        motion.device,
        lambda max_bytes, solver: plan_couplings(
            motion.survey.footprint,
            max_bytes,
            solver=solver,
            n_steps=settings.n_steps,
            chunk_size=motion.survey.evaluation.chunk_size,
            **load,
        ),
    )


def measure_couplings(
    snapshot: Snapshot, settings: CouplingSettings, probe_seed: int = 0, verbose: int = 0
) -> ModeCouplings:
    """Measure the couplings of one snapshot; unlabelled, and not remembered.

    The modes, and for each direction two kernels or two products a mode.
    """
    kernel = settings.kernel
    with set_in_motion(snapshot, kernel, probe_seed) as motion:
        # More vectors than there are dimensions span nothing more.
        settings = replace(settings, block_size=min(settings.block_size, motion.n))
        plan = plan_motion(
            motion,
            kernel,
            block_size=settings.block_size,
            n_directions=1 + settings.n_random,
            derivative=settings.motion.derivative,
        )
        plan.announce(snapshot, verbose)
        return carry_out(plan, lambda plan: couple_motion(snapshot, motion, plan, settings))


def couple_motion(
    snapshot: Snapshot, motion: KernelMotion, plan: SolverPlan, settings: CouplingSettings
) -> ModeCouplings:
    """Measure the couplings of a snapshot whose kernel is in motion, with the solver planned."""
    draws = torch.Generator().manual_seed(settings.motion.random_seed)
    modes = _find_modes(motion, plan, settings, draws)
    found = _couple(snapshot, motion, modes, settings, draws)
    phrases = [found.status, LOST_COUPLINGS if found.lost else OK, plan.status]
    return replace(found, plan=plan.as_row(), status=join_statuses(phrases))


@dataclass(frozen=True)
class _Modes:
    """Modes in ascending order, and what is known of their kernel; noise and floor in 1/τ."""

    eigenvalues: Floats
    vectors: Tensor
    residual_norms: Floats
    converged: NDArray[np.bool_]
    lambda_max: float
    noise: float
    floor: float
    solver: str
    n_matvecs: int
    status: str


def _find_modes(
    motion: KernelMotion, plan: SolverPlan, settings: CouplingSettings, draws: torch.Generator
) -> _Modes:
    if plan.solver == "exact":
        with motion.survey.build_exact(plan.exact) as exact:
            pairs = dense_pairs(exact.to_dense(), exact.n, exact.noise)
            return _as_modes(pairs, "exact", exact.noise, exact.n, 0, exact.status)
    with motion.survey.build_matrix_free(plan.lanczos.chunk_size) as kernel:
        start = _start_block(kernel.residual_vector, settings.block_size, draws)
        run = block_lanczos(kernel.matmat, start, settings.kernel.n_steps)
        pairs = block_ritz_pairs(run, noise=kernel.noise * kernel.norm)
        return _as_modes(pairs, "lanczos", kernel.noise, 1, kernel.n_matvecs, kernel.status)


def _as_modes(
    pairs: EigenPairs, solver: str, noise: float, n: int, n_matvecs: int, status: str
) -> _Modes:
    eigenvalues, norms = pairs.eigenvalues[::-1].copy(), pairs.residual_norms[::-1].copy()
    exact = solver == "exact"
    lambda_max = max(float(eigenvalues.max(initial=0.0)), 0.0)
    absolute = noise * lambda_max
    return _Modes(
        eigenvalues=eigenvalues,
        vectors=pairs.vectors.flip(1),
        residual_norms=norms,
        converged=np.full(norms.shape, True) if exact else norms <= _CONVERGED * eigenvalues,
        lambda_max=lambda_max,
        noise=absolute,
        floor=noise_floor(absolute, lambda_max, n=n),
        solver=solver,
        n_matvecs=n_matvecs,
        status=join_statuses([pairs.status, status]),
    )


def _start_block(error: Tensor, block_size: int, draws: torch.Generator) -> Tensor:
    random = torch.randn(error.numel(), block_size - 1, generator=draws, dtype=torch.float64)
    # The random vectors are as long as the error, so that deflation treats all alike.
    length = torch.linalg.vector_norm(error) / error.numel() ** 0.5
    return torch.cat([error[:, None], random.to(error.device) * length.clamp_min(1e-300)], dim=1)


def _couple(
    snapshot: Snapshot,
    motion: KernelMotion,
    modes: _Modes,
    settings: CouplingSettings,
    draws: torch.Generator,
) -> ModeCouplings:
    how, vectors, error = settings.motion, modes.vectors, motion.residual_vector
    direction = find_direction(snapshot, motion, how, draws)
    rate = motion.error_rate(direction)
    with unwarned_gates():
        couplings, derivative = _compress(motion, direction, vectors, how)
        rate_noise = derivative.noise
        derivative.close()
        random = np.empty((settings.n_random, *couplings.shape))
        for draw in range(settings.n_random):
            other = motion.direction("random", generator=draws, norm=direction.norm)
            random[draw] = _compress(motion, other, vectors, how)[0]
    fault = find_step_fault(motion, direction, how)
    total, unit = 0.5 * float(error @ error), unit_of(direction)
    held = find_held_gates(motion, direction, how.derivative)
    phrases = [modes.status, derivative.status, unit_status(unit), gates_held(held)]
    phrases += [ZERO_ERROR] if total == 0.0 else []
    phrases += [FROZEN_KERNEL] if direction.norm > 0.0 and not couplings.any() else []
    if fault == STEP_TOO_SHORT:
        phrases = [without_motion(phrase) for phrase in phrases]
    phrases.append(fault)
    return ModeCouplings(
        eigenvalues=modes.eigenvalues,
        amplitudes=(vectors.T @ error).cpu().numpy(),
        error_rates=(vectors.T @ rate).cpu().numpy(),
        couplings=couplings,
        random_couplings=random,
        residual_norms=modes.residual_norms,
        converged=modes.converged,
        lambda_max=modes.lambda_max,
        floor=modes.floor,
        noise=modes.noise,
        total=total,
        total_rate=float(rate @ error),
        direction=direction.name,
        derivative=how.derivative,
        direction_norm=direction.norm,
        solver=modes.solver,
        n_matvecs=modes.n_matvecs,
        n_outputs=motion.n,
        n_rows=motion.n_rows,
        n_parameters=motion.n_parameters,
        dynamics_exact=motion.dynamics_exact and direction.name == "gradient-flow",
        unit=unit,
        rate_noise=rate_noise,
        held_gates=held,
        step_fault=fault,
        status=join_statuses(phrases),
    )


def _compress(
    motion: KernelMotion, direction: Direction, vectors: Tensor, how: MotionSettings
) -> tuple[Floats, KernelDerivative]:
    derivative = motion.derivative(direction, method=how.derivative, step=how.step)
    return derivative.compress(vectors).cpu().numpy(), derivative
