"""How a step in parameter space couples the modes of a network's kernel.

For one state and one batch, kernels of the logits are built at the state and on both sides of it
along each direction. The kernels of both residuals follow from them: the Jacobian of the
probabilities is the Jacobian of the logits times the derivative S of the softmax, so that the
kernel of the Brier residual is S M S. That halves the work; the random directions are shared too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import one_hot

from spectralshell import Snapshot
from spectralshell.krylov import dense_pairs
from spectralshell.measurements.couplings import ModeCouplings
from spectralshell.operators import Direction, build_exact_kernel, survey_motion
from spectralshell.shells import noise_floor
from studies.residual.files import write_atomically
from studies.residual.networks import N_CLASSES, Network

RESIDUALS = ("cross-entropy", "brier")
Floats = NDArray[np.float64]

_FLOAT32_NOISE = 6e-7
"""Of kernels along random directions, which take steps large enough for float32."""


@dataclass(frozen=True)
class MeasuringPlan:
    """How all states are measured.

    Parameters
    ----------
    n_images, n_batches : int
        Test images of a batch, and batches, the same for all states.
    n_random : int
        Random directions, the same for all states of a network and its batches.
    change, change_at_start : float
        ‖h ė‖ / ‖e‖, by how much the step to either side of a central difference changes the error.
        GELU networks give the same couplings at a tenth of it. ReLU networks do not: gates flip,
        the kernel jumps, and a smaller step sees fewer jumps, divided by less. Before training the
        kernel moves faster than the error, so that steps have to be shorter.
    """

    n_images: int = 40
    n_batches: int = 3
    n_random: int = 8
    change: float = 0.01
    change_at_start: float = 0.001


@dataclass(frozen=True, eq=False)
class Coupled:
    """V = Uᵀ (dM/dt) U of one state, batch and residual, in the basis of all modes.

    Parameters
    ----------
    eigenvalues, amplitudes : ndarray of shape (n,)
        Ascending, 1/τ; ⟨e, u⟩.
    flow : ndarray of shape (n, n)
        V along the gradient flow of the residual's own loss.
    random : ndarray of shape (n_random, n, n)
        V along random directions of the same norm.
    error_rates : ndarray of shape (n,)
        ⟨ė, u⟩ along the gradient flow.
    floor : float
        λ below which rounding hides the modes.
    direction_norm : float
        ‖θ̇‖.
    """

    eigenvalues: Floats
    amplitudes: Floats
    flow: Floats
    random: Floats
    error_rates: Floats
    floor: float
    direction_norm: float

    def mode_couplings(self, batch: int) -> ModeCouplings:
        """Return what the package's estimators take, labelled with the batch."""
        n = len(self.eigenvalues)
        return ModeCouplings(
            eigenvalues=self.eigenvalues,
            amplitudes=self.amplitudes,
            error_rates=self.error_rates,
            couplings=self.flow,
            random_couplings=self.random,
            residual_norms=np.zeros(n),
            converged=np.ones(n, dtype=bool),
            lambda_max=float(self.eigenvalues[-1]),
            floor=self.floor,
            noise=self.floor,
            total=0.5 * float(self.amplitudes @ self.amplitudes),
            total_rate=float(self.error_rates @ self.amplitudes),
            direction="gradient-flow",
            derivative="difference",
            direction_norm=self.direction_norm,
            solver="exact",
            n_matvecs=0,
            n_outputs=n,
            n_rows=n // N_CLASSES,
            n_parameters=0,
            dynamics_exact=False,
            batch=batch,
        )

    def save(self, path: Path) -> None:
        """Write the upper triangles, rounded to float32."""
        upper = np.triu_indices(len(self.eigenvalues))
        write_atomically(
            path,
            lambda part: np.savez(
                part,
                eigenvalues=self.eigenvalues,
                amplitudes=self.amplitudes,
                error_rates=self.error_rates,
                flow=self.flow[upper].astype(np.float32),
                random=self.random[:, upper[0], upper[1]].astype(np.float32),
                numbers=np.array([self.floor, self.direction_norm]),
            ),
        )

    @classmethod
    def load(cls, path: Path) -> Coupled:
        """Read what `save` wrote."""
        with np.load(path) as found:
            n = len(found["eigenvalues"])
            both = _symmetric(np.concatenate([found["flow"][None], found["random"]]), n)
            floor, norm = found["numbers"].tolist()
            return cls(
                eigenvalues=found["eigenvalues"],
                amplitudes=found["amplitudes"],
                flow=both[0],
                random=both[1:],
                error_rates=found["error_rates"],
                floor=floor,
                direction_norm=norm,
            )


