"""The densities that a tail is compared with."""

from __future__ import annotations

from dataclasses import dataclass

# A cutoff exp(−κ λ^p) with a smaller |p| is a power law over any window that data cover.
SMALLEST_POWER = 0.05


@dataclass(frozen=True)
class TailModel:
    """One family of densities, with one parameter θ that is profiled."""

    name: str  # as in ``comparison_``
    kind: str  # power, template, exponential, lognormal or free: its base and its cutoff
    bounds: tuple[float, float] = (-3.0, 8.0)  # range of θ
    n_grid: int = 23  # points of the grid over the range, or over both branches
    pole: float | None = None  # where its cutoff is constant; its sign changes there


POWER_LAW = TailModel("power law", "power", bounds=(-60.0, 60.0))

TEMPLATE = TailModel("power law, template cutoff", "template", n_grid=46, pole=1.0)

EXPONENTIAL = TailModel("power law, exp(-kappa lambda)", "exponential")

LOGNORMAL = TailModel("lognormal", "lognormal", bounds=(0.0, 4.0))

COMPARED = (POWER_LAW, TEMPLATE, EXPONENTIAL, LOGNORMAL)

FREE_POWER = TailModel(
    "power law, free cutoff power", "free", bounds=(-4.0, 7.0), n_grid=46, pole=0.0
)
