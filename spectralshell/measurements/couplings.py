"""Couplings between the modes of one snapshot's moving kernel.

A warning raised while a snapshot is measured stays in the worker that measured it, and in a cache
there is none; a status reaches everybody.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from joblib import Memory
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from spectralshell.krylov import EigenPairs, block_lanczos, block_ritz_pairs, dense_pairs
from spectralshell.measurements.cache import measure_each
from spectralshell.measurements.settings import (
    CouplingConfig,
    settle_direction,
    unit_of,
    unit_status,
)
from spectralshell.measurements.solver import CouplingPlan, plan_couplings
from spectralshell.operators import Direction, KernelDerivative, KernelMotion, survey_motion
from spectralshell.operators.costs import resolve_max_memory
from spectralshell.operators.motion.directions import PER_TAU
from spectralshell.operators.motion.gates import warn_of_gates
from spectralshell.shells import noise_floor
from spectralshell.snapshots import Snapshot
from spectralshell.statuses import join_statuses
from spectralshell.warning_categories import GateWarning

_HELD = "gates held: "

Floats = NDArray[np.float64]

_CONVERGED = 1e-2
"""Largest residual norm of a mode, relative to its eigenvalue: it then stays in its shell."""

_NO_ERROR = "zero error"

_FROZEN = "frozen kernel"

_ROUNDING = "couplings of some modes are lost in rounding"


@contextmanager
def unwarned_gates() -> Iterator[None]:
    """Keep quiet of gates, for the status says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GateWarning)
        yield


def gate_status(motion: KernelMotion, direction: Direction, derivative: str) -> str:
    """Return ``"gates held: "`` and the functions with kinks, ``"ok"`` if their jumps are seen."""
    held = derivative == "exact" and direction.norm > 0.0 and motion.gates
    return _HELD + ", ".join(motion.gates) if held else "ok"


def warn_of_held_gates(statuses: Iterable[str], *, stacklevel: int) -> None:
    """Warn once if any of the statuses says that gates were held.

    Warns
    -----
    GateWarning
    """
    phrases = (phrase for status in statuses for phrase in status.split("; "))
    held = [phrase.removeprefix(_HELD) for phrase in phrases if phrase.startswith(_HELD)]
    names = dict.fromkeys(name for phrase in held for name in phrase.split(", "))
    warn_of_gates(list(names), option="derivative", stacklevel=stacklevel + 1)


