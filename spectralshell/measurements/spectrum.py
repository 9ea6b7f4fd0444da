"""The spectral measure of one snapshot, by Lanczos or from the whole kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from spectralshell.krylov import (
    CumulativeBounds,
    LanczosResult,
    bidiagonal_lanczos,
    eigenmeasure,
    gauss,
    lanczos,
    residual_norms,
)
from spectralshell.measurements.settings import KernelSettings
from spectralshell.measurements.solver import (
    SolverPlan,
    carry_out,
    plan_by_memory,
    plan_spectrum,
    survey_snapshot,
)
from spectralshell.operators import ExactKernel, KernelOperator
from spectralshell.operators.survey import KernelSurvey
from spectralshell.shells import SpectralMeasure, noise_floor, quadrature_floor
from spectralshell.snapshots import Snapshot
from spectralshell.statuses import ZERO_ERROR, join_statuses

_SHORT_RUN = 5
"""Steps of the power method that the norm of a kernel is found by: fewer of Lanczos may miss it."""


def measure_spectrum(
    snapshot: Snapshot, settings: KernelSettings, probe_seed: int = 0, verbose: int = 0
) -> SpectralMeasure:
    """Measure one snapshot's error in the spectrum of its kernel; unlabelled, and not remembered.

    ``verbose=2`` shows a progress bar over Lanczos steps.
    """
    survey, plan = survey_spectrum(snapshot, settings, probe_seed, verbose)

    def solve(plan: SolverPlan) -> SpectralMeasure:
        if plan.solver == "exact":
            with survey.build_exact(plan.exact) as exact:
                measure = exact_measure(exact, exact.to_dense(), exact.noise)
        else:
            with survey.build_matrix_free(plan.lanczos.chunk_size) as kernel:
                measure = _solve_lanczos(
                    kernel, settings.n_steps, verbose, in_parameters=plan.lanczos.in_parameters
                )
        status = join_statuses([measure.status, plan.status])
        return replace(measure, plan=plan.as_row(), status=status)

    return carry_out(plan, solve)


def survey_spectrum(
    snapshot: Snapshot,
    settings: KernelSettings,
    probe_seed: int = 0,
    verbose: int = 0,
    layers: Any = None,
    *,
    needs_basis: bool = False,
) -> tuple[KernelSurvey, SolverPlan]:
    """Evaluate a snapshot, count what its kernel or those of ``layers`` cost, choose the solver."""
    probes = torch.Generator().manual_seed(probe_seed)
    survey = survey_snapshot(snapshot, settings, probes, layers)
    plan = plan_by_memory(
        settings,
        survey.device,
        lambda max_bytes, solver: plan_spectrum(
            survey.footprint,
            max_bytes,
            solver=solver,
            n_steps=settings.n_steps,
            chunk_size=survey.evaluation.chunk_size,
            needs_basis=needs_basis,
        ),
    )
    plan.announce(snapshot, verbose)
    return survey, plan


def exact_measure(kernel: ExactKernel, matrix: torch.Tensor, noise: float) -> SpectralMeasure:
    """Return the measure of an exact kernel's residual in the spectrum of a matrix.

    The matrix is the kernel or that of a layer, float64; ``noise`` is relative to its norm.
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
        status=ZERO_ERROR if spectrum.mass == 0.0 else spectrum.status,
    )


def _solve_lanczos(
    kernel: KernelOperator, n_steps: int, verbose: int, *, in_parameters: bool = False
) -> SpectralMeasure:
    steps = min(n_steps, kernel.n)
    with tqdm(total=steps, desc="Lanczos", unit="step", disable=verbose < 2) as bar:

        def show(step: int) -> None:
            bar.update(step - bar.n)

        start = kernel.residual_vector
        if in_parameters:
            pull, push = kernel.pull_joined, kernel.push_joined
            result = bidiagonal_lanczos(pull, push, start, n_steps, on_step=show)
        else:
            result = lanczos(kernel.matvec, start, n_steps, on_step=show)
    return lanczos_measure(kernel, result)


def lanczos_measure(kernel: KernelOperator, result: LanczosResult) -> SpectralMeasure:
    """Return the measure that a Lanczos run from the residual stands for."""
    total = 0.5 * result.norm**2
    nodes, shares, last = gauss(result.alpha, result.beta)
    # The products' error goes with ‖M‖, which a short run may not have reached yet.
    largest = np.abs(nodes).max(initial=0.0) + result.beta_last
    if largest < kernel.least_norm or len(nodes) < _SHORT_RUN:
        largest = max(largest, kernel.norm)
    noise = kernel.noise * largest
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
        status=ZERO_ERROR if total == 0.0 else result.status,
    )


def _measure(
    kernel: KernelOperator | ExactKernel, *, status: str, **fields: Any
) -> SpectralMeasure:
    return SpectralMeasure(
        lambda_max=_largest_rate(fields["nodes"]),
        rung=kernel.rung,
        n_matvecs=kernel.n_matvecs,
        n_probes=kernel.n_probes,
        n_outputs=kernel.n,
        n_rows=kernel.n_rows,
        dynamics_exact=kernel.dynamics_exact,
        jacobian_defect=kernel.jacobian_defect,
        status=join_statuses([kernel.status, status]),
        **fields,
    )


def _largest_rate(nodes: np.ndarray) -> float:
    return max(float(nodes[-1]), 0.0) if nodes.size else 0.0
