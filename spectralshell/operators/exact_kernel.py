"""The whole kernel M = J Jᵀ as a matrix, built layer by layer."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from spectralshell.operators.exact_checks import verified_kernels
from spectralshell.operators.exact_noise import measure_exact_noise
from spectralshell.operators.exact_plan import ExactPlan
from spectralshell.operators.kernel_base import Kernel
from spectralshell.operators.kernel_problem import Evaluation, halve_until_it_fits
from spectralshell.operators.layer_assembly import LabelOf, LayerKernels
from spectralshell.operators.model_function import cast, widen
from spectralshell.operators.model_guard import MODEL_LOCK, full_precision


class ExactKernel(Kernel):
    """M = J Jᵀ of one snapshot as a matrix; made by :func:`build_exact_kernel`.

    Attributes
    ----------
    n : int
        Entries of the residual: the dimension of M.
    n_rows, n_samples, n_parameters : int
        N of the normalisation, samples of the batch, and differentiated scalars (tied ones once).
    residual_vector : Tensor of float64, shape (n,)
        e / √N, on the device (on the CPU where the device has no float64).
    matrix : Tensor, shape (n, n)
        M in ``dtype``; entries are ordered by sample, then by output.
    layers : dict of str to Tensor, each of shape (n, n)
        Kernels M_l by label in ``dtype``, which sum to M; empty where none were asked for.
    orders : dict of str to str
        How each parameter was contracted: ``"gram"``, ``"pairs"``, ``"gradients"``, or
        ``"samples"`` where the gradients of each sample were needed; named by the weight, which
        its bias goes with.
    rung : str
        ``"layers"``, or the rung of the ladder if every column was a product.
    dtype : torch.dtype
        In which the kernel was computed.
    chunk_size : int or None
        Samples recorded at a time; None is all.
    forward_flops : float
        Operations of one evaluation of the model on the batch.
    n_matvecs, n_probes : int
        Products behind the matrix (none by layers), and products spent on checks.
    dynamics_exact : bool
        Whether de/dt = −M e along the parameter velocity of the residual.
    status : str
        ``"ok"``, or what to know about the measurement.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        found: LayerKernels,
        chunk_size: int | None,
        *,
        keep_layers: bool,
    ) -> None:
        problem = evaluation.problem
        self._evaluation: Evaluation | None = evaluation
        self.n = int(evaluation.residual_vector.numel())
        self.n_rows = evaluation.targets.n_rows
        self.n_samples = problem.n_samples
        self.n_parameters = problem.function.n_parameters
        self.parameter_names = tuple(problem.function.names)
        self.residual_vector = evaluation.residual_vector
        self.residual = problem.residual.name
        self.dynamics_exact = problem.residual.dynamics_exact
        self.dtype = problem.function.dtype
        self.device = problem.function.device
        self.chunk_size = chunk_size
        self.forward_flops = evaluation.forward_flops
        self.orders = found.orders
        self.rung = found.rung
        self.n_matvecs = found.n_matvecs
        self.n_probes = found.n_probes
        self.layers = dict(found.kernels) if keep_layers else {}
        self.matrix = found.total()
        self.status = "; ".join([*problem.notes, *found.notes]) or "ok"
        self._noise = found.noise

    @cached_property
    def noise(self) -> float:
        """Norm of the matrix's rounding error, relative to ‖M‖.

        For float64 it covers the rounding of the contractions alone. For float32 it is found at
        first reading, by comparing a few samples' block with products in float64; cost: one forward
        and about ten backward passes of at most eight samples in float64.
        """
        if self._noise is not None:
            return self._noise
        if self._evaluation is None:
            raise ValueError("this ExactKernel was closed before its noise was read.")
        with MODEL_LOCK, torch.inference_mode(False):
            return measure_exact_noise(self._evaluation, self.matrix)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return M v in float64, shape (n,), for v of shape (n,)."""
        self._check_rows(vector, 1)
        return self._multiply(vector)

    def matmat(self, block: Tensor) -> Tensor:
        """Return M V in float64, shape (n, k), for V of shape (n, k)."""
        self._check_rows(block, 2)
        return self._multiply(block)

    def to_dense(self) -> Tensor:
        """Return M as a new float64 tensor of shape (n, n)."""
        return widen(self.matrix).clone() if self.dtype == torch.float64 else widen(self.matrix)

    def close(self) -> None:
        """Free what only the noise still needs; the matrix stays."""
        self._evaluation = None

    def _multiply(self, operand: Tensor) -> Tensor:
        with full_precision(self.device):
            return widen(self.matrix @ cast(operand.detach(), self.device, self.dtype))


def assemble_exact(
    evaluation: Evaluation, plan: ExactPlan, *, label_of: LabelOf, keep_layers: bool = False
) -> ExactKernel:
    """Build the exact kernel of an evaluated problem as planned, in smaller chunks if need be.

    Parameters
    ----------
    evaluation : Evaluation
    plan : ExactPlan
    label_of : callable
        Label of a parameter.
    keep_layers : bool
        Whether to keep the kernels of the labels.
    """
    problem = evaluation.problem

    def build(size: int | None) -> ExactKernel:
        with problem.function.guard():
            found: LayerKernels = problem.function.installed(
                None,
                lambda: verified_kernels(
                    evaluation, label_of=label_of, max_bytes=plan.layer_bytes, record_size=size
                ),
            )
        return ExactKernel(evaluation, found, size, keep_layers=keep_layers)

    kernel: ExactKernel = halve_until_it_fits(problem, plan.chunk_size, build)[0]
    return kernel
