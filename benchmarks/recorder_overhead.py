"""What a recorder costs beside the training of a small language model.

``python -m benchmarks.recorder_overhead`` trains three copies in turn, a few steps each, so that
all see the same machine: without a recorder, with a history alone, and with 8 states per decade.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from spectralshell.runs import TrainingRecorder

VOCABULARY, LENGTH, BATCH, WIDTH, LAYERS = 96, 64, 8, 64, 2
TURN = 50
"""Steps before the next copy has its turn."""

RECORDERS: dict[str, object] = {"none": None, "history": [], "8 per decade": "log:8"}


class TinyGPT(nn.Module):
    """A character transformer of 0.1 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.blocks(self.tokens(ids) + self.places, mask=self.mask, is_causal=True)
        return hidden @ self.tokens.weight.T


class Copy:
    """One copy in training; the seconds of its turns, of this process and by the clock."""

    def __init__(self, states: object, directory: str) -> None:
        torch.manual_seed(0)
        self.model = TinyGPT()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.recorder = (
            None
            if states is None
            else TrainingRecorder(self.model, self.optimizer, directory, states=states)
        )
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def turn(self, first: int) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        for step in range(first, first + TURN):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
            logits = self.model(ids[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.recorder is not None:
                self.recorder.log(loss=loss, tokens=BATCH * LENGTH)
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)


def overhead(n_steps: int) -> dict[str, dict[str, float]]:
    """Return each recorder's extra time over none: of the CPU, by the clock, as it counts it."""
    with tempfile.TemporaryDirectory() as place:
        copies = {
            name: Copy(states, f"{place}/{position}")
            for position, (name, states) in enumerate(RECORDERS.items())
        }
        for copy in copies.values():
            _ = copy.recorder.open() if copy.recorder is not None else nullcontext()
        names = list(copies)
        for position in range(n_steps // TURN):
            for shift in range(len(names)):  # nobody is always the first
                copies[names[(position + shift) % len(names)]].turn(position * TURN)
        own = {n: c.recorder.overhead for n, c in copies.items() if c.recorder is not None}
        spent = {n: c.recorder._share.spent for n, c in copies.items() if c.recorder is not None}
        for copy in copies.values():
            if copy.recorder is not None:
                copy.recorder.close()
    plain = copies["none"]

    def extra(copy: Copy, times: Callable[[Copy], list[float]]) -> float:
        return sum(times(copy)) / sum(times(plain)) - 1.0

    assert own.keys() == spent.keys()
    return {
        name: {
            "cpu": extra(copy, lambda c: c.cpu),
            "clock": extra(copy, lambda c: c.wall),
            "turns": statistics.median(
                a / b - 1.0 for a, b in zip(copy.cpu, plain.cpu, strict=True)
            ),
            "own": spent[name] / sum(copy.wall),
        }
        for name, copy in copies.items()
        if copy.recorder is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    overhead(2 * TURN)  # what torch imports at its first step
    found = [overhead(options.steps) for _ in range(options.repeats)]
    print(f"{'recorder':14} {'CPU':>8} {'clock':>8} {'median of turns':>16} {'own count':>10}")
    for name in found[0]:
        figures = {k: statistics.median(one[name][k] for one in found) for k in found[0][name]}
        print(
            f"{name:14} {figures['cpu']:8.2%} {figures['clock']:8.2%} {figures['turns']:16.2%} "
            f"{figures['own']:10.2%}"
        )


if __name__ == "__main__":
    main()
