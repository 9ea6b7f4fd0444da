"""Fluxes of one snapshot whatever the shells: modes and couplings, or displaced Lanczos runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from spectralshell.krylov import LanczosResult, gauss, lanczos
from spectralshell.measurements.couplings import (
    CouplingSettings,
    ModeCouplings,
    couple_motion,
    find_direction,
    plan_motion,
    set_in_motion,
    unit_of,
    unit_status,
)
from spectralshell.measurements.settings import KernelSettings, MotionSettings
from spectralshell.measurements.solver import SolverPlan, carry_out
from spectralshell.measurements.spectrum import lanczos_measure
from spectralshell.operators import Direction, KernelMotion
from spectralshell.operators.survey import KernelSurvey
from spectralshell.shells import EdgeBalance, SoftShells, SpectralMeasure, shell_balance
from spectralshell.shells.flux import ErrorRule, difference_balance, flux_by_difference
from spectralshell.snapshots import Snapshot
from spectralshell.statuses import (
    BELOW_FLOOR,
    FLUX_IS_ROUNDING,
    FROZEN_KERNEL,
    NOT_CONVERGED,
    OK,
    STEP_TOO_LONG,
    STEP_TOO_SHORT,
    ZERO_DIRECTION,
    join_statuses,
)

Floats = NDArray[np.float64]

Faults = NDArray[np.object_]

TOLERANCE = 0.05
"""Part of the largest flux by which the last steps, or half the difference, may change one."""

_SHORTER = (0.7, 0.8, 0.9)

_WORTH = 10.0
"""Times the cost of Lanczos that ``"auto"`` pays for all modes: only they give the flux's parts."""

_RUNS = 5.0 / 3.0
"""Runs with the difference of half the step, beside those without."""


@dataclass(frozen=True)
class FluxSettings:
    """Settings of :func:`measure_fluxes`; the shells are not in them."""

    kernel: KernelSettings
    motion: MotionSettings


@dataclass(frozen=True, eq=False)
class JacobiRun:
    """The Jacobi matrix of a Lanczos run, from which shorter runs can be read as well."""

    alpha: Floats  # (m,), the diagonal
    beta: Floats  # (m - 1,)
    total: float  # half the squared norm of the start vector
    exhausted: bool = False  # whether more steps would change nothing
    n_matvecs: int = 0

    @classmethod
    def of(cls, run: LanczosResult) -> JacobiRun:
        """Keep the matrix of a run, not its basis."""
        return cls(run.alpha, run.beta, 0.5 * run.norm**2, run.exhausted, run.n_matvecs)

    def agrees(self, other: JacobiRun) -> bool:
        """Tell whether another run gave the same matrix to the last bit."""
        same = np.array_equal(self.alpha, other.alpha)
        return same and np.array_equal(self.beta, other.beta)

    def rule(self, n_steps: int) -> ErrorRule:
        """Return the Gauss rule after ``n_steps`` steps, or all there are."""
        m = min(n_steps, len(self.alpha))
        nodes, shares, _ = gauss(self.alpha[:m], self.beta[: max(m - 1, 0)])
        return ErrorRule(nodes, self.total * shares)


