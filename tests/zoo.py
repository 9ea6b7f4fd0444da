"""Small models of many kinds, as case dictionaries, and a dense reference for their kernels.

Models, inputs and targets are on the device of :mod:`tests.device`, the reference on the CPU.

A case has ``name``, ``build`` (makes the model, float32), ``inputs`` (makes the inputs), ``labels``
(shape of the class labels), ``n_classes``, and optionally ``rung`` (the first rung that works, if
it is not linearize) and ``meta`` (whether the forward pass runs without values).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spectralshell.models.guard import exclusive
from spectralshell.operators import KernelOperator
from spectralshell.operators.matrix_free import assemble_matrix_free
from spectralshell.operators.problem import pose_problem
from spectralshell.snapshots import Snapshot
from tests.device import CPU, place, place_snapshot


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TiedLanguageModel(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens))))


class CausalAttention(nn.Module):
    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(2))


class BagOfTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1).tanh())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class RawParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.sin(x @ self.weight)


class Bilinear(nn.Module):
    """Takes two inputs; its first layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 5).requires_grad_(False)
        self.right = nn.Linear(3, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(x)) * self.right(y))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class _Cube(torch.autograd.Function):
    """Twice differentiable backwards; it has no forward-mode rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(_Cube.apply(self.first(x)))


class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _deep_linear() -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)), nn.Linear(4, 3))


def _cnn_batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def _residual_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        ResidualBlock(3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


def _layernorm_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))


def _groupnorm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    )


def _weight_norm() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    return nn.Sequential(normed, nn.Tanh(), nn.Linear(5, 3))


def _gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=7,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def _floats(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


def _tokens(high: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(0, high, shape, generator=generator)


def _masked_tokens(generator: torch.Generator) -> dict[str, Tensor]:
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[1, 3] = 0
    return {
        "input_ids": torch.randint(0, 7, (2, 4), generator=generator),
        "attention_mask": mask,
    }


def _pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator)


def _case(name: str, build: Any, inputs: Any, labels: tuple[int, ...], **more: Any) -> dict:
    return {"name": name, "build": build, "inputs": inputs, "labels": labels, "n_classes": 3} | more


CASES = [
    _case("mlp", _mlp, _floats(6, 4), (6,), meta=True),
    _case("deep linear", _deep_linear, _floats(6, 4), (6,), meta=True),
    _case("cnn batchnorm", _cnn_batchnorm, _floats(5, 2, 4, 4), (5,), meta=True),
    _case("residual cnn", _residual_cnn, _floats(5, 2, 4, 4), (5,), meta=True),
    _case("layernorm mlp", _layernorm_mlp, _floats(6, 4), (6,), meta=True),
    _case("groupnorm cnn", _groupnorm_cnn, _floats(4, 2, 4, 4), (4,), meta=True),
    _case(
        "tied language model",
        lambda: TiedLanguageModel(5, 4),
        _tokens(5, 2, 4),
        (2, 4),
        n_classes=5,
        meta=True,
    ),
    _case("causal attention", lambda: CausalAttention(4, 3), _floats(3, 4, 4), (3, 4), meta=True),
    _case("embedding inputs", BagOfTokens, _tokens(6, 6, 3), (6,), meta=True),
    _case("gru", Recurrent, _floats(4, 3, 3), (4,)),
    _case("raw parameter", RawParameter, _floats(6, 4), (6,), meta=True),
    _case("gpt-neox", _gpt_neox, _masked_tokens, (2, 4), n_classes=7),
    _case("encoder layer", EncoderLayer, _floats(4, 3, 4), (4,), meta=True),
    _case("weight norm", _weight_norm, _floats(6, 4), (6,), rung="double-vjp"),
    _case("checkpointed", Checkpointed, _floats(6, 4), (6,)),
    _case("custom function", CustomFunction, _floats(6, 4), (6,), rung="double-vjp"),
    _case("two inputs, frozen layer", Bilinear, _pair, (5,), meta=True),
]

CASES_BY_NAME = {case["name"]: case for case in CASES}


def wavy_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """A residual as a user might write it: nonlinear, of its own shape, samples first."""
    flat = outputs.flatten(1)
    return torch.sin(flat[:, :2]) * flat.sum(1, keepdim=True) - targets.flatten(1)[:, :2]


RESIDUALS: dict[str, Any] = {
    "mse": "mse",
    "mse labels": "mse",
    "brier": "brier",
    "cross-entropy": "cross-entropy",
    "nll": "nll",
    "callable": wavy_error,
}


def build_model(case: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a case's model, in training mode, with parameters and statistics off their defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = case["build"]()
        for name, parameter in model.named_parameters():
            # Default initialisation hides faults: zero biases, unit gains, tiny embeddings.
            scale = 0.5 if parameter.ndim > 1 and "embed" not in name else 0.3
            parameter.data.add_(scale * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return place(model.to(dtype)).train()


def make_inputs(case: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    """Make a case's inputs, floating ones in ``dtype``."""
    inputs = case["inputs"](torch.Generator().manual_seed(3))
    return place(map_floats(inputs, dtype))


