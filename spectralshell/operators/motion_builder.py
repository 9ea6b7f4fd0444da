"""Setting the kernel of a snapshot in motion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralshell.operators.kernel_derivative import KernelDerivative
from spectralshell.operators.kernel_motion import KernelMotion
from spectralshell.operators.memory_budget import resolve_max_memory
from spectralshell.operators.survey import survey_kernel

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot


def survey_motion(
    snapshot: Snapshot,
    *,
    residual: str | Callable[[Tensor, Any], Tensor] = "mse",
    parameters: Any = None,
    chunk_size: int | None = None,
    max_memory: int | str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> KernelMotion:
    """Evaluate a snapshot whose kernel shall move.

    Parameters
    ----------
    snapshot : Snapshot
    residual, parameters, chunk_size, device, dtype
        As for :func:`~spectralshell.operators.build_kernel`.
    max_memory : int or str, optional
        Bytes of working memory, or a string such as ``"1GB"``; by default half of what is free.
    generator : torch.Generator, optional
        For probes and random directions; by default ones with a fixed seed.

    Returns
    -------
    KernelMotion

    Raises
    ------
    ValueError, TypeError
        As :func:`~spectralshell.operators.build_kernel`.

    Notes
    -----
    Cost: that of a survey, two evaluations and a recorded one of two samples. Whatever else is
    needed is computed when it is asked for, and shared by all directions.

    Examples
    --------
    Of a linear network of L layers without biases, the kernel is homogeneous of degree 2 (L − 1) in
    the parameters, so that it grows 2 (L − 1)-fold along them:

    >>> import torch
    >>> from spectralshell.snapshots import Snapshot
    >>> x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> layers = [torch.nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(2)]
    >>> model = torch.nn.Sequential(*layers)
    >>> with survey_motion(Snapshot(model, x, torch.zeros(4, 3))) as motion:
    ...     direction = motion.direction(dict(model.named_parameters()))
    ...     rate = motion.derivative(direction).to_dense()
    ...     kernel = motion.survey.build_matrix_free(None).to_dense()
    >>> bool(torch.allclose(rate, 2 * kernel))
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
    budget = resolve_max_memory(max_memory, survey.device)
    return KernelMotion(snapshot, survey, budget, generator)


def build_kernel_derivative(
    snapshot: Snapshot,
    direction: str | Snapshot | Mapping[str, Any] = "gradient-flow",
    *,
    method: str = "exact",
    step: float | None = None,
    norm: float | None = None,
    **options: Any,
) -> KernelDerivative:
    """Return dM/dt of a snapshot along one direction.

    For several directions, :func:`survey_motion` shares what they have in common.

    Parameters
    ----------
    snapshot : Snapshot
    direction, norm
        As for :meth:`KernelMotion.direction`.
    method, step
        As for :meth:`KernelMotion.derivative`.
    **options
        As for :func:`survey_motion`.

    Returns
    -------
    KernelDerivative

    Examples
    --------
    The kernel of a model that is linear in its parameters does not move:

    >>> import torch
    >>> from spectralshell.snapshots import Snapshot
    >>> x = torch.ones(2, 3)
    >>> rate = build_kernel_derivative(Snapshot(torch.nn.Linear(3, 1), x, torch.zeros(2, 1)))
    >>> rate.to_dense().abs().max().item(), rate.status
    (0.0, 'frozen kernel')
    """
    motion = survey_motion(snapshot, **options)
    return motion.derivative(motion.direction(direction, norm=norm), method=method, step=step)