@dataclass(frozen=True, eq=False)
class FrozenErrorRuns:
    """Lanczos runs from the error e at θ in the kernels at θ, θ ± h θ̇ and θ ± h θ̇/2."""

    eigenvalues: Floats  # (m,), Ritz values at θ
    amplitudes: Floats  # (m,), g = ⟨e, y⟩
    error_rates: Floats  # (m,), ⟨ė, y⟩
    # Forward and backward at h, and at half of it; empty where nothing moves.
    pairs: tuple[tuple[JacobiRun, JacobiRun], ...]
    amount: float  # h, in units of the direction
    total: float  # ½‖e‖²
    total_rate: float  # ⟨ė, e⟩
    exhausted: bool  # whether the runs span all that e excites
    n_matvecs: int  # of all runs
    step_fault: str = OK  # of h

    def flux(self, shells: SoftShells, n_steps: int, part: int = 0) -> Floats:
        """Return the flux through each edge as after ``n_steps`` steps, from h or half of it."""
        if not self.pairs:
            return np.zeros(len(shells.edges))
        forward, backward = (run.rule(n_steps) for run in self.pairs[part])
        return flux_by_difference(forward, backward, self.amount / 2**part, shells)

    def balance(
        self,
        shells: SoftShells,
        total_rate: float,
        *,
        noise: float = 0.0,
        n: int = 1,
        speed: float = 0.0,
    ) -> tuple[EdgeBalance, list[str]]:
        """Return the balance, and what keeps each flux from being resolved, ``"ok"`` if nothing.

        ``noise`` is the norm of the rounding error of M, of ``n`` rows, ``speed`` ‖J‖ ‖θ̇‖.
        """
        # Resolved is what neither the last third of the steps nor half of h changed.
        largest = float(self.eigenvalues.max(initial=0.0))
        # Of the difference of two kernels over 2h; of the n modes a run has those that e excites.
        share = (len(self.eigenvalues) / n) ** 0.5
        coupling_noise = share * noise / (2.0**0.5 * self.amount) if self.pairs else 0.0
        steps = len(self.pairs[0][0].alpha) if self.pairs else 0
        flux = self.flux(shells, steps)
        balance = difference_balance(
            self.eigenvalues,
            self.amplitudes,
            self.error_rates,
            flux,
            shells,
            total=self.total,
            total_rate=total_rate,
            noise=noise / largest if largest > 0.0 else 0.0,
            coupling_noise=coupling_noise,
            speed=speed,
        )
        if not self.pairs or self.step_fault != OK:
            return balance, [self.step_fault] * flux.size
        short = [] if self.exhausted else [max(int(part * steps), 1) for part in _SHORTER]
        converged = _alike(flux, [self.flux(shells, n) for n in short], TOLERANCE)
        # With half of h a quarter of the error is left, so they differ by three quarters of it.
        near = _alike(flux, [self.flux(shells, steps, part=1)], 0.75 * TOLERANCE)
        faults = [
            NOT_CONVERGED if not c else OK if n else STEP_TOO_LONG
            for c, n in zip(converged, near, strict=True)
        ]
        return balance, faults


def run_displaced(
    motion: KernelMotion,
    direction: Direction,
    n_steps: int,
    step: float | None,
    chunk_size: int | None,
) -> tuple[SpectralMeasure, FrozenErrorRuns]:
    """Run Lanczos from the error here, for its measure, and in the kernels at ± h and ± h/2.

    Five times ``n_steps`` products, three times where the kernel does not move.
    """
    error, rate = motion.residual_vector, motion.error_rate(direction)
    with motion.survey.build_matrix_free(chunk_size) as kernel:
        here = lanczos(kernel.matvec, error, n_steps)
        measure = lanczos_measure(kernel, here)
    eigenvalues, vectors = _diagonalized(here)
    amount = motion.default_step(direction) if step is None else float(step)
    pairs = _displaced_pairs(motion, direction, amount, n_steps, chunk_size)
    # What the default step changes shows in the fluxes of half of it.
    judged = step is not None and direction.norm > 0.0
    fault = motion.step_fault(direction, amount) if judged else OK
    ran = [JacobiRun.of(here), *(run for pair in pairs for run in pair)]
    n_matvecs = sum(run.n_matvecs for run in ran)
    runs = FrozenErrorRuns(
        eigenvalues=eigenvalues,
        amplitudes=here.norm * vectors[0] if len(vectors) else np.zeros(0),
        error_rates=(here.basis.T @ rate).cpu().numpy() @ vectors,
        pairs=tuple(pairs) if len(pairs) > 1 else (),
        amount=amount,
        total=measure.total,
        total_rate=float(rate @ error),
        exhausted=all(run.exhausted for run in ran),
        n_matvecs=n_matvecs,
        step_fault=fault,
    )
    motion_status = OK if len(pairs) > 1 else FROZEN_KERNEL if pairs else ZERO_DIRECTION
    motion_status = fault if fault == STEP_TOO_SHORT else motion_status
    status = join_statuses([measure.status, motion_status, fault])
    return replace(measure, n_matvecs=n_matvecs, status=status), runs


