"""The networks of the benchmarks in torch, and the state that all contenders load."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.problems import N_CLASSES, TOKENS_PER_SAMPLE, VOCABULARY, Problem


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where shapes change."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            convolution = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(n_out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(inner + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32×32 images: a 3×3 stem and four stages of two blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        blocks, n_in = [], width
        for stage in range(4):
            n_out = width * 2**stage
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(BasicBlock(n_in, n_out, stride))
                n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(n_in, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.head(self.flatten(self.pool(x)))


def _perceptron(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, width), nn.GELU(),
        nn.Linear(width, width), nn.GELU(),
        nn.Linear(width, width), nn.GELU(),
        nn.Linear(width, N_CLASSES),
    )  # fmt: skip


def _language_model(width: int) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=TOKENS_PER_SAMPLE,
        use_cache=False,
        # The fused kernel has no forward-mode derivative, which the plain recipe needs.
        attn_implementation="eager",
    )
    return GPTNeoXForCausalLM(config)


_BUILDERS = {"mlp": _perceptron, "resnet": ResNet18, "gpt-neox": _language_model}


def initial_state(problem: Problem, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the network's state: torch's initial values, normalisations as if trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _BUILDERS[problem.network](problem.width)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def load_network(
    problem: Problem, state: dict[str, np.ndarray], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return the network in eval mode with this state."""
    model = _BUILDERS[problem.network](problem.width)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model.to(dtype).eval()


def load_data(data: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the data as tensors: reals in ``dtype``, integers as they are."""
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
