"""Kernels, matrix-free or as a matrix, built from a snapshot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralshell.operators.costs import ROOM, fits, format_bytes, plan_exact, working_bytes
from spectralshell.operators.exact_kernel import ExactKernel
from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.problem import KernelProblem
from spectralshell.operators.survey import survey_kernel
from spectralshell.warning_categories import DynamicsWarning

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot


def build_kernel(
    snapshot: Snapshot,
    *,
    residual: str | Callable[[Tensor, Any], Tensor] = "mse",
    parameters: Any = None,
    chunk_size: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> KernelOperator:
    """Build M = J Jᵀ of a snapshot, matrix-free, and test it before it is used.

    Parameters
    ----------
    snapshot : Snapshot
    residual : str or callable, default="mse"
        Which error, and which Jacobian; see :func:`spectralshell.residuals.resolve_residual`.
    parameters : None, str, or callable
        All trainable parameters, or those whose name a regular expression finds or for whose name
        a callable is true.
    chunk_size : int, optional
        Samples whose graph is recorded at a time. Smaller needs less memory and more time. Without
        it, the batch is chunked when memory runs out.
    device : str or torch.device, default="auto"
        ``"auto"`` is where the model's parameters are.
    dtype : {None, "float32", "float64"} or torch.dtype
        None is the model's own; half precision is raised to float32.
    generator : torch.Generator, optional
        For the probes; by default one with a fixed seed. No global random state is used.

    Returns
    -------
    KernelOperator

    Warns
    -----
    DynamicsWarning
        If the outputs of the model do not change as its reverse-mode Jacobian says.

    Raises
    ------
    ValueError
        If model, data and residual do not fit, something is not finite or not repeatable, or no
        way to differentiate the model passes its test (the message names the module).
    TypeError
        If an argument has a wrong type.

    Notes
    -----
    Cost: two evaluations, three more that compare the outputs with the Jacobian (in float64; of
    large models on some samples), and about nine products for the tests. See the design's section 5
    for the ladder of differentiation.

    Examples
    --------
    A linear model's kernel is the Gram matrix of its inputs, over N:

    >>> import torch
    >>> from spectralshell.snapshots import Snapshot
    >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    >>> kernel = build_kernel(Snapshot(model, x, torch.zeros(4, 1)))
    >>> bool(torch.allclose(kernel.to_dense(), x @ x.T / 4, atol=1e-14))
    True
    """
    survey = survey_kernel(
        snapshot,
        residual=residual,
        parameters=parameters,
        chunk_size=chunk_size,
        device=device,
        dtype=dtype,
        generator=generator,
    )
    _warn_of_other_derivative(survey.evaluation.problem)
    return survey.build_matrix_free(survey.evaluation.chunk_size)


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
        Bytes of working memory, or a string such as ``"1GB"``; by default 8 GB, or what is free.
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
    DynamicsWarning
        If the outputs of the model do not change as its reverse-mode Jacobian says.

    Raises
    ------
    ValueError
        If model, data and residual do not fit, something is not finite or not repeatable, or no
        way to differentiate the model passes its test; or if ``max_memory`` cannot hold the
        smallest pieces (the message says what would fit).
    TypeError
        If an argument has a wrong type.
    MemoryError
        If memory runs out with a single sample.

    Notes
    -----
    Cost, for B samples of C entries, n = B C: six evaluations (three of them in float64, of large
    models on some samples, compare the outputs with the Jacobian), C backward passes, one product,
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
    survey = survey_kernel(
        snapshot,
        residual=residual,
        parameters=parameters,
        layers=layers,
        chunk_size=chunk_size,
        device=device,
        dtype=dtype,
        generator=generator,
    )
    budget = working_bytes(max_memory, survey.device)
    plan = plan_exact(survey.footprint, budget, survey.evaluation.problem.chunk_size)
    if not fits(plan.peak_bytes, budget):
        raise ValueError(
            f"max_memory: the exact kernel of n = {survey.footprint.n_entries} entries needs about "
            f"{format_bytes(plan.peak_bytes / ROOM)}, and {format_bytes(budget)} are allowed; "
            "allow that much, take fewer samples, or use the matrix-free kernel."
        )
    _warn_of_other_derivative(survey.evaluation.problem)
    return survey.build_exact(plan, layers)


def _warn_of_other_derivative(problem: KernelProblem) -> None:
    if problem.jacobian_defect:
        warnings.warn(
            f"The outputs of {type(problem.function.model).__name__} do not change as the Jacobian "
            f"says (they differ by {problem.jacobian_defect:.1e}): it rounds, detaches, scales or "
            "reverses gradients inside. M is J Jᵀ as reverse mode gives J, and dynamics_exact is "
            "False.",
            DynamicsWarning,
            stacklevel=3,
        )
