"""Fluxes of one snapshot whatever the shells: modes and couplings, or displaced Lanczos runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from joblib import Memory
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from tqdm.auto import tqdm

from spectralshell.krylov import LanczosResult, gauss, lanczos
from spectralshell.measurements.cache import measure_each
from spectralshell.measurements.couplings import ModeCouplings, couple_motion, motion_for
from spectralshell.measurements.settings import (
    CouplingConfig,
    check_measurement_parameters,
    check_motion_parameters,
    may_be_random,
    measurement_config,
    probe_seed,
    settle_direction,
    unit_of,
    unit_status,
)
from spectralshell.measurements.solver import CouplingPlan, plan_couplings
from spectralshell.measurements.spectrum import lanczos_measure
from spectralshell.operators import Direction, KernelMotion
from spectralshell.operators.costs import fits, resolve_max_memory
from spectralshell.operators.survey import KernelSurvey
from spectralshell.shells import EdgeBalance, SoftShells, SpectralMeasure, shell_balance
from spectralshell.shells.flux import ErrorRule, difference_balance, flux_by_difference
from spectralshell.snapshots import Snapshot
from spectralshell.statuses import join_statuses

Floats = NDArray[np.float64]

TOLERANCE = 0.05
"""Part of the largest flux by which the last steps, or half the difference, may change one."""

NOT_CONVERGED = "not converged in the steps taken"

TOO_FAR = "changes with the step of the difference"

_SHORTER = (0.7, 0.8, 0.9)

FROZEN = "frozen kernel"

_ZERO = "zero direction"

Faults = NDArray[np.object_]

_BELOW_FLOOR = "below the resolution floor"

_WORTH = 10.0
"""Times the cost of Lanczos that ``"auto"`` pays for all modes: only they give the flux's parts."""

_HALVED = 5.0 / 3.0
"""Runs with the difference of half the step, beside those without."""


@dataclass(frozen=True, eq=False)
class JacobiRun:
    """The Jacobi matrix of a Lanczos run, from which shorter runs can be read as well.

    Parameters
    ----------
    alpha : ndarray of shape (m,)
        Diagonal.
    beta : ndarray of shape (m - 1,)
        Off-diagonal.
    total : float
        Half the squared norm of the start vector.
    exhausted : bool
        Whether more steps would change nothing.
    n_matvecs : int
        Products with M.
    """

    alpha: Floats
    beta: Floats
    total: float
    exhausted: bool = False
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
    """Lanczos runs from the error e at θ in the kernels at θ, θ ± h θ̇ and θ ± h θ̇/2.

    Parameters
    ----------
    eigenvalues, amplitudes, error_rates : ndarray of shape (m,)
        Ritz values at θ, g = ⟨e, y⟩ and ⟨ė, y⟩.
    pairs : tuple of (JacobiRun, JacobiRun)
        Forward and backward: at θ ± h θ̇, and at half of h. Empty where nothing moves.
    amount : float
        h, in units of the direction.
    total, total_rate : float
        ½‖e‖² and ⟨ė, e⟩.
    exhausted : bool
        Whether the runs span all that e excites, so that more steps would change nothing.
    n_matvecs : int
        Products of all runs.
    """

    eigenvalues: Floats
    amplitudes: Floats
    error_rates: Floats
    pairs: tuple[tuple[JacobiRun, JacobiRun], ...]
    amount: float
    total: float
    total_rate: float
    exhausted: bool
    n_matvecs: int

    def flux(self, shells: SoftShells, n_steps: int, part: int = 0) -> Floats:
        """Return the flux through each edge as after ``n_steps`` steps, from h or half of it."""
        if not self.pairs:
            return np.zeros(len(shells.edges))
        forward, backward = (run.rule(n_steps) for run in self.pairs[part])
        return flux_by_difference(forward, backward, self.amount / 2**part, shells)

    def balance(self, shells: SoftShells, total_rate: float) -> tuple[EdgeBalance, list[str]]:
        """Return the balance, and what keeps the flux through each edge from being resolved.

        A flux is resolved, ``"ok"``, where neither the last third of the steps nor half the
        difference changed it. Lanczos resolves a spectrum from its top, and what lies deeper may
        stand still by accident: an edge counts only if all edges above it do.
        """
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
        )
        if not self.pairs:
            return balance, ["ok"] * flux.size
        short = [] if self.exhausted else [max(int(part * steps), 1) for part in _SHORTER]
        converged = _alike(flux, [self.flux(shells, n) for n in short], TOLERANCE)
        # With half of h a quarter of the error is left, so they differ by three quarters of it.
        near = _alike(flux, [self.flux(shells, steps, part=1)], 0.75 * TOLERANCE)
        faults = [
            NOT_CONVERGED if not c else "ok" if n else TOO_FAR
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
    """Run Lanczos from the error here and in four kernels displaced along a direction.

    Parameters
    ----------
    motion : KernelMotion
        The snapshot's kernel.
    direction : Direction
        θ̇.
    n_steps : int
        Steps of each run.
    step : float or None
        h; by default :meth:`KernelMotion.default_step`.
    chunk_size : int or None
        Samples per chunk of a product.

    Returns
    -------
    measure : SpectralMeasure
        Of the error in the kernel at θ, with certified bounds, without labels.
    runs : FrozenErrorRuns

    Notes
    -----
    Costs five times ``n_steps`` products, three times where the kernel does not move, and one basis
    of n (n_steps + 1) float64 numbers.
    """
    error, rate = motion.residual_vector, motion.error_rate(direction)
    with motion.survey.build_matrix_free(chunk_size) as kernel:
        here = lanczos(kernel.matvec, error, n_steps)
        measure = lanczos_measure(kernel, here)
    eigenvalues, vectors = _diagonalized(here)
    amount = motion.default_step(direction) if step is None else float(step)
    pairs = _displaced_pairs(motion, direction, amount, n_steps, chunk_size)
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
    )
    motion_status = "ok" if len(pairs) > 1 else FROZEN if pairs else _ZERO
    status = join_statuses([measure.status, motion_status])
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
    """Tell at which edges, and all above, others differ by little of the largest flux."""
    change = np.abs(flux - np.array([flux, *others])).max(axis=0)
    still = change <= tolerance * np.abs(flux).max(initial=0.0)
    found: NDArray[np.bool_] = np.logical_and.accumulate(still[::-1])[::-1]
    return found


