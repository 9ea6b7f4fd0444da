"""Directions in parameter space along which a kernel moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralshell.models.function import ModelFunction, Parameters, cast, widen
from spectralshell.operators.jacobian.linearizations import PullBack, added, check_finite_gradient
from spectralshell.operators.problem import Evaluation
from spectralshell.residuals import resolve_residual

if TYPE_CHECKING:
    from spectralshell.snapshots import Snapshot


NAMED_DIRECTIONS = ("gradient-flow", "cross-entropy", "random")

PER_TAU, AS_GIVEN = "per tau", "as given"
"""Units of a direction."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A rate of change θ̇ of the differentiated parameters; everything else in the model stays.

    Attributes
    ----------
    name : str
        ``"gradient-flow"``, ``"cross-entropy"``, ``"random"``, ``"snapshot"`` or ``"mapping"``.
    tangents : tuple of Tensor
        In the shapes of the parameters and the order of ``parameter_names``, in the working dtype.
    norm : float
        ‖θ̇‖, the 2-norm over all parameters; NaN on the meta device.
    unit : str
        What θ̇ is per: ``"per tau"`` (of the loss's own gradient flow, or of the snapshots' times),
        ``"per tau, of the selected parameters"`` (of the snapshots' times, where parameters that
        are not differentiated changed too, so that it is a part of what training did), or
        ``"as given"``; rates of the kernel are per the same.
    """

    name: str
    tangents: Parameters
    norm: float
    unit: str

    def scaled(self, factor: float) -> Direction:
        """Return the direction times a number."""
        tangents = tuple(tangent * factor for tangent in self.tangents)
        return Direction(self.name, tangents, self.norm * abs(factor), AS_GIVEN)

    def with_norm(self, norm: float) -> Direction:
        """Return the direction scaled to a norm; zero stays zero, and what has no values as is."""
        return self.scaled(norm / self.norm) if self.norm > 0.0 else self


def as_direction(name: str, tangents: Parameters, unit: str) -> Direction:
    """Return a direction with its norm; ValueError where that is not finite."""
    if tangents[0].is_meta:
        return Direction(name, tangents, float("nan"), unit)
    square = sum(float(widen(tangent).square().sum()) for tangent in tangents)
    if not math.isfinite(square):
        raise ValueError(
            f"direction {name!r}: in {tangents[0].dtype} it holds NaN or infinite values, or its "
            "norm is; scale it down, or look where they come from."
        )
    return Direction(name, tangents, square**0.5, unit)


def gradient_flow(evaluation: Evaluation) -> Direction:
    """Return the velocity of the residual's own loss, by plain reverse mode.

    To be called inside the model's guard.
    """
    cotangent = evaluation.problem.residual.velocity_cotangent(evaluation.residual_vector)
    return as_direction("gradient-flow", _pulled(evaluation, cotangent), PER_TAU)


def cross_entropy_flow(evaluation: Evaluation) -> Direction:
    """Return minus the gradient of the mean cross-entropy, whatever the residual.

    To be called inside the model's guard; an error if the targets are not class labels.
    """
    loss = resolve_residual("nll")
    problem = evaluation.problem
    try:
        targets = problem.read_targets(loss, evaluation.outputs)
    except (ValueError, TypeError) as error:
        raise type(error)(
            f'direction="cross-entropy" needs logits and class labels: {error}'
        ) from error
    trained = replace(evaluation, problem=replace(problem, residual=loss), targets=targets)
    first = evaluation.residual_vector
    cotangent = first.new_full((targets.n_rows,), -(targets.n_rows**-0.5))
    return as_direction("cross-entropy", _pulled(trained, cotangent), PER_TAU)


def random_direction(function: ModelFunction, generator: torch.Generator) -> Direction:
    """Return a Gaussian direction; its numbers depend on the generator alone."""
    n = function.n_parameters
    if function.device.type == "meta":
        numbers = torch.empty(n, dtype=function.dtype, device=function.device)
    else:
        drawn = torch.randn(n, generator=generator, device=generator.device, dtype=torch.float64)
        numbers = drawn.to(function.dtype).to(function.device)
    pieces = torch.split(numbers, [p.numel() for p in function.parameters])
    tangents = tuple(
        piece.reshape(p.shape) for piece, p in zip(pieces, function.parameters, strict=True)
    )
    return as_direction("random", tangents, AS_GIVEN)


def displacement(function: ModelFunction, snapshot: Snapshot, other: Snapshot) -> Direction:
    """Return the way from one snapshot's parameters to another's, over the time between them.

    Only the differentiated parameters take it; where others differ too, the unit says so.
    """
    here, there = snapshot.load_state(), other.load_state()
    elapsed = other.tau - snapshot.tau
    tangents = []
    for name in function.names:
        if name not in there or there[name].shape != here[name].shape:
            found = tuple(there[name].shape) if name in there else "no such parameter"
            raise ValueError(
                f"direction: the other snapshot's {name!r} is {found}, expected shape "
                f"{tuple(here[name].shape)}; pass a snapshot of the same model."
            )
        if not there[name].is_meta and not bool(torch.isfinite(there[name]).all()):
            raise ValueError(
                f"direction: the other snapshot's {name!r} holds NaN or infinite values, as after "
                "training diverged; pass a snapshot from before."
            )
        # In float64: the difference of close checkpoints would round away.
        way = widen(there[name].detach()) - widen(here[name].detach()).to(there[name].device)
        tangents.append(cast(way / (elapsed or 1.0), function.device, function.dtype))
    unit = AS_GIVEN
    if elapsed:
        unit = PER_TAU
        if _others_differ(function, here, there):
            unit += ", of the selected parameters"
    return as_direction("snapshot", tuple(tangents), unit)


def mapped_direction(function: ModelFunction, given: Mapping[str, Any]) -> Direction:
    """Return the direction with given tensors by name, and zeros for the rest."""
    positions = function.positions()
    tangents = [torch.zeros_like(p) for p in function.parameters]
    named: dict[int, str] = {}
    for name, value in given.items():
        if name not in positions:
            raise ValueError(
                f"direction: {name!r} is none of the differentiated parameters: "
                f"{', '.join(function.names[:8])}{' …' if len(function.names) > 8 else ''}."
            )
        tensor = torch.as_tensor(value).detach()
        expected = tangents[positions[name]]
        if tensor.shape != expected.shape:
            raise ValueError(
                f"direction: {name!r} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected.shape)}."
            )
        if tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"direction: {name!r} holds values that are not finite real numbers.")
        moved = tensor.to(expected)
        first = named.setdefault(positions[name], name)
        if first != name and not moved.is_meta and not torch.equal(moved, expected):
            raise ValueError(
                f"direction: {first!r} and {name!r} are one parameter, with different values here; "
                "give it by one name."
            )
        tangents[positions[name]] = moved
    return as_direction("mapping", tuple(tangents), AS_GIVEN)


def moved_parameters(function: ModelFunction, direction: Direction, amount: float) -> Parameters:
    """Return θ + amount·θ̇, added in float64."""
    return tuple(
        cast(widen(p) + amount * widen(t), function.device, function.dtype)
        for p, t in zip(function.parameters, direction.tangents, strict=True)
    )


def _pulled(evaluation: Evaluation, cotangent: Tensor) -> Parameters:
    function = evaluation.problem.function
    total = tuple(torch.zeros_like(p) for p in function.parameters)
    for entries, chunk in evaluation.chunks_with_entries():
        part = cast(cotangent[entries], function.device, function.dtype)
        # A backward pass may read the model anew, as under checkpointing.
        with function.installed():
            pulled = PullBack(evaluation.vector_function(chunk), function.parameters).pull(part)
        total = added(total, pulled)
    check_finite_gradient(function.names, total)
    return total


def _others_differ(
    function: ModelFunction, here: Mapping[str, Tensor], there: Mapping[str, Tensor]
) -> bool:
    """Tell whether parameters that are not differentiated have other values there."""
    parameters = {name for name, _ in function.model.named_parameters()}
    others = [name for name in here if name in parameters and name not in function.names]
    return any(
        name not in there
        or here[name].shape != there[name].shape
        or not torch.equal(widen(here[name]), widen(there[name]).to(here[name].device))
        for name in others
        if not here[name].is_meta
    )