def _displaced_pairs(
    motion: KernelMotion,
    direction: Direction,
    amount: float,
    n_steps: int,
    chunk_size: int | None,
) -> list[tuple[JacobiRun, JacobiRun]]:
    """Return the runs at ± h and ± h/2: the first pair alone if it agrees, none without motion."""
    pairs: list[tuple[JacobiRun, JacobiRun]] = []
    for h in (amount, amount / 2.0):
        if direction.norm == 0.0 or (pairs and pairs[0][0].agrees(pairs[0][1])):
            break
        ends = (motion.displaced(direction, side * h) for side in (1.0, -1.0))
        forward, backward = (
            _jacobi(survey, motion.residual_vector, n_steps, chunk_size) for survey in ends
        )
        pairs.append((forward, backward))
    return pairs


def _jacobi(
    survey: KernelSurvey, error: torch.Tensor, n_steps: int, chunk_size: int | None
) -> JacobiRun:
    with survey.build_matrix_free(chunk_size) as kernel:
        return JacobiRun.of(lanczos(kernel.matvec, error, n_steps))


def _diagonalized(run: LanczosResult) -> tuple[Floats, Floats]:
    if not len(run.alpha):
        return np.zeros(0), np.zeros((0, 0))
    values, vectors = eigh_tridiagonal(run.alpha, run.beta, lapack_driver="stev")
    return np.asarray(values, dtype=np.float64), np.asarray(vectors, dtype=np.float64)


def _alike(flux: Floats, others: list[Floats], tolerance: float) -> NDArray[np.bool_]:
    """Tell at which edges, and all above, others differ by little of the largest flux.

    Lanczos resolves a spectrum from its top, and what lies deeper may stand still by accident.
    """
    change = np.abs(flux - np.array([flux, *others])).max(axis=0)
    still = change <= tolerance * np.abs(flux).max(initial=0.0)
    found: NDArray[np.bool_] = np.logical_and.accumulate(still[::-1])[::-1]
    return found


@dataclass(frozen=True, eq=False)
class FluxMeasurement:
    """All that the balance of one snapshot needs beside the shells."""

    measure: SpectralMeasure  # where the error's energy is; it has the labels and the status
    couplings: ModeCouplings | None  # of all modes, from the exact solver
    runs: FrozenErrorRuns | None  # from Lanczos
    total_rate: float  # ⟨ė, e⟩ along the direction
    direction: str
    direction_norm: float
    unit: str  # what rates are per
    n_matvecs: int
    held_gates: tuple[str, ...] = ()

    @property
    def solver(self) -> str:
        """The solver used."""
        return self.measure.solver

    @property
    def plan(self) -> dict[str, Any] | None:
        """What was predicted, a row of ``plan_``."""
        return self.measure.plan

    @property
    def dynamics_exact(self) -> bool:
        """Whether ė = −M e along the direction."""
        return self.measure.dynamics_exact

    @property
    def tau(self) -> float:
        """Effective training time."""
        return self.measure.tau

    @property
    def batch(self) -> int | str:
        """Label of the batch."""
        return self.measure.batch

    @property
    def name(self) -> str | None:
        """Label of the run or model."""
        return self.measure.name

    def relabel(self, *, tau: float, batch: int | str, name: str | None) -> FluxMeasurement:
        """Return the same measurement with the labels of a snapshot."""
        labelled = self.measure.relabel(tau=tau, batch=batch)
        return replace(self, measure=replace(labelled, name=name))

    def balance(self, shells: SoftShells) -> tuple[EdgeBalance, Faults]:
        """Return the balance of soft shells, and what keeps fluxes from being resolved, by edge.

        The balance is a `ShellBalance` from the exact solver.
        """
        balance, faults = self._balance(shells)
        found = np.where(balance.flows, np.array(faults, dtype=object), FLUX_IS_ROUNDING)
        return balance, np.where(shells.edges < self.measure.floor, BELOW_FLOOR, found)

    def _balance(self, shells: SoftShells) -> tuple[EdgeBalance, list[str]]:
        modes, measure = self.couplings, self.measure
        speed = measure.lambda_max**0.5 * self.direction_norm
        if modes is not None:
            balance = shell_balance(
                modes.eigenvalues,
                modes.amplitudes,
                modes.error_rates,
                modes.couplings,
                shells,
                total=modes.total,
                total_rate=modes.total_rate,
                noise=modes.noise / modes.lambda_max if modes.lambda_max > 0.0 else 0.0,
                coupling_noise=modes.rate_noise,
                speed=speed,
            )
            return balance, [modes.step_fault] * shells.edges.size
        if self.runs is None:
            raise TypeError("couplings and runs are both None, expected one of them.")
        return self.runs.balance(
            shells, self.total_rate, noise=measure.noise, n=measure.n_outputs, speed=speed
        )