@dataclass(frozen=True)
class FluxConfig(CouplingConfig):
    """What fluxes depend on beside their snapshot: as couplings, with blocks of one vector.

    A type of its own, because results are remembered by the configuration.
    """


def check_flux_parameters(estimator: Any) -> None:
    """Check the parameters that say how fluxes are measured.

    Parameters
    ----------
    estimator : estimator
        With the attributes of a measurement and ``direction, derivative, step``.

    Raises
    ------
    ValueError, TypeError
        If one is out of range; the message names it.
    """
    check_measurement_parameters(estimator)
    check_motion_parameters(estimator)


def flux_config(estimator: Any) -> FluxConfig:
    """Gather what the fluxes of an estimator depend on.

    Parameters
    ----------
    estimator : estimator
        With checked parameters.

    Returns
    -------
    FluxConfig
        Equal for estimators whose measurements are equal.
    """
    spectrum = measurement_config(estimator)
    drawn = may_be_random(estimator.direction)
    return FluxConfig(
        residual=spectrum.residual,
        solver=spectrum.solver,
        n_steps=spectrum.n_steps,
        block_size=1,
        direction=estimator.direction,
        derivative=estimator.derivative,
        step=None if estimator.step is None else float(estimator.step),
        random_seed=probe_seed(estimator.random_state) if drawn else 0,
        parameters=spectrum.parameters,
        chunk_size=spectrum.chunk_size,
        device=spectrum.device,
        dtype=spectrum.dtype,
        max_memory=spectrum.max_memory,
    )


@dataclass(frozen=True, eq=False)
class FluxMeasurement:
    """All that the balance of one snapshot needs beside the shells.

    Parameters
    ----------
    measure : SpectralMeasure
        Where the error's energy is, with the labels of the snapshot.
    couplings : ModeCouplings or None
        All modes and their couplings, from the exact solver.
    runs : FrozenErrorRuns or None
        Lanczos runs from the error here and in the displaced kernels.
    total_rate : float
        ⟨ė, e⟩ along the direction.
    direction : str
        Name of the direction.
    direction_norm : float
        ‖θ̇‖.
    unit : str
        What rates are per: ``"per tau"`` or ``"as given"``.
    n_matvecs : int
        Products with M.
    """

    measure: SpectralMeasure
    couplings: ModeCouplings | None
    runs: FrozenErrorRuns | None
    total_rate: float
    direction: str
    direction_norm: float
    unit: str
    n_matvecs: int

    def relabel(self, *, tau: float, batch: int | str, name: str | None) -> FluxMeasurement:
        """Return the same measurement with the labels of a snapshot."""
        labelled = self.measure.relabel(tau=tau, batch=batch)
        return replace(self, measure=replace(labelled, name=name))

    def balance(self, shells: SoftShells) -> tuple[EdgeBalance, Faults]:
        """Return the balance of soft shells, and what keeps fluxes from being resolved.

        Parameters
        ----------
        shells : SoftShells
            The weights.

        Returns
        -------
        balance : EdgeBalance
            A `ShellBalance` from the exact solver.
        faults : ndarray of str, shape (n_edges,)
            ``"ok"`` at the edges that are resolved.
        """
        balance, faults = self._balance(shells)
        below = shells.edges < self.measure.floor
        return balance, np.where(below, _BELOW_FLOOR, np.array(faults, dtype=object))

    def _balance(self, shells: SoftShells) -> tuple[EdgeBalance, list[str]]:
        modes = self.couplings
        if modes is not None:
            balance = shell_balance(
                modes.eigenvalues,
                modes.amplitudes,
                modes.error_rates,
                modes.couplings,
                shells,
                total=modes.total,
                total_rate=modes.total_rate,
            )
            return balance, ["ok"] * shells.edges.size
        if self.runs is None:
            raise TypeError("couplings and runs are both None, expected one of them.")
        return self.runs.balance(shells, self.total_rate)