@dataclass(frozen=True, eq=False)
class ModeCouplings:
    """V = Uᵀ (dM/dt) U between k modes of M, and the error along them.

    Made by :func:`~spectralshell.measurements.couplings.measure_couplings`; it does not
    depend on the shells.

    Parameters
    ----------
    eigenvalues : ndarray of shape (k,)
        Ascending, 1/τ; rounding may leave some below zero.
    amplitudes : ndarray of shape (k,)
        g = ⟨e, u⟩. Their squares sum to ‖e‖²: the error lies in the span of the modes.
    error_rates : ndarray of shape (k,)
        ⟨ė, u⟩ along the direction; what ė has outside the span is missing.
    couplings : ndarray of shape (k, k)
        V along the direction, symmetric, 1/τ².
    random_couplings : ndarray of shape (n_random, k, k)
        V along random directions of the same norm.
    residual_norms : ndarray of shape (k,)
        ‖M u − λ u‖, rounding included.
    converged : ndarray of bool, shape (k,)
        Modes whose residual norm is small beside their own eigenvalue.
    lambda_max, floor, noise : float
        Largest eigenvalue; the λ below which modes are unresolved; norm of the rounding error of
        M. All 1/τ.
    total, total_rate : float
        ½‖e‖², and ⟨ė, e⟩: how fast ½‖e‖² changes along the direction.
    direction, derivative : str
        What the parameters do, and how M was differentiated.
    direction_norm : float
        ‖θ̇‖ over the parameters.
    solver : str
        ``"exact"`` or ``"lanczos"``.
    n_matvecs : int
        Products with M behind the modes.
    n_outputs, n_rows, n_parameters : int
        Entries of e, rows N, and parameters that move.
    dynamics_exact : bool
        Whether ė = −M e along the direction.
    unit : str
        What rates are per: ``"per tau"``, for gradient flows, random directions of their length and
        the way between snapshots of different times, or ``"as given"``.
    rate_noise : float
        2-norm of the rounding error of dM/dt. No coupling is wrong by more, and in the root mean
        square by no more than that over the root of ``n_outputs``.
    tau, batch, name
        Labels of the snapshot.
    status : str
        ``"ok"``, or phrases joined by ``"; "``.
    """

    eigenvalues: Floats
    amplitudes: Floats
    error_rates: Floats
    couplings: Floats
    random_couplings: Floats
    residual_norms: Floats
    converged: NDArray[np.bool_]
    lambda_max: float
    floor: float
    noise: float
    total: float
    total_rate: float
    direction: str
    derivative: str
    direction_norm: float
    solver: str
    n_matvecs: int
    n_outputs: int
    n_rows: int
    n_parameters: int
    dynamics_exact: bool
    unit: str = PER_TAU
    rate_noise: float = 0.0
    tau: float = 0.0
    batch: int | str = 0
    name: str | None = None
    status: str = "ok"

    @cached_property
    def resolved(self) -> NDArray[np.bool_]:
        """Modes that a statistic may use: converged, with λ > 0 at or above the floor, and known.

        See :func:`known_couplings` for the last.
        """
        above = (self.eigenvalues >= self.floor) & (self.eigenvalues > 0.0)
        # ‖error‖_F ≤ √n ‖error‖: the root mean square of an entry.
        noise = self.rate_noise / self.n_outputs**0.5 if self.rate_noise else 0.0
        known = known_couplings(self.couplings, self.eigenvalues, noise)
        return np.asarray(self.converged & above & known, dtype=np.bool_)

    @property
    def frozen(self) -> bool:
        """Whether the kernel does not move along the direction, or nothing moves."""
        return not self.couplings.any()

    def relabel(self, *, tau: float, batch: int | str, name: str | None) -> ModeCouplings:
        """Return the same measurement with the labels of a snapshot."""
        labels: dict[str, Any] = {"tau": tau, "batch": batch, "name": name}
        return replace(self, **labels)


