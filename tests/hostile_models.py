"""Small models that mislead anything which looks at layers instead of what is computed.

Cases as in :mod:`tests.zoo`, with ``samples``, a regular expression that finds the parameters whose
kernels need the gradients of each sample (the others are contracted by layers), and ``warns``, what
the warning says where samples interact or are not in the first dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NONE = r"^\b$"
"""Finds no parameter."""


class Lambda(nn.Module):
    """Named submodules and parameters, and a forward given as a function of the module."""

    def __init__(self, forward: Any, **parts: Any) -> None:
        super().__init__()
        self._run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return self._run(self, *inputs, **named)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def _linears(forward: Any, *sizes: tuple[int, int], **more: Any) -> nn.Module:
    names = "abcdef"
    layers = {names[i]: nn.Linear(*size) for i, size in enumerate(sizes)}
    return Lambda(forward, **layers, **more)


def _tied(forward: Any, **parts: Any) -> nn.Module:
    """Make ``b.weight`` the same parameter as ``a.weight``."""
    model = Lambda(forward, **parts)
    model.b.weight = model.a.weight
    return model


class _Swish(torch.autograd.Function):
    """Differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class OnceSquare(torch.autograd.Function):
    """Differentiable once: neither forward mode nor a second reverse pass has a rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2 + x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2 * x + 1) * grad


class RootNorm(nn.Module):
    """The RMS normalisation of language models, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def _set_first_to_zero(h: Tensor) -> Tensor:
    h[:, 0] = 0
    return h


def _add_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += x
    h.mul_(1.5)
    return m.b(h.tanh())


