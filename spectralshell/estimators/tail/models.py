"""The densities that a tail is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A cutoff exp(−κ λ^p) with a smaller |p| is a power law over any window that data cover.
SMALLEST_POWER = 0.05

# A model whose cutoff is constant at a θ is fitted on both sides of it, up to this distance.
BRANCH_GAP = 1e-6

# Where the steps of the grid begin to grow with the distance from a pole.
POLE_SCALE = 0.3


@dataclass(frozen=True)
class TailModel:
    """One family of densities, with one parameter θ that is profiled."""

    name: str  # as in ``comparison_``
    kind: str  # power, template, exponential, lognormal or free: its base and its cutoff
    bounds: tuple[float, float] = (-3.0, 8.0)  # range of θ
    n_grid: int = 23  # points of the grid over the range, or over both branches
    pole: float | None = None  # where its cutoff is constant; its sign changes there

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the θ at which the profile is taken first, and the branch of each.

        The ends of the range, and those of both branches beside a pole, are among them.
        """
        low, high = self.bounds
        if self.pole is None:
            return np.linspace(low, high, self.n_grid), np.zeros(self.n_grid, dtype=int)
        half = self.n_grid // 2
        below, above = _outwards(self.pole - low, half), _outwards(high - self.pole, half)
        theta = np.concatenate([self.pole - below[::-1], self.pole + above])
        return theta, np.repeat([0, 1], half)


def _outwards(reach: float, n: int) -> np.ndarray:
    """Distances from a pole, from the gap to the end, in steps that grow with them."""
    share = np.linspace(0.0, 1.0, n)
    distances = POLE_SCALE * np.expm1(share * np.log1p(reach / POLE_SCALE))
    distances[0], distances[-1] = BRANCH_GAP, reach
    return distances


POWER_LAW = TailModel("power law", "power", bounds=(-60.0, 60.0))

TEMPLATE = TailModel("power law, template cutoff", "template", n_grid=46, pole=1.0)

EXPONENTIAL = TailModel("power law, exp(-kappa lambda)", "exponential")

LOGNORMAL = TailModel("lognormal", "lognormal", bounds=(0.0, 4.0))

COMPARED = (POWER_LAW, TEMPLATE, EXPONENTIAL, LOGNORMAL)

FREE_POWER = TailModel(
    "power law, free cutoff power", "free", bounds=(-4.0, 7.0), n_grid=46, pole=0.0
)
