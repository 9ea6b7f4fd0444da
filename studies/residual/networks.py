"""The ResNet-18 layout and its plain counterpart, and the names of all networks of the study."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ARCHITECTURES = ("residual", "plain")
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    # The smooth one: closest to ReLU in shape and gain, so that one initialisation suits both and
    # what differs is the smoothness. Softplus has no zero, and SiLU bends over a wider range.
    "gelu": nn.GELU,
}
N_CLASSES = 10


@dataclass(frozen=True)
class Network:
    """Which network: its file names and labels follow from these."""

    architecture: str
    activation: str
    seed: int
    width: int = 8
    blocks: tuple[int, ...] = (2, 2, 2, 2)

    @property
    def name(self) -> str:
        """Name in files and tables."""
        return f"{self.architecture}-{self.activation}-{self.seed}"

    def build(self) -> ConvolutionalNetwork:
        """Return the network at its initial weights, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            model = ConvolutionalNetwork(
                self.width,
                self.blocks,
                ACTIVATIONS[self.activation],
                skips=self.architecture == "residual",
            )
            # Seeded after the layers drew theirs: networks of one seed share all weights but the
            # shortcuts, so that their comparison is paired.
            torch.manual_seed(1_000 + self.seed)
            model.initialise()
        return model


class Block(nn.Module):
    """Two 3×3 convolutions, with or without a shortcut around them.

    The shortcut is the identity, or a 1×1 convolution where shapes change.
    """

    def __init__(
        self, n_in: int, n_out: int, stride: int, activation: type[nn.Module], *, skip: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.inner = activation()
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.outer = activation()
        self.shortcut: nn.Module | None = None
        if skip:
            self.shortcut = nn.Identity()
            if stride != 1 or n_in != n_out:
                convolution = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
                self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.inner(self.bn1(self.conv1(x)))))
        return self.outer(y if self.shortcut is None else y + self.shortcut(x))


class ConvolutionalNetwork(nn.Module):
    """ResNet-18 for 32×32 images, with or without its skips: a stem and four stages."""

    def __init__(
        self, width: int, blocks: tuple[int, ...], activation: type[nn.Module], *, skips: bool
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.activation = activation()
        stages, n_in = [], width
        for stage, depth in enumerate(blocks):
            n_out = width * 2**stage
            for position in range(depth):
                stride = 2 if stage > 0 and position == 0 else 1
                stages.append(Block(n_in, n_out, stride, activation, skip=skips))
                n_in = n_out
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(n_in, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.activation(self.bn(self.stem(x))))
        return self.head(self.flatten(self.pool(x)))

    def initialise(self) -> None:
        """Draw the weights of He et al. (2015), those of the shortcuts last."""
        nn.init.kaiming_uniform_(self.head.weight, a=5**0.5)
        nn.init.zeros_(self.head.bias)
        found = {n: m for n, m in self.named_modules() if isinstance(m, nn.Conv2d)}
        # The sort is stable: depth decides among the convolutions that both kinds have.
        for name in sorted(found, key=lambda name: "shortcut" in name):
            nn.init.kaiming_normal_(found[name].weight, mode="fan_out", nonlinearity="relu")