class Buffered(nn.Module):
    """Writes its steps into one tensor that every layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.clone()  # a plain input, no graph: autograd does not watch its version below
        with torch.no_grad():
            state += 1.0
        h = self.a(state.clone())
        state.zero_()
        return self.b(torch.tanh(h) + state)


def _scan(m: Any, x: Tensor) -> Tensor:
    state = x.new_zeros(len(x), 4)
    for step in x.unbind(1):
        state = torch.tanh(m.a(step) + m.b(state))
    return m.c(state)


def _time_major(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x.transpose(0, 1).contiguous()))
    return m.b(h.mean(0))


def _crops(m: Any, x: Tensor) -> Tensor:
    both = m.a(torch.cat([x, x.flip(1)], 0)).tanh()
    return m.b(both[: len(x)] * both[len(x) :])


def _sub_batches(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.b(m.a(part).tanh()) for part in x.split(2)])


def _vmapped(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.vmap(lambda row: F.linear(row, m.a.weight, m.a.bias).tanh())(x))


def _vmapped_tokens(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.vmap(lambda row: m.a(row).tanh())(x)).mean(1)


def _experts(m: Any, x: Tensor) -> Tensor:
    chosen = x[:, 0] > 0
    out = x.new_zeros(len(x), 3)
    out[chosen] = m.a(x[chosen])
    out[~chosen] = m.b(x[~chosen])
    return out


def _branches(m: Any, x: Tensor) -> Tensor:
    return torch.cat([(m.a if row[0, 0] > 0 else m.b)(row) for row in x.split(1)])


def _mean_coupled(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(torch.tanh(h - h.mean(0, keepdim=True)))


def _class_token(m: Any, x: Tensor) -> Tensor:
    tokens = torch.cat([m.token.expand(len(x), -1, -1), m.a(x)], 1) + m.places
    return m.b(torch.tanh(m.c(tokens)).mean(1))


def _positions_by_lookup(m: Any, tokens: Tensor) -> Tensor:
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return m.b(torch.tanh(m.e(tokens) + m.p(places)))


def _flattened_tokens(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x.reshape(-1, x.shape[-1])))
    return m.b(m.n(h)).view(*x.shape[:2], -1)


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def _flat(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))


def _frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def _floats(*shape: int) -> Any:
    return lambda generator: torch.randn(*shape, generator=generator)


def _tokens(high: int, *shape: int) -> Any:
    return lambda generator: torch.randint(0, high, shape, generator=generator)


def _images(*shape: int) -> Any:
    return lambda generator: torch.randn(*shape, generator=generator).contiguous(
        memory_format=torch.channels_last
    )


def _strided(generator: torch.Generator) -> Tensor:
    return torch.randn(4, 10, generator=generator).t()[::2]


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 5, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def build_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=5,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def _ids(high: int, *shape: int) -> Any:
    return lambda generator: {"input_ids": torch.randint(0, high, shape, generator=generator)}


def _case(name: str, build: Any, inputs: Any, labels: tuple[int, ...] = (5,), **more: Any) -> dict:
    plain = {"n_classes": 3, "samples": NONE, "warns": None}
    return {"name": name, "build": build, "inputs": inputs, "labels": labels} | plain | more


def _conv_cases() -> list[dict]:
    kinds: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        ("conv1d strided", lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
        ("conv1d same", lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), (2, 7)),
        ("conv1d circular", lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5)),
        (
            "conv2d valid",
            lambda: nn.Conv2d(2, 3, (2, 3), padding="valid", stride=(1, 2)),
            (2, 4, 5),
        ),
        (
            "conv2d uneven",
            lambda: nn.Conv2d(2, 2, (3, 2), padding=(0, 2), dilation=(1, 2)),
            (2, 4, 4),
        ),
        (
            "conv2d reflected",
            lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
            (1, 3, 4),
        ),
        ("conv2d grouped", lambda: nn.Conv2d(4, 6, 2, groups=2, stride=2), (4, 4, 4)),
        (
            "conv2d depthwise",
            lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1, bias=False),
            (3, 3, 3),
        ),
        ("conv2d to a point", lambda: nn.Conv2d(2, 4, 3), (2, 3, 3)),
        ("conv2d point to point", lambda: nn.Conv2d(4, 3, 1, groups=1), (4, 2, 2)),
        (
            "conv3d",
            lambda: nn.Conv3d(2, 2, (1, 2, 3), padding=(0, 1, 1), stride=(1, 2, 1)),
            (2, 2, 3, 3),
        ),
    ]
    cases = []
    for name, build, shape in kinds:
        with torch.no_grad():
            width = build()(torch.zeros(1, *shape)).numel()
        cases.append(
            _case(
                name,
                lambda build=build, width=width: _flat(build(), width=width),
                _floats(5, *shape),
            )
        )
    return cases


HOSTILE = [
    *_conv_cases(),
    # Weights used more than once, or beside their module.
    _case(
        "linear called twice",
        lambda: _linears(lambda m, x: m.b(m.a(m.a(x).tanh()).tanh()), (4, 4), (4, 3)),
        _floats(5, 4),
    ),
    _case(
        "conv called at two sizes",
        lambda: Lambda(
            lambda m, x: m.b(m.a(x).tanh().flatten(1) @ m.w + m.a(x[..., ::2]).sum((2, 3))),
            a=nn.Conv2d(2, 4, 3, padding=1),
            b=nn.Linear(4, 3),
            w=_parameter(64, 4),
        ),
        _floats(5, 2, 4, 4),
    ),
    _case(
        "functional use beside the module",
        lambda: _linears(
            lambda m, x: m.b(m.a(x).tanh() + F.linear(x**2, m.a.weight)), (4, 4), (4, 3)
        ),
        _floats(5, 4),
    ),
    _case(
        "functional use in an unknown way",
        lambda: _linears(
            lambda m, x: m.b(m.a(x).tanh()) + m.a.weight.square().sum() * x[:, :1], (4, 4), (4, 3)
        ),
        _floats(5, 4),
        samples="^a.weight",
    ),
    _case(
        "weight transposed by hand",
        lambda: Lambda(
            lambda m, x: (x @ m.w.T).tanh() @ m.v, w=_parameter(4, 4), v=_parameter(4, 3)
        ),
        _floats(5, 4),
        samples="^w$",
    ),
    _case(
        "bias without the weight's second use",
        lambda: _linears(
            lambda m, x: m.b(torch.tanh(m.a(x)) + F.linear(x, m.b.weight.new_ones(4, 4), m.a.bias)),
            (4, 4),
            (4, 3),
        ),
        _floats(5, 4),
    ),
    _case(
        "one bias for two layers",
        lambda: Lambda(
            lambda m, x: F.linear(F.linear(x, m.v, m.c).tanh(), m.w, m.c)[:, :3],
            v=_parameter(4, 4),
            w=_parameter(4, 4),
            c=_parameter(4),
        ),
        _floats(5, 4),
    ),
    _case(
        "one number as bias of all outputs",
        lambda: Lambda(
            lambda m, x: F.linear(x, m.w, m.c).tanh() @ m.v,
            w=_parameter(4, 4),
            c=_parameter(1),
            v=_parameter(4, 3),
        ),
        _floats(5, 4),
    ),
    # Ties across kinds of layers.
    _case(
        "embedding and head tied",
        lambda: _tied(
            lambda m, t: m.b(torch.tanh(m.a(t))),
            a=nn.Embedding(5, 4),
            b=nn.Linear(4, 5, bias=False),
        ),
        _tokens(5, 3, 4),
        (3, 4),
        n_classes=5,
    ),
    _case(
        "weight also a factor",
        lambda: Lambda(
            lambda m, x: m.b(F.linear(x, m.w).tanh() * m.w[0] + (x[:, :, None] * m.w).sum(1)),
            w=_parameter(4, 4),
            b=nn.Linear(4, 3),
        ),
        _floats(5, 4),
        samples="^w$",
    ),
    _case(
        "weight also a factor of maps",
        lambda: Lambda(
            lambda m, x: m.b((F.linear(x, m.w)[:, None] * m.w).sum(1).tanh()),
            w=_parameter(4, 4),
            b=nn.Linear(4, 3),
        ),
        _floats(5, 4),
    ),
    _case(
        "square weight and its transpose",
        lambda: Lambda(
            lambda m, x: m.b((F.linear(x, m.w, m.c).tanh() @ m.w).tanh()),
            w=_parameter(4, 4),
            c=_parameter(4),
            b=nn.Linear(4, 3),
        ),
        _floats(5, 4),
    ),
    _case(
        "linear and convolution tied",
        lambda: Lambda(
            lambda m, x: m.b(F.conv1d(m.a(x).tanh()[:, :, None], m.a.weight[:, :, None])[..., 0]),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 3),
        ),
        _floats(5, 4),
        samples="^a.weight",
    ),
    # In-place writing.
    _case(
        "relu in place",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(12, 4),
            nn.ELU(inplace=True),
            nn.Linear(4, 3),
        ),
        _floats(5, 2, 4, 4),
    ),
    _case(
        "added and scaled in place", lambda: _linears(_add_in_place, (4, 4), (4, 3)), _floats(5, 4)
    ),
    _case(
        "slice written in place",
        lambda: _linears(lambda m, x: m.b(_set_first_to_zero(m.a(x)).tanh()), (4, 4), (4, 3)),
        _floats(5, 4),
    ),
    _case(
        "view written in place",
        lambda: _linears(
            lambda m, x: m.b((h := m.a(x), h.view(-1, 2, 2)[:, 1].mul_(3.0))[0].tanh()),
            (4, 4),
            (4, 3),
        ),
        _floats(5, 4),
    ),
    _case(
        "input written after use, weight frozen",
        lambda: _frozen(
            _linears(
                lambda m, x: (h := x * 1.0, g := m.a(h), h.mul_(0.0), m.b((g + h).tanh()))[-1],
                (4, 4),
                (4, 3),
            ),
            "a.weight",
        ),
        _floats(5, 4),
    ),
    _case("tensor reused for steps", Buffered, _floats(5, 4)),
    # Own functions, memory orders, shapes.
    _case(
        "custom function",
        lambda: _linears(lambda m, x: m.b(_Swish.apply(m.a(x))), (4, 5), (5, 3)),
        _floats(5, 4),
    ),
    _case(
        "channels last",
        lambda: _channels_last(
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1),
                nn.GroupNorm(2, 4),
                nn.ReLU(inplace=True),
                nn.Conv2d(4, 3, 3),
                nn.Flatten(),
                nn.Linear(12, 3),
            )
        ),
        _images(5, 2, 4, 4),
    ),
    _case(
        "inputs with strides",
        lambda: _linears(lambda m, x: m.b(m.a(x).tanh()), (4, 4), (4, 3)),
        _strided,
    ),
    _case(
        "linear on three and four dimensions",
        lambda: _linears(
            lambda m, x: m.b(m.a(x[:, :, None]).tanh().flatten(1, 2)).mean(1), (4, 5), (5, 3)
        ),
        _floats(5, 3, 4),
    ),
    _case(
        "tokens flattened into the batch",
        lambda: Lambda(_flattened_tokens, a=nn.Linear(4, 5), n=nn.LayerNorm(5), b=nn.Linear(5, 3)),
        _floats(3, 4, 4),
        (3, 4),
    ),
    _case(
        "frames flattened into the batch",
        lambda: Lambda(
            lambda m, x: m.b(m.a(x.flatten(0, 1)).tanh().flatten(1).unflatten(0, (-1, 3)).mean(1)),
            a=nn.Conv1d(2, 3, 2),
            b=nn.Linear(9, 3),
        ),
        _floats(5, 3, 2, 4),
    ),
    _case(
        "time first, lengths apart",
        lambda: _linears(_time_major, (4, 5), (5, 3)),
        _floats(5, 3, 4),
        samples="^a",
    ),
    _case(
        "time first, lengths equal",
        lambda: _linears(_time_major, (4, 5), (5, 3)),
        _floats(5, 5, 4),
        samples="^a",
        warns="'a'",
    ),
    _case(
        "two crops",
        lambda: _linears(_crops, (4, 5), (5, 3)),
        _floats(5, 4),
        samples="^a",
        warns="'a'",
    ),
    _case(
        "sub-batches",
        lambda: _linears(_sub_batches, (4, 5), (5, 3)),
        _floats(5, 4),
        samples="^[ab]",
    ),
    _case("rows by vmap", lambda: _linears(_vmapped, (4, 5), (5, 3)), _floats(5, 4), samples="^a"),
    _case(
        "tokens by vmap",
        lambda: _linears(_vmapped_tokens, (4, 5), (5, 3)),
        _floats(2, 4, 4),
        (2,),
        samples="^a",
    ),
    _case("experts", lambda: _linears(_experts, (4, 3), (4, 3)), _floats(5, 4), samples="^[ab]"),
    _case(
        "experts by branches",
        lambda: _linears(_branches, (4, 3), (4, 3)),
        _floats(5, 4),
        samples="^[ab]",
    ),
    _case("recurrence by hand", lambda: _linears(_scan, (2, 4), (4, 4), (4, 3)), _floats(5, 3, 2)),
    _case(
        "low-rank update",
        lambda: Lambda(
            lambda m, x: F.linear(x, m.w + m.u @ m.v).tanh() @ m.o,
            w=_parameter(5, 4),
            u=_parameter(5, 2),
            v=_parameter(2, 4),
            o=_parameter(5, 3),
        ),
        _floats(3, 4),
        (3,),
        samples="^[wuv]$",
    ),
    _case(
        "two batch-sized axes",
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        _floats(4, 4, 4),
        (4, 4),
        n_classes=4,
        class_axis=-1,
    ),
    # Normalisations and broadcast parameters.
    _case(
        "batch norm 1d",
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
        _floats(5, 4),
    ),
    _case(
        "batch norm not affine",
        lambda: _flat(nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2, affine=False), width=18),
        _floats(5, 2, 4, 4),
    ),
    _case(
        "batch norm of sequences",
        lambda: _flat(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), width=9),
        _floats(5, 2, 4),
    ),
    _case(
        "norms over several dimensions",
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 2, padding=1),
            nn.LayerNorm((3, 4)),
            nn.Conv2d(2, 2, 1),
            nn.RMSNorm((2, 3, 4)),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        _floats(5, 2, 2, 3),
    ),
    _case(
        "instance norm",
        lambda: _flat(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), width=9),
        _floats(5, 2, 4),
        samples=r"^1\.",
    ),
    _case(
        "root norm and layer scale",
        lambda: Lambda(
            lambda m, x: m.b(x + m.scale * m.a(m.n(x)).tanh()).mean(1) * m.gain + m.shift,
            n=RootNorm(4),
            a=nn.Linear(4, 4),
            scale=_parameter(4),
            b=nn.Linear(4, 3),
            gain=_parameter(1, 1),
            shift=nn.Parameter(torch.tensor(0.3)),
        ),
        _floats(5, 3, 4),
    ),
    _case(
        "factors of every shape",
        lambda: Lambda(
            lambda m, x: m.b((x * m.p + m.q) * m.r + m.s).mean((1, 2)),
            p=_parameter(2, 1, 4),
            q=_parameter(1, 1, 3, 1),
            r=_parameter(3, 1),
            s=_parameter(2, 3, 4),
            b=nn.Linear(4, 3),
        ),
        _floats(5, 2, 3, 4),
    ),
    _case(
        "factor that broadcasts the input",
        lambda: Lambda(
            lambda m, x: m.b((x[:, None] * m.p).tanh().sum(1) + x[:, :1] * m.q),
            p=_parameter(3, 4),
            q=_parameter(1, 4),
            b=nn.Linear(4, 3),
        ),
        _floats(5, 4),
    ),
    _case(
        "class token and learned positions",
        lambda: Lambda(
            _class_token,
            token=_parameter(1, 1, 4),
            places=_parameter(1, 4, 4),
            a=nn.Linear(2, 4),
            c=nn.Linear(4, 4),
            b=nn.Linear(4, 3),
        ),
        _floats(5, 3, 2),
        samples="^token",
    ),
    # Look-ups.
    _case(
        "positions by look-up",
        lambda: Lambda(
            _positions_by_lookup, e=nn.Embedding(6, 4), p=nn.Embedding(5, 4), b=nn.Linear(4, 3)
        ),
        _tokens(6, 3, 4),
        (3, 4),
        samples="^p",
    ),
    _case(
        "positions by look-up, lengths equal",
        lambda: Lambda(
            _positions_by_lookup, e=nn.Embedding(6, 4), p=nn.Embedding(5, 4), b=nn.Linear(4, 3)
        ),
        _tokens(6, 4, 4),
        (4, 4),
        samples="^p",
        warns="'p'",
    ),
    _case(
        "padding token",
        lambda: Lambda(
            lambda m, t: m.b(m.e(t).tanh().mean(1)),
            e=nn.Embedding(4, 3, padding_idx=-2),
            b=nn.Linear(3, 3),
        ),
        _tokens(4, 5, 3),
    ),
    _case(
        "embedding of bounded norm",
        lambda: Lambda(
            lambda m, t: m.b(m.e(t).mean(1)), e=nn.Embedding(4, 3, max_norm=0.4), b=nn.Linear(3, 3)
        ),
        _tokens(4, 5, 3),
        samples="^e",
    ),
    # Modules of torch and transformers.
    _case(
        "lstm",
        lambda: Lambda(
            lambda m, x: m.b(m.l(x)[0].mean(1)),
            l=nn.LSTM(2, 3, batch_first=True),
            b=nn.Linear(3, 3),
        ),
        _floats(4, 3, 2),
        (4,),
        samples="^l",
    ),
    _case(
        "multihead attention",
        lambda: Lambda(
            lambda m, x: m.b(m.l(x, x, x, need_weights=False)[0].mean(1)),
            l=nn.MultiheadAttention(4, 2, batch_first=True),
            b=nn.Linear(4, 3),
        ),
        _floats(4, 3, 4),
        (4,),
        samples="^l",
    ),
    _case(
        "transposed convolution",
        lambda: _flat(nn.Conv1d(2, 3, 2), nn.ConvTranspose1d(3, 2, 2), width=8),
        _floats(5, 2, 4),
        samples=r"^1\.",
    ),
    _case("gpt2", _gpt2, _ids(5, 3, 4), (3, 4), n_classes=5, samples="wpe"),
    # What is trained.
    _case(
        "biases alone",
        lambda: _frozen(_flat(nn.Conv1d(2, 3, 2), width=9), "0.weight", "3.weight"),
        _floats(5, 2, 4),
    ),
    _case(
        "weights alone",
        lambda: _frozen(_flat(nn.Conv1d(2, 3, 2), width=9), "0.bias", "3.bias"),
        _floats(5, 2, 4),
    ),
    _case(
        "spectral norm",
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
        ),
        _floats(6, 4),
        (6,),
        samples="original",
    ),
    _case(
        "checkpointed convolution",
        lambda: Lambda(
            lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False).flatten(1)),
            a=nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(inplace=True)),
            b=nn.Linear(9, 3),
        ),
        _floats(5, 2, 4),
    ),
    # Few.
    _case(
        "one sample",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        _floats(1, 4),
        (1,),
    ),
    _case("one sample, one output", lambda: nn.Linear(4, 1), _floats(1, 4), (1,), n_classes=1),
    # Samples interact: the layers cannot tell.
    _case(
        "batch statistics",
        lambda: nn.Sequential(
            nn.Linear(4, 5),
            nn.BatchNorm1d(5, track_running_stats=False),
            nn.Tanh(),
            nn.Linear(5, 3),
        ),
        _floats(5, 4),
        warns="'0'",
    ),
    _case(
        "mean of the batch taken off",
        lambda: _linears(_mean_coupled, (4, 5), (5, 3)),
        _floats(5, 4),
        warns="'a'",
    ),
]

HOSTILE_BY_NAME = {case["name"]: case for case in HOSTILE}
