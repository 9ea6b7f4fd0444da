"""Fluxes without modes: three Lanczos runs from one error, here and in two displaced kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from spectralshell.estimators.measurement import lanczos_measure
from spectralshell.krylov import LanczosResult, gauss, lanczos
from spectralshell.operators import Direction, KernelMotion
from spectralshell.operators.model_function import widen
from spectralshell.operators.survey import KernelSurvey
from spectralshell.shells import EdgeBalance, SoftShells, SpectralMeasure
from spectralshell.shells.flux_difference import ErrorRule, difference_balance, flux_by_difference
from spectralshell.shells.measure import join_statuses

Floats = NDArray[np.float64]

TOLERANCE = 0.05
"""Part of the largest flux by which the last steps may change a resolved one."""

_SHORTER = (0.7, 0.8, 0.9)
FROZEN = "frozen kernel"
_ZERO = "zero direction"


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
    """

    alpha: Floats
    beta: Floats
    total: float

    def rule(self, n_steps: int) -> ErrorRule:
        """Return the Gauss rule after ``n_steps`` steps, or all there are."""
        m = min(n_steps, len(self.alpha))
        nodes, shares, _ = gauss(self.alpha[:m], self.beta[: max(m - 1, 0)])
        return ErrorRule(nodes, self.total * shares)


@dataclass(frozen=True, eq=False)
class FrozenErrorRuns:
    """Lanczos runs from the error e at θ in the kernels at θ, θ + h θ̇ and θ − h θ̇.

    Parameters
    ----------
    eigenvalues, amplitudes, error_rates : ndarray of shape (m,)
        Ritz values at θ, g = ⟨e, y⟩ and ⟨ė, y⟩.
    forward, backward : JacobiRun
        At the displaced parameters.
    amount : float
        h, in units of τ; 0 where nothing moves.
    total, total_rate : float
        ½‖e‖² and ⟨ė, e⟩.
    exhausted : bool
        Whether the runs span all that e excites, so that more steps would change nothing.
    n_matvecs : int
        Products of the three runs.
    """

    eigenvalues: Floats
    amplitudes: Floats
    error_rates: Floats
    forward: JacobiRun
    backward: JacobiRun
    amount: float
    total: float
    total_rate: float
    exhausted: bool
    n_matvecs: int

    def flux(self, shells: SoftShells, n_steps: int) -> Floats:
        """Return the flux through each edge as after ``n_steps`` steps."""
        if self.amount == 0.0:
            return np.zeros(len(shells.edges))
        forward, backward = self.forward.rule(n_steps), self.backward.rule(n_steps)
        return flux_by_difference(forward, backward, self.amount, shells)

    def balance(
        self, shells: SoftShells, total_rate: float
    ) -> tuple[EdgeBalance, NDArray[np.bool_]]:
        """Return the balance, and where the last third of the steps left the flux as it was.

        Lanczos resolves a spectrum from its top, and what lies deeper may stand still by accident:
        an edge counts only if all edges above it do.
        """
        steps = len(self.forward.alpha)
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
        if self.exhausted or self.amount == 0.0:
            return balance, np.full(flux.shape, True)
        shorter = [self.flux(shells, max(int(part * steps), 1)) for part in _SHORTER]
        change = np.abs(flux - np.array(shorter)).max(axis=0)
        still = change <= TOLERANCE * np.abs(flux).max(initial=0.0)
        return balance, np.logical_and.accumulate(still[::-1])[::-1]


def run_displaced(
    motion: KernelMotion,
    direction: Direction,
    n_steps: int,
    step: float | None,
    chunk_size: int | None,
) -> tuple[SpectralMeasure, FrozenErrorRuns]:
    """Run Lanczos from the error here and in the kernels displaced along a direction.

    Parameters
    ----------
    motion : KernelMotion
        The snapshot's kernel.
    direction : Direction
        θ̇.
    n_steps : int
        Steps of each of the three runs.
    step : float or None
        h; by default the displacement is eps^(1/3) of the parameters' norm, eps that of the
        products' dtype: the errors of truncation and of rounding are then alike.
    chunk_size : int or None
        Samples per chunk of a product.

    Returns
    -------
    measure : SpectralMeasure
        Of the error in the kernel at θ, with certified bounds, without labels.
    runs : FrozenErrorRuns

    Notes
    -----
    Costs three times ``n_steps`` products and one basis of n (n_steps + 1) float64 numbers.
    """
    error, rate = motion.residual_vector, motion.error_rate(direction)
    with motion.survey.build_matrix_free(chunk_size) as kernel:
        here = lanczos(kernel.matvec, error, n_steps)
        measure = lanczos_measure(kernel, here)
    eigenvalues, vectors = _diagonalized(here)
    amount = _amount(motion, direction, step)
    displaced = [
        _jacobi(motion.displaced(direction, side * amount), error, n_steps, chunk_size)
        if amount > 0.0
        else (here, JacobiRun(here.alpha, here.beta, measure.total))
        for side in (1.0, -1.0)
    ]
    (forward_result, forward), (backward_result, backward) = displaced
    exhausted = all(run.exhausted for run in (here, forward_result, backward_result))
    n_matvecs = here.n_matvecs * (1 if amount == 0.0 else 3)
    runs = FrozenErrorRuns(
        eigenvalues=eigenvalues,
        amplitudes=here.norm * vectors[0] if len(vectors) else np.zeros(0),
        error_rates=(here.basis.T @ rate).cpu().numpy() @ vectors,
        forward=forward,
        backward=backward,
        amount=amount,
        total=measure.total,
        total_rate=float(rate @ error),
        exhausted=exhausted,
        n_matvecs=n_matvecs,
    )
    phrases = [measure.status, _motion_status(forward, backward, direction)]
    return replace(measure, n_matvecs=n_matvecs, status=join_statuses(phrases)), runs


def _jacobi(
    survey: KernelSurvey, error: torch.Tensor, n_steps: int, chunk_size: int | None
) -> tuple[LanczosResult, JacobiRun]:
    with survey.build_matrix_free(chunk_size) as kernel:
        run = lanczos(kernel.matvec, error, n_steps)
    return run, JacobiRun(run.alpha, run.beta, 0.5 * run.norm**2)


def _diagonalized(run: LanczosResult) -> tuple[Floats, Floats]:
    if not len(run.alpha):
        return np.zeros(0), np.zeros((0, 0))
    values, vectors = eigh_tridiagonal(run.alpha, run.beta, lapack_driver="stev")
    return np.asarray(values, dtype=np.float64), np.asarray(vectors, dtype=np.float64)


def _amount(motion: KernelMotion, direction: Direction, step: float | None) -> float:
    if direction.norm == 0.0:
        return 0.0
    if step is not None:
        return float(step)
    parameters = motion.survey.evaluation.problem.function.parameters
    size = sum(float(widen(p).square().sum()) for p in parameters) ** 0.5
    return float(torch.finfo(motion.dtype).eps ** (1 / 3) * (size or 1.0) / direction.norm)


def _motion_status(forward: JacobiRun, backward: JacobiRun, direction: Direction) -> str:
    if direction.norm == 0.0:
        return _ZERO
    same = np.array_equal(forward.alpha, backward.alpha) and np.array_equal(
        forward.beta, backward.beta
    )
    return FROZEN if same else "ok"


__all__ = ["FrozenErrorRuns", "JacobiRun", "run_displaced"]
