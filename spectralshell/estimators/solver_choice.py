"""Which solver is cheaper, and whether it fits, from operation counts with fixed constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spectralshell.operators.exact_plan import ROOM, ExactPlan, fits, plan_exact
from spectralshell.operators.footprint import Footprint
from spectralshell.operators.lanczos_plan import LanczosPlan, plan_lanczos
from spectralshell.operators.memory_budget import format_bytes

PLAN_COLUMNS = (
    "solver",
    "n_outputs",
    "exact_cost",
    "lanczos_cost",
    "exact_memory",
    "lanczos_memory",
    "chunk_size",
)


@dataclass(frozen=True)
class SolverPlan:
    """The solver chosen, and what was predicted for both.

    Parameters
    ----------
    solver : {"exact", "lanczos"}
        The cheaper one that fits; a tie goes to the exact solver, which answers more.
    exact : ExactPlan
        Chunks, groups, memory and cost of the exact kernel and its eigenproblem.
    lanczos : LanczosPlan
        Chunks, memory and cost of the products.
    n_outputs : int
        Entries of the residual.
    """

    solver: str
    exact: ExactPlan
    lanczos: LanczosPlan
    n_outputs: int

    @property
    def chunk_size(self) -> int | None:
        """Samples recorded at a time by the solver chosen; None takes all."""
        return self.exact.chunk_size if self.solver == "exact" else self.lanczos.chunk_size

    def describe(self) -> str:
        """Return a sentence for a user who waits."""
        return (
            f"{self.solver} (n = {self.n_outputs}; predicted cost: exact {self.exact.cost:.3g}, "
            f"lanczos {self.lanczos.cost:.3g}; memory: exact {format_bytes(self.exact.peak_bytes)},"
            f" lanczos {format_bytes(self.lanczos.peak_bytes)})"
        )

    def as_row(self) -> dict[str, Any]:
        """Return the columns of ``plan_``: costs in seconds of a reference machine, bytes."""
        values = (
            self.solver,
            self.n_outputs,
            self.exact.cost,
            self.lanczos.cost,
            self.exact.peak_bytes,
            self.lanczos.peak_bytes,
            self.chunk_size,
        )
        return dict(zip(PLAN_COLUMNS, values, strict=True))


def plan_solver(
    footprint: Footprint,
    n_steps: int,
    max_bytes: int,
    *,
    solver: str = "auto",
    chunk_size: int | None = None,
) -> SolverPlan:
    """Choose between the exact solver and Lanczos, and how each fits in memory.

    Parameters
    ----------
    footprint : Footprint
        Sizes of the problem.
    n_steps : int
        Lanczos steps asked for.
    max_bytes : int
        Working memory.
    solver : {"auto", "exact", "lanczos"}
        A solver that was asked for is kept.
    chunk_size : int, optional
        Fixes the samples recorded at a time.

    Returns
    -------
    SolverPlan
        The same arguments always give the same plan.

    Raises
    ------
    ValueError
        If the solver asked for, or both, do not fit; the message says what would.
    """
    exact = plan_exact(footprint, max_bytes, chunk_size)
    lanczos = plan_lanczos(footprint, n_steps, max_bytes, chunk_size)
    plans: dict[str, ExactPlan | LanczosPlan] = {"exact": exact, "lanczos": lanczos}
    allowed = plans if solver == "auto" else {solver: plans[solver]}
    fitting = {name: plan for name, plan in allowed.items() if fits(plan.peak_bytes, max_bytes)}
    if not fitting:
        needs = ", ".join(
            f"solver={name!r} needs about {format_bytes(plan.peak_bytes / ROOM)}"
            for name, plan in plans.items()
        )
        raise ValueError(
            f"max_memory: {format_bytes(max_bytes)} do not hold solver={solver!r} for n = "
            f"{footprint.n_entries} entries: {needs}; allow that much, or take fewer samples or "
            "steps."
        )
    chosen = min(fitting, key=lambda name: fitting[name].cost)
    return SolverPlan(chosen, exact, lanczos, footprint.n_entries)
