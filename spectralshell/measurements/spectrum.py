"""The spectral measure of one snapshot, by Lanczos or from the whole kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from joblib import Memory
from tqdm.auto import tqdm

from spectralshell.krylov import (
    CumulativeBounds,
    LanczosResult,
    eigenmeasure,
    gauss,
    lanczos,
    residual_norms,
)
from spectralshell.measurements.cache import measure_each
from spectralshell.measurements.settings import MeasurementConfig
from spectralshell.measurements.solver import SolverPlan, plan_solver
from spectralshell.operators import ExactKernel, KernelOperator
from spectralshell.operators.costs import resolve_max_memory
from spectralshell.operators.survey import KernelSurvey, survey_kernel
from spectralshell.shells import SpectralMeasure, noise_floor, quadrature_floor
from spectralshell.snapshots import Snapshot

_NO_ERROR = "zero error"


def measure_snapshots(
    snapshots: Sequence[Snapshot],
    config: MeasurementConfig,
    *,
    memory: Memory,
    probe_seed: int = 0,
    n_jobs: int | None = None,
    verbose: int = 0,
    on_done: Callable[[], None] | None = None,
) -> list[SpectralMeasure]:
    """Return the spectral measure of every snapshot, computing what is not known yet.

    Parameters
    ----------
    snapshots : sequence of Snapshot
        What to measure. New measures are remembered in ``snapshot.measures``, by the digest of
        ``config``.
    config : MeasurementConfig
        How to measure.
    memory : joblib.Memory
        Cache across processes and restarts; each snapshot is stored as soon as it is measured.
    probe_seed : int, default=0
        Seed of the random probes that check the operator; the measures do not depend on it.
    n_jobs : int, optional
        Processes; snapshots are the unit of work.
    verbose : int, default=0
        1 shows a progress bar over snapshots and the plan of each, 2 also a bar over Lanczos steps.
    on_done : callable, optional
        Called once for every snapshot, known or new.

    Returns
    -------
    list of SpectralMeasure
        In the order of ``snapshots``, labelled with their ``tau``, ``batch`` and ``name``.

    Notes
    -----
    A new Lanczos measure costs ``n_steps`` products with M and a few probes, an exact one a
    backward pass for each output of a sample, the contraction of the layers, and the eigenproblem.
    """
    return measure_each(
        snapshots,
        config,
        measure_snapshot,
        memory=memory,
        probe_seed=probe_seed,
        n_jobs=n_jobs,
        verbose=verbose,
        on_done=on_done,
    )


def measure_snapshot(
    snapshot: Snapshot, config: MeasurementConfig, probe_seed: int = 0, verbose: int = 0
) -> SpectralMeasure:
    """Measure one snapshot, without looking into any cache.

    Parameters
    ----------
    snapshot : Snapshot
        The model state and batch.
    config : MeasurementConfig
        How to measure.
    probe_seed : int, default=0
        Seed of the random probes that check the operator.
    verbose : int, default=0
        1 writes the plan to the standard error, 2 also shows a progress bar over Lanczos steps.

    Returns
    -------
    SpectralMeasure
        Nodes and energies of the residual in the spectrum of M, with certified bounds.
    """
    survey, plan = plan_snapshot(snapshot, config, probe_seed, verbose)
    if plan.solver == "exact":
        with survey.build_exact(plan.exact) as exact:
            measure = exact_measure(exact, exact.to_dense(), exact.noise)
    else:
        with survey.build_matrix_free(plan.lanczos.chunk_size) as kernel:
            measure = _solve_lanczos(kernel, config.n_steps, verbose)
    return replace(measure, plan=plan.as_row())


def plan_snapshot(
    snapshot: Snapshot,
    config: MeasurementConfig,
    probe_seed: int = 0,
    verbose: int = 0,
    layers: Any = None,
) -> tuple[KernelSurvey, SolverPlan]:
    """Evaluate a snapshot, count what its kernel costs, and choose the solver.

    Parameters
    ----------
    snapshot : Snapshot
        The model state and batch.
    config : MeasurementConfig
        How to measure.
    probe_seed : int, default=0
        Seed of the random probes that check the operator.
    verbose : int, default=0
        1 writes the plan to the standard error.
    layers : str, mapping or callable, optional
        Labels whose kernels will be kept apart.

    Returns
    -------
    survey : KernelSurvey
        From which either kernel is built.
    plan : SolverPlan
        The solver chosen, with its chunks.
    """
    survey = survey_kernel(
        snapshot,
        residual=config.residual,
        parameters=config.parameters,
        layers=layers,
        chunk_size=config.chunk_size,
        device=config.device,
        dtype=config.dtype,
        generator=torch.Generator().manual_seed(probe_seed),
    )
    plan = plan_solver(
        survey.footprint,
        config.n_steps,
        resolve_max_memory(config.max_memory, survey.device),
        solver=config.solver,
        chunk_size=survey.evaluation.chunk_size,
    )
    if verbose >= 1:
        tqdm.write(f"{_label(snapshot)}: {plan.describe()}", file=sys.stderr)
    return survey, plan


def exact_measure(kernel: ExactKernel, matrix: torch.Tensor, noise: float) -> SpectralMeasure:
    """Return the measure of an exact kernel's residual in the spectrum of a matrix.

    Parameters
    ----------
    kernel : ExactKernel
        Whose residual it is.
    matrix : Tensor of float64, shape (n, n)
        The kernel, or that of one of its layers.
    noise : float
        Norm of the matrix's rounding error, relative to its norm.

    Returns
    -------
    SpectralMeasure
        Without labels.
    """
    spectrum = eigenmeasure(matrix, kernel.residual_vector, noise)
    nodes = spectrum.eigenvalues
    return _measure(
        kernel,
        solver="exact",
        nodes=nodes,
        weights=spectrum.energies,
        total=float(spectrum.energies.sum()),
        noise=spectrum.noise,
        floor=noise_floor(spectrum.noise, _largest_rate(nodes), n=nodes.size),
        bounds=spectrum.bounds(),
        residual_norms=None,
        status=_NO_ERROR if spectrum.mass == 0.0 else spectrum.status,
    )


def _solve_lanczos(kernel: KernelOperator, n_steps: int, verbose: int) -> SpectralMeasure:
    steps = min(n_steps, kernel.n)
    with tqdm(total=steps, desc="Lanczos", unit="step", disable=verbose < 2) as bar:

        def show(step: int) -> None:
            bar.update(step - bar.n)

        result = lanczos(kernel.matvec, kernel.residual_vector, n_steps, on_step=show)
    return lanczos_measure(kernel, result)


def lanczos_measure(kernel: KernelOperator, result: LanczosResult) -> SpectralMeasure:
    """Return the measure that a Lanczos run from the residual stands for.

    Parameters
    ----------
    kernel : KernelOperator
        Whose residual it is.
    result : LanczosResult
        Of a run started at the residual.

    Returns
    -------
    SpectralMeasure
        Without labels.
    """
    total = 0.5 * result.norm**2
    nodes, shares, last = gauss(result.alpha, result.beta)
    # The products' error goes with ‖M‖, which a short run may not have reached yet.
    noise = kernel.noise * max(np.abs(nodes).max(initial=0.0) + result.beta_last, kernel.norm)
    bounds = CumulativeBounds.from_lanczos(
        result.alpha, result.beta, result.beta_last, total, noise, result.exhausted
    )
    lambda_max = _largest_rate(nodes)
    floor = noise_floor(noise, lambda_max, n=1)
    if not result.exhausted:
        floor = quadrature_floor(bounds, total, lambda_max, floor)
    return _measure(
        kernel,
        solver="lanczos",
        nodes=nodes,
        weights=total * shares,
        total=total,
        noise=noise,
        floor=floor,
        bounds=bounds,
        residual_norms=residual_norms(last, result.beta_last),
        status=_NO_ERROR if total == 0.0 else result.status,
    )


def _measure(
    kernel: KernelOperator | ExactKernel, *, status: str, **fields: Any
) -> SpectralMeasure:
    phrases = [phrase for phrase in (kernel.status, status) if phrase != "ok"]
    return SpectralMeasure(
        lambda_max=_largest_rate(fields["nodes"]),
        rung=kernel.rung,
        n_matvecs=kernel.n_matvecs,
        n_probes=kernel.n_probes,
        n_outputs=kernel.n,
        n_rows=kernel.n_rows,
        dynamics_exact=kernel.dynamics_exact,
        status="; ".join(phrases) or "ok",
        **fields,
    )


def _label(snapshot: Snapshot) -> str:
    name = "" if snapshot.name is None else f" of {snapshot.name}"
    return f"snapshot{name} at tau={snapshot.tau:g}, batch={snapshot.batch}"


def _largest_rate(nodes: np.ndarray) -> float:
    return max(float(nodes[-1]), 0.0) if nodes.size else 0.0
