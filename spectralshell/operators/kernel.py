"""Building the empirical neural tangent kernel M = J Jᵀ of a snapshot, and testing it first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.matrix_free import assemble_kernel
from spectralshell.operators.survey import survey_kernel

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot

__all__ = ["KernelOperator", "assemble_kernel", "build_kernel"]


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

    Raises
    ------
    ValueError
        If model, data and residual do not fit, something is not finite or not repeatable, or no
        way to differentiate the model passes its test (the message names the module).
    TypeError
        If an argument has a wrong type.

    Notes
    -----
    Cost: two evaluations, and about nine products for the tests. See the design's section 5 for the
    ladder of differentiation.

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
    return survey.build_matrix_free(survey.evaluation.chunk_size)