def measure_fluxes(
    snapshots: Sequence[Snapshot],
    config: FluxConfig,
    *,
    memory: Memory,
    n_jobs: int | None = None,
    verbose: int = 0,
    on_done: Callable[[], None] | None = None,
) -> list[FluxMeasurement]:
    """Return what the fluxes of every snapshot are made of, computing what is not known yet.

    Parameters
    ----------
    snapshots : sequence of Snapshot
        What to measure. New results are remembered in ``snapshot.measures``.
    config : FluxConfig
        How to measure; the shells are not in it.
    memory : joblib.Memory
        Cache across processes and restarts.
    n_jobs : int, optional
        Processes over snapshots.
    verbose : int, default=0
        1 shows a progress bar over snapshots and the plan of each.
    on_done : callable, optional
        Called once for every snapshot, known or new.

    Returns
    -------
    list of FluxMeasurement
        In the order of ``snapshots``, with their labels.

    Notes
    -----
    The exact solver costs what couplings of all modes cost, Lanczos five runs of ``n_steps``
    products.
    """
    found: list[FluxMeasurement] = measure_each(
        snapshots,
        config,
        measure_flux,
        memory=memory,
        probe_seed=config.random_seed,
        n_jobs=n_jobs,
        verbose=verbose,
        on_done=on_done,
    )
    return found


def measure_flux(
    snapshot: Snapshot, config: FluxConfig, probe_seed: int = 0, verbose: int = 0
) -> FluxMeasurement:
    """Measure one snapshot, without looking into any cache.

    Parameters
    ----------
    snapshot : Snapshot
        The model state and batch.
    config : FluxConfig
        How to measure.
    probe_seed : int, default=0
        Seed of the probes that check the operators.
    verbose : int, default=0
        1 writes the plan to the standard error.

    Returns
    -------
    FluxMeasurement
        With the snapshot's labels.
    """
    with motion_for(snapshot, config, probe_seed) as motion:
        plan = _plan(motion, config)
        if verbose >= 1:
            tqdm.write(f"snapshot at tau={snapshot.tau:g}: {plan.describe()}", file=sys.stderr)
        if plan.solver == "lanczos":
            return _from_runs(snapshot, motion, plan, config)
        return _from_couplings(snapshot, couple_motion(snapshot, motion, plan, config))


def _plan(motion: KernelMotion, config: FluxConfig) -> CouplingPlan:
    max_bytes = resolve_max_memory(config.max_memory, motion.device)
    # One run here and two for a difference: as many products as for a space of n_steps modes.
    plan = plan_couplings(
        motion.survey.footprint,
        max_bytes,
        solver=config.solver,
        n_steps=config.n_steps,
        block_size=1,
        n_directions=1,
        derivative=config.derivative,
        chunk_size=motion.survey.evaluation.chunk_size,
    )
    plan = replace(plan, lanczos_cost=_HALVED * plan.lanczos_cost)
    affordable = plan.exact_cost <= _WORTH * plan.lanczos_cost and fits(plan.exact_bytes, max_bytes)
    return replace(plan, solver="exact") if config.solver == "auto" and affordable else plan


def _from_couplings(snapshot: Snapshot, modes: ModeCouplings) -> FluxMeasurement:
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
        **_labels(snapshot),
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
    )


def _from_runs(
    snapshot: Snapshot, motion: KernelMotion, plan: CouplingPlan, config: FluxConfig
) -> FluxMeasurement:
    spec = config.direction
    if callable(spec):
        spec = settle_direction(spec, snapshot)
    draws = torch.Generator().manual_seed(config.random_seed)
    direction = motion.direction(spec, generator=draws)
    unit, chunk = unit_of(direction), plan.lanczos.chunk_size
    measure, runs = run_displaced(motion, direction, config.n_steps, config.step, chunk)
    measure = replace(
        measure,
        dynamics_exact=measure.dynamics_exact and direction.name == "gradient-flow",
        status=join_statuses([measure.status, unit_status(unit)]),
        **_labels(snapshot),
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


def _labels(snapshot: Snapshot) -> dict[str, Any]:
    return {"tau": snapshot.tau, "batch": snapshot.batch, "name": snapshot.name}
