"""What the fluxes of a snapshot are made of, whatever the shells: modes and couplings, or rules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from joblib import Memory
from numpy.typing import NDArray
from tqdm.auto import tqdm

from spectralshell.estimators.coupling_measurement import couple_motion, motion_for
from spectralshell.estimators.coupling_parameters import (
    CouplingConfig,
    check_motion_parameters,
)
from spectralshell.estimators.coupling_plan import CouplingPlan, plan_couplings
from spectralshell.estimators.direction_parameter import (
    may_be_random,
    settle_direction,
    unit_of,
    unit_status,
)
from spectralshell.estimators.measurement_parameters import (
    check_measurement_parameters,
    measurement_config,
    probe_seed,
)
from spectralshell.estimators.mode_couplings import ModeCouplings
from spectralshell.estimators.remembered import measure_each
from spectralshell.estimators.shell_flux_runs import FrozenErrorRuns, run_displaced
from spectralshell.operators import KernelMotion
from spectralshell.operators.exact_plan import fits
from spectralshell.operators.memory_budget import resolve_max_memory
from spectralshell.shells import EdgeBalance, SoftShells, SpectralMeasure, shell_balance
from spectralshell.shells.measure import join_statuses
from spectralshell.snapshots import Snapshot

Faults = NDArray[np.object_]

_BELOW_FLOOR = "below the resolution floor"

_WORTH = 10.0
"""Times the cost of Lanczos that ``"auto"`` pays for all modes: only they give the flux's parts."""

_HALVED = 5.0 / 3.0
"""Runs with the difference of half the step, beside those without."""


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


__all__ = [
    "FluxConfig",
    "FluxMeasurement",
    "check_flux_parameters",
    "flux_config",
    "measure_flux",
    "measure_fluxes",
]