def _symmetric(triangles: NDArray[Any], n: int) -> Floats:
    rows, columns = np.triu_indices(n)
    full = np.zeros((len(triangles), n, n))
    full[:, rows, columns] = triangles
    full[:, columns, rows] = triangles
    return full


def coupled_path(folder: Path, network: Network, when: str, batch: int, residual: str) -> Path:
    """Return the file of one measurement."""
    return folder / network.name / f"{when.replace(' ', '-')}_{residual}_{batch}.npz"


def measure(
    network: Network,
    state: Path,
    inputs: Tensor,
    targets: Tensor,
    plan: MeasuringPlan,
    *,
    at_start: bool = False,
    random_seed: int = 0,
) -> dict[str, Coupled]:
    """Measure one state on one batch under both residuals.

    Parameters
    ----------
    network : Network
    state : Path
        Its weights and statistics.
    inputs, targets : Tensor
        The batch.
    plan : MeasuringPlan
    at_start : bool, default=False
        Whether the state is that before training.
    random_seed : int, default=0
        Of the random directions.

    Returns
    -------
    dict of str to Coupled
        By residual.

    Notes
    -----
    Takes 5 + 2 ``n_random`` kernels of the logits.
    """
    with closing(_Probe(_snapshot(network, state, inputs, targets))) as probe:
        here = probe.kernels()
        change = plan.change_at_start if at_start else plan.change
        random = [
            probe.rates(direction, change, torch.float32)
            for direction in probe.random_directions(plan.n_random, random_seed)
        ]
        found = {}
        for residual in RESIDUALS:
            direction = probe.gradient_flow(residual)
            along = probe.rates(direction, change)
            # Random directions have norm 1; θ̇ is as long as that of the flow.
            others = [rates.matrices[residual] * direction.norm for rates in random]
            found[residual] = _coupled(here, along, residual, others, direction.norm)
    return found


def measure_steps(
    network: Network,
    state: Path,
    inputs: Tensor,
    targets: Tensor,
    changes: Sequence[float],
    *,
    random_seed: int = 0,
) -> Iterator[tuple[dict[str, Any], Coupled]]:
    """Measure couplings with steps of several sizes, along the gradient flow and at random.

    Parameters
    ----------
    network, state, inputs, targets
        As for `measure`.
    changes : sequence of float
        By how much the steps change the error, relative to its norm.
    random_seed : int, default=0
        Of the random direction, the first of those of `measure`.

    Yields
    ------
    labels : dict
        ``"residual"``, ``"direction"`` and ``"step"``; random directions also in float32, which
        `measure` takes.
    couplings : Coupled
        Along that direction, as ``flow``.
    """
    with closing(_Probe(_snapshot(network, state, inputs, targets))) as probe:
        here = probe.kernels()
        (random,) = probe.random_directions(1, random_seed)
        for change in changes:
            for label, dtype in (("random", torch.float64), ("random, float32", torch.float32)):
                along = probe.rates(random, change, dtype)
                for residual in RESIDUALS:
                    labels = {"residual": residual, "direction": label, "step": change}
                    yield labels, _coupled(here, along, residual, [], random.norm)
            for residual in RESIDUALS:
                direction = probe.gradient_flow(residual)
                labels = {"residual": residual, "direction": "gradient flow", "step": change}
                along = probe.rates(direction, change)
                yield labels, _coupled(here, along, residual, [], direction.norm)


def _snapshot(network: Network, state: Path, inputs: Tensor, targets: Tensor) -> Snapshot:
    model = network.build()
    model.load_state_dict(load_file(state))
    # Also the weights: the step along a gradient is below what float32 resolves.
    return Snapshot(model.double().eval(), inputs.double(), targets)


