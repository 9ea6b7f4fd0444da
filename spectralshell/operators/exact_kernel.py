"""The whole kernel M = J Jᵀ as a matrix, built layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralshell.operators.exact_checks import measure_exact_noise, verified_kernels
from spectralshell.operators.exact_plan import ExactPlan, plan_exact
from spectralshell.operators.footprint import Footprint, measure_footprint
from spectralshell.operators.kernel_problem import Evaluation, halve_until_it_fits, pose_problem
from spectralshell.operators.layer_assembly import LabelOf, LayerKernels
from spectralshell.operators.layer_labels import resolve_layers
from spectralshell.operators.memory_budget import format_bytes, resolve_max_memory
from spectralshell.operators.model_function import cast, widen
from spectralshell.operators.model_guard import MODEL_LOCK

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot


class ExactKernel:
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
        Samples per chunk, where chunks were in use.
    forward_flops : float
        Operations of one evaluation of the model on the batch.
    n_matvecs, n_probes : int
        Products behind the matrix (none by layers), and products spent on checks.
    dynamics_exact : bool
        Whether de/dt = −M e along the parameter velocity of the residual.
    status : str
        ``"ok"``, or what to know about the measurement.
    """

    def __init__(self, evaluation: Evaluation, found: LayerKernels, *, keep_layers: bool) -> None:
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
        self.chunk_size = evaluation.chunk_size
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
        return measure_exact_noise(self._evaluation, self.matrix)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return M v in float64, shape (n,), for v of shape (n,)."""
        self._check_rows(vector, 1)
        return widen(self.matrix @ cast(vector.detach(), self.device, self.dtype))

    def matmat(self, block: Tensor) -> Tensor:
        """Return M V in float64, shape (n, k), for V of shape (n, k)."""
        self._check_rows(block, 2)
        return widen(self.matrix @ cast(block.detach(), self.device, self.dtype))

    def to_dense(self) -> Tensor:
        """Return M as a new float64 tensor of shape (n, n)."""
        return widen(self.matrix).clone() if self.dtype == torch.float64 else widen(self.matrix)

    def close(self) -> None:
        """Free what only the noise still needs; the matrix stays."""
        self._evaluation = None

    def __enter__(self) -> ExactKernel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"ExactKernel(n={self.n}, n_parameters={self.n_parameters}, "
            f"residual={self.residual!r}, rung={self.rung!r}, dtype={self.dtype})"
        )

    def _check_rows(self, tensor: Tensor, ndim: int) -> None:
        if tensor.ndim != ndim or tensor.shape[0] != self.n:
            expected = f"({self.n},)" if ndim == 1 else f"({self.n}, k)"
            raise ValueError(
                f"the operand has shape {tuple(tensor.shape)}, expected {expected}: one entry for "
                "each row and output of the residual."
            )


def build_exact_kernel(
    snapshot: Snapshot,
    *,
    residual: str | Callable[[Tensor, Any], Tensor] = "mse",
    parameters: Any = None,
    layers: str | Mapping[str, str] | Callable[[str], str] | None = None,
    max_memory: int | str | None = None,
    chunk_size: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> ExactKernel:
    """Build the kernel of a snapshot as a matrix, layer by layer, without a Jacobian.

    One forward pass records where each parameter is used; one backward pass for each entry of a
    sample gives the output gradients of every layer; then each layer's kernel is contracted from
    its inputs and output gradients in the order that takes the fewest operations. Linear layers and
    products with a matrix, convolutions, embeddings, normalisations, and factors and terms of every
    sample are contracted so; any other parameter goes through the gradients of each sample. A
    product with a random vector is compared with automatic differentiation before the kernel is
    given out.

    Parameters
    ----------
    snapshot : Snapshot
    residual : str or callable, default="mse"
        Which error, and which Jacobian; see :func:`spectralshell.residuals.resolve_residual`.
    parameters : None, str, or callable
        All trainable parameters, or those whose name a regular expression finds or for whose name
        a callable is true.
    layers : {None, "module", "parameter"}, mapping or callable
        Whether to keep the kernels of parts of the model: one for each module that owns
        parameters, for each parameter, for the label that a mapping gives to the regular expression
        that finds the parameter's name, or for the label that a callable gives to the name.
    max_memory : int or str, optional
        Bytes of working memory, or a string such as ``"1GB"``; by default half of what is free.
        Samples and layers are taken in turns where it does not suffice.
    chunk_size : int, optional
        Samples recorded at a time; by default as many as ``max_memory`` allows.
    device : str or torch.device, default="auto"
        ``"auto"`` is where the model's parameters are.
    dtype : {None, "float32", "float64"} or torch.dtype
        None is the model's own; half precision is raised to float32.
    generator : torch.Generator, optional
        For the probe; by default one with a fixed seed. No global random state is used.

    Returns
    -------
    ExactKernel

    Warns
    -----
    KernelWarning
        If the comparison fails, naming the module where layers and automatic differentiation
        differ; the kernel is then found in a slower way.

    Raises
    ------
    ValueError
        If model, data and residual do not fit, something is not finite or not repeatable, or no
        way to differentiate the model passes its test.
    TypeError
        If an argument has a wrong type.
    MemoryError
        If ``max_memory`` cannot hold the smallest pieces; the message says what would fit.

    Notes
    -----
    Cost, for B samples of C entries, n = B C: three evaluations, C backward passes, one product,
    and the contractions: for each layer the cheapest of the Gram matrix of its inputs times that of
    its output gradients, the same by pairs of samples, and the gradients of all entries with one
    symmetric product. Memory: n² numbers and a copy while they are put in order, the recorded
    graph, and the output gradients of the layers, n numbers for each of a sample's activations; the
    last two are divided by chunks of samples and groups of layers. Samples must not interact; where
    they do, the comparison fails, and the columns of M come from n products.

    The structure is that of the "structured derivatives" of Novak, Sohl-Dickstein and Schoenholz,
    "Fast Finite Width Neural Tangent Kernel" (ICML 2022, section 3.4).

    Examples
    --------
    >>> import torch
    >>> from spectralshell.snapshots import Snapshot
    >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> model = torch.nn.Linear(3, 1, dtype=torch.float64)
    >>> kernel = build_exact_kernel(Snapshot(model, x, torch.zeros(4, 1)), layers="parameter")
    >>> bool(torch.allclose(kernel.layers["weight"], x @ x.T / 4, atol=1e-14))
    True
    >>> bool(torch.allclose(kernel.to_dense(), (x @ x.T + 1) / 4, atol=1e-14))
    True
    """
    with MODEL_LOCK, torch.inference_mode(False):
        problem = pose_problem(
            snapshot,
            residual=residual,
            parameters=parameters,
            chunk_size=chunk_size,
            device=device,
            dtype=dtype,
            generator=generator,
        )
        label_of = resolve_layers(layers, problem.function.names)
        budget = resolve_max_memory(max_memory, problem.function.device)
        evaluation = problem.evaluate(problem.chunk_size)
        with problem.function.guard():
            footprint: Footprint = problem.function.installed(
                None, lambda: measure_footprint(evaluation, label_of)
            )
        plan = plan_exact(footprint, budget, problem.chunk_size)
        if plan.peak_bytes > budget:
            raise MemoryError(
                f"max_memory: the exact kernel of n = {footprint.n_entries} entries needs "
                f"{format_bytes(plan.peak_bytes)}, more than {format_bytes(budget)}; allow that "
                "much, or take fewer samples or the matrix-free kernel."
            )
        return assemble_exact(evaluation, plan, label_of=label_of, keep_layers=layers is not None)


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
        posed = evaluation if evaluation.chunk_size == size else problem.evaluate(size)
        with problem.function.guard():
            found: LayerKernels = problem.function.installed(
                None,
                lambda: verified_kernels(posed, label_of=label_of, max_bytes=plan.layer_bytes),
            )
        return ExactKernel(posed, found, keep_layers=keep_layers)

    kernel: ExactKernel = halve_until_it_fits(problem, plan.chunk_size, build)[0]
    return kernel
