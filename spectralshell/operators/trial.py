"""One product of a kernel, compared with reverse mode and with float64 before any is used."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from spectralshell.models.function import widen
from spectralshell.operators.jacobian.ladder import ACCEPTANCE_TOLERANCE, DifferentiationError
from spectralshell.operators.jacobian.linearizations import (
    check_finite_gradient,
    check_range,
    inner,
)
from spectralshell.operators.kernel_operator import Jacobian
from spectralshell.operators.noise import (
    ERROR_STEPS,
    FAILURES,
    NOISE_FLOOR,
    NOISE_MARGIN,
    NORM_STEPS,
    Rounding,
    in_double,
    of_samples,
)
from spectralshell.operators.problem import Evaluation

_ONE_STEP_MARGIN = 4.0
"""One step of the power method finds 0.2 to 0.8 of the norm of the error, of ordinary models; what
it misses lies below the least noise that is claimed, or the whole set-up finds it."""

_SMALL_FLOPS = 1e8
"""Operations of a forward pass up to which all steps are taken: calls cost more than they do."""

_FEWEST_SAMPLES = 2


def try_products(jacobian: Jacobian, evaluation: Evaluation) -> Rounding:
    """Compare M with ⟨Jᵀv, Jᵀw⟩ and float64; DifferentiationError where it is not the first.

    v is always the same, so no result depends on what was measured before. Cost: three products.
    """
    function = evaluation.problem.function
    floor = NOISE_FLOOR[function.dtype]
    if function.device.type == "meta":
        return Rounding(noise=floor)
    v = _draw_unit(evaluation.residual_vector)
    with jacobian.ready():
        pulled = jacobian.pull(jacobian.narrow(v))
        check_finite_gradient(function.names, pulled)
        check_range(pulled)
        image = widen(jacobian.push(pulled))
    size = float(image.norm())
    if size == 0.0 and inner(pulled, pulled) == 0.0:
        return Rounding(noise=floor, n_probes=1)
    # A step of the power method and a random vector: errors go with the largest mode, or do not.
    start = image / (size or 1.0) + v
    # A backward pass that reads the parameters anew, as checkpointing does, finds NaN.
    poisoned = nullcontext() if jacobian.reads_model else function.poisoned()
    with jacobian.ready(), poisoned:
        pulled_start = jacobian.pull(jacobian.narrow(start))
    with jacobian.ready():
        image_of_start = widen(jacobian.push(pulled_start))
    defect = max(
        abs(float(start @ image) - inner(pulled_start, pulled)),
        abs(float(v @ image_of_start) - inner(pulled_start, pulled)),
    )
    scale = (inner(pulled, pulled) * inner(pulled_start, pulled_start)) ** 0.5
    if not defect <= ACCEPTANCE_TOLERANCE[function.dtype] * scale:
        raise DifferentiationError(
            f"its products are wrong (relative defect {defect / scale if scale else defect:.1e})"
        )
    norm = max(size, float((image_of_start - image).norm()))
    error, n_probes = _claimed_error(jacobian, evaluation, start, image_of_start)
    noise = max(NOISE_MARGIN * defect, error) / norm
    return Rounding(norm, max(floor, noise), 2 + n_probes)


def find_norm(jacobian: Jacobian, evaluation: Evaluation) -> float:
    """Return ‖M‖ from below by five steps of the power method, the first two those of a trial."""
    largest, vector = 0.0, _draw_unit(evaluation.residual_vector)
    if vector.is_meta:
        return largest
    for _ in range(NORM_STEPS):
        vector = jacobian.product(vector)
        size = float(vector.norm())
        if not 0.0 < size < float("inf"):
            break
        largest = max(largest, size)
        vector = vector / size
    return largest


def _draw_unit(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)
    unit: Tensor = drawn / drawn.norm()
    return unit


def _claimed_error(
    jacobian: Jacobian, evaluation: Evaluation, start: Tensor, image: Tensor
) -> tuple[float, int]:
    """Return the norm of the error of float32 products with a margin, and products spent.

    The image is that of the start. Of large models a few samples are compared.
    """
    function = evaluation.problem.function
    if function.dtype == torch.float64 or function.device.type == "mps":
        return 0.0, 0
    try:
        entries, exact, samples = in_double(jacobian, evaluation, image, _FEWEST_SAMPLES)
        if samples is not None:
            few = of_samples(jacobian, evaluation, samples, function)
            part = start[entries] / start[entries].norm()
            error = float((few.product(part) - exact.product(part)).norm())
            # Rounding goes with the entries: the norm grows to all samples at most as they do.
            return _ONE_STEP_MARGIN * error * len(start) / len(part), 2
        vector = (image - exact.product(start)) / start.norm()
        if evaluation.forward_flops > _SMALL_FLOPS:
            return _ONE_STEP_MARGIN * float(vector.norm()), 1
        norms = [float(vector.norm())]
        while len(norms) < ERROR_STEPS and norms[-1] > 0.0:
            vector = vector / norms[-1]
            vector = jacobian.product(vector) - exact.product(vector)
            norms.append(float(vector.norm()))
        return NOISE_MARGIN * max(norms), 2 * len(norms) - 1
    except FAILURES:
        return 0.0, 0
