"""The choice of a solver: which is cheaper, and whether it fits, from operation counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spectralshell.operators.costs import (
    ROOM,
    ExactPlan,
    Footprint,
    LanczosPlan,
    fits,
    format_bytes,
    plan_exact,
    plan_lanczos,
    product_cost,
)

PLAN_COLUMNS = (
    "solver",
    "n_outputs",
    "exact_cost",
    "lanczos_cost",
    "exact_memory",
    "lanczos_memory",
    "chunk_size",
)

_MATRICES = 4
"""Float64 matrices of the modes beside the couplings kept: the modes, M, dM/dt and a product."""


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


@dataclass(frozen=True)
class CouplingPlan:
    """The solver chosen for the modes, and what was predicted for both.

    Parameters
    ----------
    solver : {"exact", "lanczos"}
        The cheaper one that fits; a tie goes to the exact solver, whose modes are all there.
    exact : ExactPlan
        How the exact kernel is built.
    lanczos : LanczosPlan
        Chunks of the products.
    exact_cost, lanczos_cost : float
        Predicted seconds of the reference machine, the couplings included.
    exact_bytes, lanczos_bytes : int
        Predicted peak memory.
    n_outputs : int
        Entries of the residual.
    """

    solver: str
    exact: ExactPlan
    lanczos: LanczosPlan
    exact_cost: float
    lanczos_cost: float
    exact_bytes: int
    lanczos_bytes: int
    n_outputs: int

    def describe(self) -> str:
        """Return a sentence for a user who waits."""
        return (
            f"{self.solver} (n = {self.n_outputs}; predicted cost: exact {self.exact_cost:.3g}, "
            f"lanczos {self.lanczos_cost:.3g}; memory: exact {format_bytes(self.exact_bytes)}, "
            f"lanczos {format_bytes(self.lanczos_bytes)})"
        )


def plan_couplings(
    footprint: Footprint,
    max_bytes: int,
    *,
    solver: str = "auto",
    n_steps: int,
    block_size: int,
    n_directions: int,
    derivative: str,
    chunk_size: int | None = None,
) -> CouplingPlan:
    """Choose between all modes and those of a block Krylov space.

    Parameters
    ----------
    footprint : Footprint
        Sizes of the problem.
    max_bytes : int
        Working memory.
    solver : {"auto", "exact", "lanczos"}
        A solver that was asked for is kept.
    n_steps, block_size : int
        Of block Lanczos; its modes are at most their product.
    n_directions : int
        Directions along which the kernel is differentiated.
    derivative : {"exact", "difference"}
        Two kernels for each direction, or two products for each mode.
    chunk_size : int, optional
        Fixes the samples recorded at a time.

    Returns
    -------
    CouplingPlan
        The same arguments always give the same plan.

    Raises
    ------
    ValueError
        If the solver asked for, or both, do not fit; the message says what would.
    """
    n = footprint.n_entries
    n_modes = min(n_steps * block_size, n)
    exact = plan_exact(footprint, max_bytes, chunk_size)
    lanczos = plan_lanczos(footprint, n_modes, max_bytes, chunk_size)
    product = product_cost(footprint, lanczos.chunk_size)
    from_kernels = 2.0 * exact.kernel_cost
    of_all = from_kernels if derivative == "difference" else 2.0 * n * product
    costs = {
        "exact": exact.cost + n_directions * of_all,
        "lanczos": lanczos.cost + n_directions * 2.0 * n_modes * product,
    }
    kept = 8 * (_MATRICES + n_directions)
    peaks = {
        "exact": int(exact.peak_bytes + kept * n**2),
        "lanczos": int(lanczos.peak_bytes + kept * n_modes**2 + 16 * n * n_modes),
    }
    allowed = list(peaks) if solver == "auto" else [solver]
    fitting = [name for name in allowed if fits(peaks[name], max_bytes)]
    if not fitting:
        needs = ", ".join(
            f"solver={name!r} needs about {format_bytes(peak / ROOM)}"
            for name, peak in peaks.items()
        )
        raise ValueError(
            f"max_memory: {format_bytes(max_bytes)} do not hold solver={solver!r} for n = {n} "
            f"entries and {n_directions} directions: {needs}; allow that much, or take fewer "
            "samples, steps or random directions."
        )
    return CouplingPlan(
        solver=min(fitting, key=lambda name: costs[name]),
        exact=exact,
        lanczos=lanczos,
        exact_cost=costs["exact"],
        lanczos_cost=costs["lanczos"],
        exact_bytes=peaks["exact"],
        lanczos_bytes=peaks["lanczos"],
        n_outputs=n,
    )
