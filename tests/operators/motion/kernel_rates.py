"""Dense references for dM/dt, sharing no code with the package."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.device import CPU, place
from tests.zoo import RESIDUALS, _reference_table, build_model, make_inputs, make_targets


class WrittenOutNorm(nn.Module):
    """A layer normalisation in single operations: torch.func differentiates its own one wrongly."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return self.weight * centred / (variance + self.eps).sqrt() + self.bias


def written_out(model: nn.Module) -> nn.Module:
    """Return a copy without torch's layer normalisation, in eval mode."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, WrittenOutNorm(child))
    return model


def dense_rate(case: Any, kind: str, tangents: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return M and dM/dt, J̇ and ė by torch.func on the CPU, from the table of the design."""
    model = place(written_out(build_model(case)), CPU)
    targets = place(make_targets(case, kind), CPU)
    inputs = place(make_inputs(case), CPU)
    point = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    velocity = dict(zip(point, place(tangents, CPU), strict=True))

    def table(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if isinstance(inputs, dict):
            outputs = functional_call(model, parameters, (), inputs).logits
        else:
            given = inputs if isinstance(inputs, tuple) else (inputs,)
            outputs = functional_call(model, parameters, given)
        error, values, n_rows = _reference_table(outputs, targets, kind)
        return error.reshape(-1) / n_rows**0.5, values.reshape(-1) / n_rows**0.5

    def jacobian(parameters: dict[str, Tensor]) -> Tensor:
        rows = jacrev(lambda p: table(p)[1])(parameters)
        return torch.cat([row.reshape(len(row), -1) for row in rows.values()], dim=1)

    with sdpa_kernel(SDPBackend.MATH):
        j, rate = jvp(jacobian, (point,), (velocity,))
        error_rate = jvp(lambda p: table(p)[0], (point,), (velocity,))[1]
    return {"kernel": j @ j.T, "rate": rate @ j.T + j @ rate.T, "j": rate, "error": error_rate}


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference in the Frobenius norm."""
    found, expected = found.cpu(), expected.cpu()
    return float((found - expected).norm() / expected.norm())


KINDS = tuple(RESIDUALS)
