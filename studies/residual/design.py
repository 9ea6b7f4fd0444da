"""Which networks, times, batches and residuals: the pieces of the study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from studies.residual.measuring import RESIDUALS, MeasuringPlan
from studies.residual.networks import ACTIVATIONS, ARCHITECTURES, Network
from studies.residual.training import TrainingPlan


@dataclass(frozen=True)
class Design:
    """The whole study, or the small one that shows that it runs.

    Parameters
    ----------
    networks : tuple of Network
    training : TrainingPlan
    measuring : MeasuringPlan
    steps : tuple of float
        Sizes of the step whose couplings are compared, on one batch and seed.
    n_train, n_test : int
        Images used of each part.
    """

    networks: tuple[Network, ...]
    training: TrainingPlan = field(default_factory=TrainingPlan)
    measuring: MeasuringPlan = field(default_factory=MeasuringPlan)
    steps: tuple[float, ...] = (0.0003, 0.001, 0.01)
    n_train: int = 6000
    n_test: int = 1000

    @classmethod
    def full(cls) -> Design:
        """Three seeds of four networks, at three times."""
        # One seed of all kinds first: a run cut short has something to compare. The plain ones
        # take longer and start earlier, so that no process waits long at the end.
        kinds = product(range(3), reversed(ARCHITECTURES), ACTIVATIONS)
        return cls(tuple(Network(kind, activation, seed) for seed, kind, activation in kinds))

    @classmethod
    def quick(cls) -> Design:
        """Two tiny networks at two times, in seconds."""
        small = {"width": 2, "blocks": (1, 1)}
        return cls(
            tuple(Network(kind, "gelu", 0, **small) for kind in ARCHITECTURES),
            TrainingPlan(
                losses=(2.2,), batch_size=16, learning_rate=0.1, max_steps=200, n_checked=50
            ),
            MeasuringPlan(n_images=4, n_batches=2, n_random=2),
            steps=(0.01,),
            n_train=100,
            n_test=12,
        )

    def measurements(self) -> Iterator[tuple[Network, str, int]]:
        """Yield network, time and batch of each piece of measuring."""
        for network, when in product(self.networks, self.training.times):
            for batch in range(self.measuring.n_batches):
                yield network, when, batch

    def compared_steps(self) -> Iterator[tuple[Network, str]]:
        """Yield network and time of each state whose steps are compared."""
        yield from product([n for n in self.networks if n.seed == 0], self.training.times)

    def cells(self) -> Iterator[tuple[Network, str, str]]:
        """Yield network, time and residual of each cell."""
        yield from product(self.networks, self.training.times, RESIDUALS)


@dataclass(frozen=True)
class Folders:
    """Where the pieces are."""

    out: Path

    @property
    def networks(self) -> Path:
        """States and records of training."""
        return self.out / "networks"

    @property
    def couplings(self) -> Path:
        """Couplings between modes: most of the disk space."""
        return self.out / "couplings"

    @property
    def steps(self) -> Path:
        """Statistics with steps of several sizes."""
        return self.out / "steps"

    @property
    def cells(self) -> Path:
        """Statistics of the cells."""
        return self.out / "cells"