def make_targets(case: Mapping[str, Any], kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Make targets for a kind of residual: labels (one token left out), or real values."""
    generator = torch.Generator().manual_seed(5)
    shape = case["labels"]
    if kind in ("mse", "callable"):
        return place(torch.randn(*shape, case["n_classes"], generator=generator).to(dtype))
    labels = torch.randint(0, case["n_classes"], shape, generator=generator)
    if len(shape) > 1:
        labels[0, 1] = -100
    return place(labels)


def make_snapshot(
    case: Mapping[str, Any], kind: str = "mse", dtype: torch.dtype = torch.float64, **more: Any
) -> Snapshot:
    """Make the snapshot of a case for a kind of residual (a key of ``RESIDUALS``)."""
    model = build_model(case, dtype)
    more = {"class_axis": case.get("class_axis")} | more
    return place_snapshot(model, make_inputs(case, dtype), make_targets(case, kind, dtype), **more)


def build_on_rungs(
    snapshot: Snapshot, *, rungs: Sequence[str] | None = None, **options: Any
) -> KernelOperator:
    """Build a kernel that multiplies alone, on some rungs of the ladder."""
    with exclusive():
        problem = pose_problem(snapshot, **options)
        return assemble_matrix_free(problem, problem.chunk_size, rungs=rungs)


def map_floats(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map_floats(item, dtype) for item in value)
    return {key: map_floats(item, dtype) for key, item in value.items()}


def dense_reference(model: nn.Module, inputs: Any, targets: Tensor, kind: str) -> dict[str, Tensor]:
    """Compute e, J and M in float64 on the CPU by plain reverse mode, one row at a time.

    Written from the table of the design, sharing no code with the package.
    """
    model = place(copy.deepcopy(model), CPU).double().eval()
    inputs, targets = map_floats(place(inputs, CPU), torch.float64), place(targets, CPU)
    if isinstance(inputs, dict):
        outputs = model(**inputs).logits
    else:
        outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    error, differentiated, n_rows = _reference_table(outputs, targets, kind)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for entry in differentiated.reshape(-1):
        gradient = torch.autograd.grad(
            entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.reshape(-1) for g in gradient]))
    jacobian = torch.stack(rows) / n_rows**0.5
    return {
        "error": error.detach().reshape(-1) / n_rows**0.5,
        "jacobian": jacobian,
        "kernel": jacobian @ jacobian.T,
    }


def _reference_table(outputs: Tensor, targets: Tensor, kind: str) -> tuple[Tensor, Tensor, int]:
    if kind == "mse":
        tokens = outputs.shape[0] * outputs.shape[1] if outputs.ndim == 3 else len(outputs)
        return targets.double() - outputs, outputs, tokens
    if kind == "callable":
        error = wavy_error(outputs, targets.double())
        return error, error, len(outputs)
    labelled = targets != -100
    z, y = outputs[labelled], targets[labelled]
    onehot = F.one_hot(y, z.shape[-1]).double()
    if kind == "mse labels":
        return onehot - z, z, len(y)
    if kind == "brier":
        return onehot - z.softmax(-1), z.softmax(-1), len(y)
    if kind == "cross-entropy":
        return onehot - z.softmax(-1), z, len(y)
    loss = F.cross_entropy(z, y, reduction="none")
    return loss, loss, len(y)