def measure_fluxes(
    snapshot: Snapshot, settings: FluxSettings, probe_seed: int = 0, verbose: int = 0
) -> FluxMeasurement:
    """Measure what the fluxes of one snapshot are made of; unlabelled, and not remembered.

    The exact solver costs what couplings of all modes cost, Lanczos five runs.
    """
    kernel, how = settings.kernel, settings.motion
    with set_in_motion(snapshot, kernel, probe_seed) as motion:
        # One run here and two for a difference: as many products as for a space of n_steps modes.
        plan = plan_motion(
            motion,
            kernel,
            block_size=1,
            n_directions=1,
            derivative=how.derivative,
            lanczos_runs=_RUNS,
            worth=_WORTH,
        )
        plan.announce(snapshot, verbose)
        coupling = CouplingSettings(kernel, how, block_size=1)

        def measure(plan: SolverPlan) -> FluxMeasurement:
            if plan.solver == "lanczos":
                return _from_runs(snapshot, motion, plan, settings)
            return _from_couplings(couple_motion(snapshot, motion, plan, coupling))

        return carry_out(plan, measure)


def _from_couplings(modes: ModeCouplings) -> FluxMeasurement:
    measure = SpectralMeasure(
        nodes=modes.eigenvalues,
        weights=0.5 * modes.amplitudes**2,
        total=modes.total,
        lambda_max=modes.lambda_max,
        floor=modes.floor,
        noise=modes.noise,
        n_matvecs=modes.n_matvecs,
        n_outputs=modes.n_outputs,
        n_rows=modes.n_rows,
        dynamics_exact=modes.dynamics_exact,
        status=modes.status,
        plan=modes.plan,
    )
    return FluxMeasurement(
        measure=measure,
        couplings=modes,
        runs=None,
        total_rate=modes.total_rate,
        direction=modes.direction,
        direction_norm=modes.direction_norm,
        unit=modes.unit,
        n_matvecs=modes.n_matvecs,
        held_gates=modes.held_gates,
    )


def _from_runs(
    snapshot: Snapshot, motion: KernelMotion, plan: SolverPlan, settings: FluxSettings
) -> FluxMeasurement:
    direction = find_direction(snapshot, motion, settings.motion)
    unit, chunk = unit_of(direction), plan.lanczos.chunk_size
    n_steps, step = settings.kernel.n_steps, settings.motion.step
    measure, runs = run_displaced(motion, direction, n_steps, step, chunk)
    measure = replace(
        measure,
        dynamics_exact=measure.dynamics_exact and direction.name == "gradient-flow",
        status=join_statuses([measure.status, unit_status(unit), plan.status]),
        plan=plan.as_row(),
    )
    return FluxMeasurement(
        measure=measure,
        couplings=None,
        runs=runs,
        total_rate=runs.total_rate,
        direction=direction.name,
        direction_norm=direction.norm,
        unit=unit,
        n_matvecs=runs.n_matvecs,
    )
