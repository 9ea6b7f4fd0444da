"""The ladder: the first rung that differentiates a model correctly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spectralshell.models.function import Parameters, widen
from spectralshell.operators.jacobian.linearizations import (
    RUNGS,
    STREAMED_RUNGS,
    Linearization,
    PullBack,
    VectorFunction,
    check_depends,
    check_finite_gradient,
    check_range,
    inner,
    record,
)

ACCEPTANCE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest |⟨u, M v⟩ − ⟨Jᵀu, Jᵀv⟩| / (‖Jᵀu‖ ‖Jᵀv‖): a hundred times the rounding of deep models."""

_BLOCK_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest relative difference of a block product from single ones."""


class DifferentiationError(ValueError):
    """No rung of the ladder multiplies by the Jacobian correctly."""


class ReverseModeError(DifferentiationError):
    """Not even plain reverse mode runs, which every kernel needs."""


@dataclass(frozen=True)
class Climb:
    """The rung that passed, and why those before it did not."""

    linearization: Linearization
    rung: str
    refused: dict[str, str]

    @property
    def n_probes(self) -> int:
        """Products spent on tests."""
        return 3 * (len(self.refused) + 1)


def climb(
    function: VectorFunction,
    parameters: Parameters,
    names: list[str],
    draw: Callable[[int], Tensor],
    *,
    streamed: bool = False,
    rungs: Sequence[str] | None = None,
) -> Climb:
    """Return the first rung that agrees with plain reverse mode; ``streamed`` keeps no graphs.

    Cost: two reverse passes, and three products a rung. On the meta device, the first that runs.
    """
    plain = PullBack(function, parameters)
    check_depends(plain.output)
    u, v = draw(plain.output.numel()), draw(plain.output.numel())
    try:
        pulled_u, pulled_v = plain.pull(u), plain.pull(v)
    except RuntimeError as error:  # what torch has no derivative for
        if is_out_of_memory(error):
            raise
        raise ReverseModeError(f"reverse mode: {first_line(error)}") from error
    check_finite_gradient(names, pulled_u)
    check_range(pulled_u)
    del plain
    chosen = rungs if rungs is not None else (STREAMED_RUNGS if streamed else tuple(RUNGS))
    candidates = {
        name: partial(record, name, RUNGS[name], function, parameters, streamed=streamed)
        for name in chosen
    }
    return take_first(
        candidates,
        lambda candidate: _acceptance_defect(candidate, u, v, pulled_u, pulled_v),
        ACCEPTANCE_TOLERANCE[u.dtype],
    )


def take_first(
    candidates: Mapping[str, Callable[[], Linearization]],
    defect_of: Callable[[Linearization], float],
    tolerance: float,
    refused: Mapping[str, str] | None = None,
) -> Climb:
    """Return the first candidate whose products are right; DifferentiationError if none is.

    ``refused`` are those known to be wrong, and why.
    """
    why_not = dict(refused or {})
    for name, recorded in candidates.items():
        if name in why_not:
            continue
        try:
            candidate = recorded()
            defect = defect_of(candidate)
        except Exception as error:  # any failure inside torch sends us to the next one
            if is_out_of_memory(error):
                raise
            why_not[name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        if defect <= tolerance:
            return Climb(candidate, name, why_not)
        why_not[name] = f"its products are wrong (relative defect {defect:.1e})"
    raise DifferentiationError("; ".join(f"{name}: {why}" for name, why in why_not.items()))


def _acceptance_defect(
    candidate: Linearization, u: Tensor, v: Tensor, pulled_u: Parameters, pulled_v: Parameters
) -> float:
    # A rung can be wrong without an exception: double reverse mode through a function that is
    # differentiable once only is, and symmetrically so. So ⟨u, M v⟩ = ⟨Jᵀu, Jᵀv⟩ is asked.
    # A map may change with use, by writing to its own constants: the first pair is asked for again
    # at the end, from a pull-back of the candidate's own. All rungs share the plain one.
    products = [(u, candidate.push(pulled_v)), (v, candidate.push(pulled_u))]
    products.append((u, candidate.push(candidate.pull(v))))
    for a, product in products:
        if product.shape != a.shape:
            raise ValueError(f"the product has shape {tuple(product.shape)}, not {tuple(a.shape)}")
    if u.is_meta:
        return 0.0
    scale = (inner(pulled_u, pulled_u) * inner(pulled_v, pulled_v)) ** 0.5
    expected = inner(pulled_u, pulled_v)
    defects = [abs(float(widen(a) @ widen(product)) - expected) for a, product in products]
    worst = max(defects) if all(d < float("inf") for d in defects) else float("inf")
    return worst / scale if scale > 0.0 else worst


def blocks_agree(linearization: Linearization, block: Tensor) -> bool:
    """Tell whether products of a block (k, n) run and equal products of its rows."""
    try:
        together = linearization.push_block(linearization.pull_block(block))
    except Exception as error:  # vmap has no rule for some operation: fall back on a loop
        if is_out_of_memory(error):
            raise
        return False
    apart = torch.stack([linearization.push(linearization.pull(row)) for row in block])
    if together.shape != apart.shape:
        return False
    if together.is_meta:
        return True
    difference = float(widen(together - apart).norm())
    return difference <= _BLOCK_TOLERANCE[block.dtype] * float(widen(apart).norm())


def pulls_agree(linearization: PullBack, block: Tensor) -> bool:
    """Tell whether the pull-back of a block (k, n) runs and equals those of its rows."""
    try:
        together = linearization.pull_block(block)
    except Exception as error:  # vmap has no rule for some operation: fall back on a loop
        if is_out_of_memory(error):
            raise
        return False
    singles = zip(*(linearization.pull(row) for row in block), strict=True)
    apart = tuple(torch.stack(parts) for parts in singles)
    if any(a.shape != b.shape for a, b in zip(together, apart, strict=True)):
        return False
    if block.is_meta:
        return True
    difference = tuple(a - b for a, b in zip(together, apart, strict=True))
    tolerance = _BLOCK_TOLERANCE[block.dtype]
    return inner(difference, difference) <= tolerance**2 * inner(apart, apart)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that the device or the host ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "not enough memory" in text or "out of memory" in text
    )


def first_line(error: BaseException) -> str:
    """Return the beginning of an exception's text."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"
