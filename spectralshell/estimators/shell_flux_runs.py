"""Fluxes without modes: Lanczos runs from one error, here and in displaced kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from spectralshell.estimators.measurement import lanczos_measure
from spectralshell.krylov import LanczosResult, gauss, lanczos
from spectralshell.operators import Direction, KernelMotion
from spectralshell.operators.survey import KernelSurvey
from spectralshell.shells import EdgeBalance, SoftShells, SpectralMeasure
from spectralshell.shells.flux_difference import ErrorRule, difference_balance, flux_by_difference
from spectralshell.shells.measure import join_statuses

Floats = NDArray[np.float64]

TOLERANCE = 0.05
"""Part of the largest flux by which the last steps, or half the difference, may change one."""

NOT_CONVERGED = "not converged in the steps taken"
TOO_FAR = "changes with the step of the difference"

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


__all__ = ["NOT_CONVERGED", "TOO_FAR", "FrozenErrorRuns", "JacobiRun", "run_displaced"]
