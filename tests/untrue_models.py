"""Models whose reverse-mode Jacobian is not the derivative of their outputs, and honest neighbours.

Each entry makes a module (float32) that takes (N, 4) and gives (N, 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.hostile_models import Lambda


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class _WrongSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.9 * ctx.saved_tensors[0] * grad


class _SignThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _two(forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Lambda(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3), **parts)


def _hooked(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    if h.requires_grad:
        h.register_hook(lambda grad: 0.5 * grad)
    return m.b(h)


def _no_grad_inside(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    with torch.no_grad():
        scale = h.norm(dim=-1, keepdim=True)
    return m.b(h / scale)


def _equilibrium(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = torch.zeros(len(x), 5, dtype=x.dtype, device=x.device)
        for _ in range(100):
            z = torch.tanh(m.a(x) + 0.3 * z)
    return m.b(torch.tanh(m.a(x) + 0.3 * z))


def _rounded(m: Any, x: Tensor) -> Tensor:
    levels = 8.0 * m.a.weight
    weight = m.a.weight + (levels.round() / 8.0 - m.a.weight).detach()
    return m.b(torch.tanh(F.linear(x, weight, m.a.bias)))


def _fake_quantised(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.fake_quantize_per_tensor_affine(m.a(x).tanh().float(), 0.1, 0, -8, 7).to(x))


def _target_branch(m: Any, x: Tensor) -> Tensor:
    online, target = m.b(m.a(x).tanh()), m.b(m.a(x.flip(-1)).tanh())
    return online - target.detach()


def _softmax_stopped(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(torch.exp(h - h.mean(-1, keepdim=True).detach()))


def _reentrant(m: Any, x: Tensor) -> Tensor:
    return m.b(checkpoint(lambda t: m.a(t).tanh(), x, use_reentrant=False))


def _shifted_softmax(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h = torch.exp(h - h.amax(-1, keepdim=True).detach())  # cancels: honest
    return m.b(h / h.sum(-1, keepdim=True))


def _one_of_two_experts(m: Any, x: Tensor) -> Tensor:
    first = (x.sum(-1, keepdim=True) > 0).to(x)
    return first * m.b(m.a(x).relu()) + (1 - first) * m.b(m.a(-x).relu())


UNTRUE: dict[str, Callable[[], nn.Module]] = {
    "sign weights": _two(
        lambda m, x: m.b(torch.tanh(F.linear(x, _SignThrough.apply(m.a.weight), m.a.bias)))
    ),
    "sign activations": _two(lambda m, x: m.b(_SignThrough.apply(m.a(x)))),
    "rounded weights": _two(_rounded),
    "fake quantised": _two(_fake_quantised),
    "detached scale": _two(lambda m, x: m.b(m.a(x).tanh() * m.a(x).norm().detach())),
    "small detached part": _two(lambda m, x: m.b(m.a(x) + 1e-3 * m.a(x).tanh().detach())),
    "no_grad inside": _two(_no_grad_inside),
    "detached mean": _two(_softmax_stopped),
    "one-step equilibrium": _two(_equilibrium),
    "reversed gradients": _two(lambda m, x: m.b(_Reversed.apply(m.a(x).tanh()))),
    "scaled by a hook": _two(_hooked),
    "wrong backward": _two(lambda m, x: m.b(_WrongSquare.apply(m.a(x)))),
    "target branch": _two(_target_branch),
}

HONEST: dict[str, Callable[[], nn.Module]] = {
    "relu": _two(lambda m, x: m.b(m.a(x).relu())),
    "relu at its kink": _two(lambda m, x: m.b((m.a(x) - m.a(x).detach()).relu() + m.a(x))),
    "max pooling": _two(lambda m, x: m.b(F.max_pool1d(m.a(x)[:, None], 3, 1, 1)[:, 0])),
    "saturated": _two(lambda m, x: m.b(F.hardtanh(4 * m.a(x)).clamp(-0.5, 0.9))),
    "rounded activations": _two(lambda m, x: m.b(m.a(x).tanh() + (4 * m.a(x)).round())),
    "checkpointed": _two(_reentrant),
    "float32 inside": _two(lambda m, x: m.b(F.layer_norm(m.a(x).float(), (5,)).to(x))),
    "a maximum that cancels": _two(_shifted_softmax),
    "experts": _two(_one_of_two_experts),
    "deep relu": lambda: nn.Sequential(
        nn.Linear(4, 32),
        nn.ReLU(),
        *(m for _ in range(3) for m in (nn.Linear(32, 32), nn.ReLU())),
        nn.Linear(32, 3),
    ),
}
