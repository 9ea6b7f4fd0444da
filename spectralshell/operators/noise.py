"""Probes of a finished kernel: repeatable, symmetric, and how exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from spectralshell.operators.kernel_operator import KernelOperator
from spectralshell.operators.model_function import ModelFunction

NOISE_FLOOR = {torch.float64: 4e-15, torch.float32: 6e-7}
"""Least relative rounding error that is claimed."""

NOISE_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Above this, products are not those of one symmetric matrix."""


_NOISE_MARGIN = 2.0
"""A few steps of the power method underestimate the norm of the error."""

_ERROR_STEPS = 3
"""From the largest mode and a random vector on: two fall short of the norm by more than the margin
where the error lies in outputs that the largest mode does not reach, three by a factor of 1.3."""

_NORM_STEPS = 5


class Reference(Protocol):
    """A kernel in float64 to compare with."""

    def build(self, image: Tensor) -> tuple[Tensor, KernelOperator]:
        """Return the entries compared, by the sizes of a product's, and their kernel."""


def measure_noise(
    kernel: KernelOperator,
    draw: Callable[[int], Tensor],
    reference: Reference,
) -> None:
    """Estimate ``kernel.norm`` and ``kernel.noise``; raise where products are not one matrix's.

    ValueError is raised if they are not those of a symmetric linear map.

    Compares M(w/3) with M w/3, whose roundings differ, and ⟨u, M w⟩ with ⟨w, M u⟩; a float32
    kernel also with products in float64, which show the rounding of the activations. Cost: six
    products, for float32 three more, and three in float64, of large models on some samples.

    Parameters
    ----------
    kernel : KernelOperator
    draw : callable
        Gives a random vector of a length.
    reference : Reference
        The same kernel in float64, whole or on some samples; built for a float32 kernel.
    """
    kernel.noise = NOISE_FLOOR[kernel.dtype]
    if kernel.device.type == "meta":
        return
    u = draw(kernel.n).to(kernel.residual_vector)
    u = u / u.norm()
    image_u = kernel.product(u)
    kernel.n_probes += 1
    norm_u = float(image_u.norm())
    if norm_u == 0.0:
        return
    # A step of the power method: the noise is relative to the largest eigenvalue.
    w = image_u / norm_u
    image_w = kernel.product(w)
    scaled = 3.0 * kernel.product(w / 3.0)
    kernel.n_probes += 2
    largest, mode, image = max(float(image_w.norm()), norm_u), w, image_w
    for _ in range(_NORM_STEPS - 2):
        if not 0.0 < float(image.norm()) < float("inf"):
            break
        mode = image / image.norm()
        image = kernel.product(mode)
        kernel.n_probes += 1
        largest = max(largest, float(image.norm()))
    kernel.norm = largest
    linear = float((image_w - scaled).norm()) / largest
    symmetric = abs(float(u @ image_w) - float(w @ image_u)) / largest
    defect = max(linear, symmetric)
    if not defect <= NOISE_LIMIT[kernel.dtype]:
        raise ValueError(
            f"model: products with its kernel are not repeatable and symmetric (relative defect "
            f"{defect:.1e}); it may hold randomness, change its state when differentiated, or "
            "lower the precision inside, by autocast or a cast of its own."
        )
    if kernel.dtype == torch.float32 and kernel.device.type != "mps":
        defect = max(defect, _error_norm(kernel, mode + u, image_w, reference) / largest)
    kernel.noise = max(kernel.noise, _NOISE_MARGIN * defect)


def _error_norm(
    kernel: KernelOperator, start: Tensor, image: Tensor, reference: Reference
) -> float:
    """Estimate the norm of the kernel's error, from below, by steps of the power method on it.

    M = J Jᵀ is wrong by δJ Jᵀ + J δJᵀ, where J is largest: the steps begin at the largest mode, and
    at a random vector, for outputs that the mode does not reach. Where the reference has some
    samples, they are those with the largest entries in ``image``, a product of the kernel, and the
    norm is taken to grow to all as their number does: at most, as rounding goes with the entries.
    """
    norm = 0.0
    try:
        entries, exact = reference.build(image)
        growth = kernel.n / len(entries)
        vector = start[entries]
        for _ in range(_ERROR_STEPS):
            size = float(vector.norm())
            if size == 0.0:
                break
            vector = vector / size
            whole = torch.zeros_like(start)
            whole[entries] = vector
            vector = kernel.product(whole)[entries] - exact.product(vector)
            kernel.n_probes += 2
            norm = max(norm, growth * float(vector.norm()))
    except (RuntimeError, TypeError, ValueError, MemoryError):
        # Some models fix their dtype inside, and memory may not reach: the other probes remain.
        return norm
    return norm


def backward_reads_model(
    kernel: KernelOperator, function: ModelFunction, draw: Callable[[int], Tensor]
) -> bool:
    """Tell whether a backward pass reads the model's parameters anew, as checkpointing does.

    Then products have to carry the frozen state through the backward pass too. Found by putting
    NaN in the place of the parameters during one.
    """
    if kernel.device.type == "meta":
        return False
    vector = draw(kernel.n)
    expected = kernel.pull(vector)
    try:
        found = function.poisoned(lambda: kernel.pull(vector))
    except RuntimeError:  # the recomputed graph did not match the recorded one
        return True
    return any(
        not torch.allclose(a, b, rtol=1e-3, atol=1e-6 * float(a.abs().max()) if a.numel() else 0.0)
        for a, b in zip(expected, found, strict=True)
    )