def _coupled(
    here: Kernels, along: Kernels, residual: str, random: Sequence[Floats], norm: float
) -> Coupled:
    matrix = here.matrices[residual]
    pairs = dense_pairs(torch.from_numpy(matrix), len(matrix), here.noise)
    vectors = pairs.vectors.numpy()[:, ::-1]
    lambda_max = float(pairs.eigenvalues[0])
    compressed = [_compressed(rate, vectors) for rate in random]
    return Coupled(
        eigenvalues=pairs.eigenvalues[::-1].copy(),
        amplitudes=vectors.T @ here.error,
        flow=_compressed(along.matrices[residual], vectors),
        random=np.stack(compressed) if compressed else np.zeros((0, *matrix.shape)),
        error_rates=vectors.T @ along.error,
        floor=noise_floor(_FLOAT32_NOISE * lambda_max, lambda_max, n=len(matrix)),
        direction_norm=norm,
    )


def _compressed(matrix: Floats, vectors: Floats) -> Floats:
    half = vectors.T @ matrix @ vectors
    return (half + half.T) / 2


@dataclass(frozen=True, eq=False)
class Kernels:
    """Kernels of both residuals at one point, or their rates of change along a direction."""

    matrices: dict[str, Floats]
    error: Floats
    noise: float


class _Probe:
    """Kernels of one snapshot at displaced parameters."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._motions = {
            residual: survey_motion(snapshot, residual=residual, device="cpu")
            for residual in RESIDUALS
        }
        # That of the logits.
        self._motion = self._motions["cross-entropy"]

    def close(self) -> None:
        """Free the graphs that rates of the error keep."""
        for motion in self._motions.values():
            motion.close()

    def gradient_flow(self, residual: str) -> Direction:
        """Return the velocity of the residual's own loss."""
        return self._motions[residual].direction("gradient-flow")

    def random_directions(self, count: int, seed: int) -> list[Direction]:
        """Return directions of norm 1."""
        draws = torch.Generator().manual_seed(seed)
        return [self._motion.direction("random", generator=draws, norm=1.0) for _ in range(count)]

    def rates(
        self, direction: Direction, change: float, dtype: torch.dtype = torch.float64
    ) -> Kernels:
        """Return central differences along a direction, per unit of it."""
        rate = self._motion.error_rate(direction)
        step = change * float(self._motion.residual_vector.norm() / rate.norm())
        ahead = self.kernels(direction, step, dtype)
        behind = self.kernels(direction, -step, dtype)
        matrices = {
            residual: (ahead.matrices[residual] - behind.matrices[residual]) / (2 * step)
            for residual in RESIDUALS
        }
        return Kernels(matrices, (ahead.error - behind.error) / (2 * step), ahead.noise)

    def kernels(
        self,
        direction: Direction | None = None,
        amount: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> Kernels:
        """Return the kernels at θ + amount · θ̇."""
        snapshot = self._snapshot if direction is None else self._displaced(direction, amount)
        with build_exact_kernel(
            snapshot, residual="cross-entropy", dtype=dtype, device="cpu"
        ) as kernel:
            matrix = kernel.to_dense().numpy()
            error = kernel.residual_vector.numpy()
            noise = kernel.noise if direction is None else 0.0
        targets = self._snapshot.targets
        return Kernels(
            {"cross-entropy": matrix, "brier": brier_kernel(matrix, error, targets)}, error, noise
        )

    def _displaced(self, direction: Direction, amount: float) -> Snapshot:
        state = self._snapshot.load_state()
        pairs = zip(self._motion.parameter_names, direction.tangents, strict=True)
        moved = {name: state[name] + amount * tangent for name, tangent in pairs}
        at = self._snapshot
        return Snapshot(at.model, at.inputs, at.targets, state={**state, **moved})


def brier_kernel(matrix: Floats, error: Floats, targets: Tensor) -> Floats:
    """Return S M S, S the derivative of the probabilities for the logits.

    Parameters
    ----------
    matrix : ndarray of shape (n, n)
        Kernel of the logits, entries ordered by sample, then by class.
    error : ndarray of shape (n,)
        (onehot − p) / √N.
    targets : Tensor of shape (N,)
        Labels.
    """
    n_samples = len(targets)
    known = one_hot(targets, N_CLASSES).numpy()
    p = known - error.reshape(n_samples, N_CLASSES) * n_samples**0.5
    slopes = p[:, :, None] * np.eye(N_CLASSES) - p[:, :, None] * p[:, None, :]
    blocks = matrix.reshape(n_samples, N_CLASSES, n_samples, N_CLASSES)
    product = np.einsum("iab,ibjc,jcd->iajd", slopes, blocks, slopes, optimize=True)
    full = product.reshape(matrix.shape)
    return (full + full.T) / 2