def known_couplings(couplings: Floats, eigenvalues: Floats, noise: float) -> NDArray[np.bool_]:
    """Tell which modes have couplings that are more than rounding.

    Parameters
    ----------
    couplings : ndarray of shape (k, k)
        V.
    eigenvalues : ndarray of shape (k,)
    noise : float
        Root mean square of the error of an entry of V.

    Returns
    -------
    ndarray of bool, shape (k,)
        From the largest λ down, as long as the noise of V_uu, over λ_u, is less than the root mean
        square of V_uv/√(λ_u λ_v) over the modes above. All of them where V is zero.

    Examples
    --------
    >>> known_couplings(np.diag([0.5, 8.0, 16.0]), np.array([1.0, 8.0, 16.0]), 1.0).tolist()
    [False, True, True]
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


def measure_couplings(
    snapshots: Sequence[Snapshot],
    config: CouplingConfig,
    *,
    memory: Memory,
    n_jobs: int | None = None,
    verbose: int = 0,
    on_done: Callable[[], None] | None = None,
) -> list[ModeCouplings]:
    """Return the couplings of every snapshot, computing what is not known yet.

    Parameters
    ----------
    snapshots : sequence of Snapshot
        What to measure. New couplings are remembered in ``snapshot.measures``.
    config : CouplingConfig
        How to measure.
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
    list of ModeCouplings
        In the order of ``snapshots``, with their labels.

    Notes
    -----
    With k modes and r directions (the random ones and one), the exact solver takes one kernel, an
    eigenproblem, and for each direction two kernels (``"difference"``) or 2 k products
    (``"exact"``); Lanczos takes k products and 2 k for each direction. It holds (4 + r) k²
    float64 numbers.
    """
    found: list[ModeCouplings] = measure_each(
        snapshots,
        config,
        couple_snapshot,
        memory=memory,
        probe_seed=config.random_seed,
        n_jobs=n_jobs,
        verbose=verbose,
        on_done=on_done,
    )
    return found


def couple_snapshot(
    snapshot: Snapshot, config: CouplingConfig, probe_seed: int = 0, verbose: int = 0
) -> ModeCouplings:
    """Measure the couplings of one snapshot, without looking into any cache.

    Parameters
    ----------
    snapshot : Snapshot
        The model state and batch.
    config : CouplingConfig
        How to measure.
    probe_seed : int, default=0
        Seed of the probes that check the operators.
    verbose : int, default=0
        1 writes the plan to the standard error.

    Returns
    -------
    ModeCouplings
        With the snapshot's labels.
    """
    with motion_for(snapshot, config, probe_seed) as motion:
        plan = _plan(motion, config)
        if verbose >= 1:
            tqdm.write(f"snapshot at tau={snapshot.tau:g}: {plan.describe()}", file=sys.stderr)
        return couple_motion(snapshot, motion, plan, config)


def couple_motion(
    snapshot: Snapshot, motion: KernelMotion, plan: CouplingPlan, config: CouplingConfig
) -> ModeCouplings:
    """Measure the couplings of a snapshot whose kernel is in motion already.

    Parameters
    ----------
    snapshot : Snapshot
        Whose labels the couplings get.
    motion : KernelMotion
        Its kernel.
    plan : CouplingPlan
        The solver, and how its kernels are built.
    config : CouplingConfig
        How to measure.
    """
    draws = torch.Generator().manual_seed(config.random_seed)
    modes = _modes(motion, plan, config, draws)
    return _couple(snapshot, motion, modes, config, draws)


def motion_for(snapshot: Snapshot, config: Any, probe_seed: int) -> KernelMotion:
    """Return the motion of a snapshot under the settings of a configuration.

    Parameters
    ----------
    snapshot : Snapshot
        The model state and batch.
    config : CouplingConfig or alike
        With ``residual, parameters, chunk_size, max_memory, device, dtype``.
    probe_seed : int
        Seed of the probes that check the operators.
    """
    return survey_motion(
        snapshot,
        residual=config.residual,
        parameters=config.parameters,
        chunk_size=config.chunk_size,
        max_memory=config.max_memory,
        device=config.device,
        dtype=config.dtype,
        generator=torch.Generator().manual_seed(probe_seed),
    )


@dataclass(frozen=True)
class _Modes:
    """Modes in ascending order, and what is known of their kernel."""

    pairs: EigenPairs
    solver: str
    noise: float
    floor: float
    n_matvecs: int
    status: str


def _plan(motion: KernelMotion, config: CouplingConfig) -> CouplingPlan:
    return plan_couplings(
        motion.survey.footprint,
        resolve_max_memory(config.max_memory, motion.device),
        solver=config.solver,
        n_steps=config.n_steps,
        block_size=config.block_size,
        n_directions=1 + config.n_random,
        derivative=config.derivative,
        chunk_size=motion.survey.evaluation.chunk_size,
    )


def _modes(
    motion: KernelMotion, plan: CouplingPlan, config: CouplingConfig, draws: torch.Generator
) -> _Modes:
    if plan.solver == "exact":
        with motion.survey.build_exact(plan.exact) as exact:
            pairs = dense_pairs(exact.to_dense(), exact.n, exact.noise)
            return _gathered(pairs, "exact", exact.noise, exact.n, 0, exact.status)
    with motion.survey.build_matrix_free(plan.lanczos.chunk_size) as kernel:
        start = _start_block(kernel.residual_vector, config.block_size, draws)
        run = block_lanczos(kernel.matmat, start, config.n_steps)
        pairs = block_ritz_pairs(run, noise=kernel.noise * kernel.norm)
        return _gathered(pairs, "lanczos", kernel.noise, 1, kernel.n_matvecs, kernel.status)


def _gathered(
    pairs: EigenPairs, solver: str, noise: float, n: int, n_matvecs: int, status: str
) -> _Modes:
    lambda_max = max(float(pairs.eigenvalues.max(initial=0.0)), 0.0)
    absolute = noise * lambda_max
    return _Modes(
        pairs, solver, absolute, noise_floor(absolute, lambda_max, n=n), n_matvecs, status
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
    config: CouplingConfig,
    draws: torch.Generator,
) -> ModeCouplings:
    ascending = slice(None, None, -1)
    vectors = modes.pairs.vectors.flip(1)
    eigenvalues = modes.pairs.eigenvalues[ascending].copy()
    norms = modes.pairs.residual_norms[ascending].copy()
    exact = modes.solver == "exact"
    converged = np.full(norms.shape, True) if exact else norms <= _CONVERGED * eigenvalues
    error = motion.residual_vector
    direction = _direction(snapshot, motion, config.direction, draws)
    rate = motion.error_rate(direction)
    with unwarned_gates():
        couplings, derivative = _compressed(motion, direction, vectors, config)
        rate_noise = derivative.noise
        derivative.close()
        random = _random_couplings(motion, vectors, config, direction.norm, draws)
    total, unit = 0.5 * float(error @ error), unit_of(direction)
    phrases = [modes.pairs.status, modes.status, derivative.status, unit_status(unit)]
    phrases.append(gate_status(motion, direction, config.derivative))
    phrases += [_NO_ERROR] if total == 0.0 else []
    phrases += [_FROZEN] if direction.norm > 0.0 and not couplings.any() else []
    found = ModeCouplings(
        eigenvalues=eigenvalues,
        amplitudes=(vectors.T @ error).cpu().numpy(),
        error_rates=(vectors.T @ rate).cpu().numpy(),
        couplings=couplings,
        random_couplings=random,
        residual_norms=norms,
        converged=converged,
        lambda_max=max(float(eigenvalues[-1]), 0.0) if eigenvalues.size else 0.0,
        floor=modes.floor,
        noise=modes.noise,
        total=total,
        total_rate=float(rate @ error),
        direction=direction.name,
        derivative=config.derivative,
        direction_norm=direction.norm,
        solver=modes.solver,
        n_matvecs=modes.n_matvecs,
        n_outputs=motion.n,
        n_rows=motion.n_rows,
        n_parameters=motion.n_parameters,
        dynamics_exact=motion.dynamics_exact and direction.name == "gradient-flow",
        unit=unit,
        rate_noise=rate_noise,
        tau=snapshot.tau,
        batch=snapshot.batch,
        name=snapshot.name,
        status=join_statuses(phrases),
    )
    lost = converged & (eigenvalues >= modes.floor) & (eigenvalues > 0.0) & ~found.resolved
    return replace(found, status=join_statuses([found.status, _ROUNDING])) if lost.any() else found


def _direction(
    snapshot: Snapshot, motion: KernelMotion, spec: Any, draws: torch.Generator
) -> Direction:
    chosen = settle_direction(spec, snapshot) if callable(spec) else spec
    return motion.direction(chosen, generator=draws)


def _random_couplings(
    motion: KernelMotion,
    vectors: Tensor,
    config: CouplingConfig,
    norm: float,
    draws: torch.Generator,
) -> np.ndarray:
    k = vectors.shape[1]
    found = np.empty((config.n_random, k, k))
    for draw in range(config.n_random):
        direction = motion.direction("random", generator=draws, norm=norm)
        found[draw] = _compressed(motion, direction, vectors, config)[0]
    return found


def _compressed(
    motion: KernelMotion, direction: Direction, vectors: Tensor, config: CouplingConfig
) -> tuple[np.ndarray, KernelDerivative]:
    derivative = motion.derivative(direction, method=config.derivative, step=config.step)
    slice_: np.ndarray = derivative.compress(vectors).cpu().numpy()
    return slice_, derivative
