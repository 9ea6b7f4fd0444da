"""The choice of a solver: which is cheaper, and whether it fits, from operation counts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from spectralshell.measurements.settings import KernelSettings
from spectralshell.operators.costs import (
    DEFAULT_MEMORY,
    ROOM,
    ExactPlan,
    Footprint,
    LanczosPlan,
    fits,
    format_bytes,
    free_bytes,
    plan_exact,
    plan_lanczos,
    product_cost,
    resolve_max_memory,
)
from spectralshell.operators.jacobian.ladder import DifferentiationError, ReverseModeError
from spectralshell.operators.survey import KernelSurvey, survey_kernel
from spectralshell.snapshots import Snapshot
from spectralshell.statuses import OK, solved_by

PLAN_COLUMNS = (
    "solver",
    "n_outputs",
    "exact_cost",
    "lanczos_cost",
    "exact_memory",
    "lanczos_memory",
    "chunk_size",
    "unable",
)

_Measured = TypeVar("_Measured")

_MATRICES = 4
"""Float64 matrices of the modes beside the couplings kept: the modes, M, dM/dt and a product."""


@dataclass(frozen=True)
class SolverPlan:
    """The solver chosen, how either builds its kernel, and what was predicted for each."""

    solver: str
    n_outputs: int
    exact: ExactPlan
    lanczos: LanczosPlan
    # Of the solvers that the measurement has, with all that it does: reference seconds, bytes.
    costs: Mapping[str, float]
    peaks: Mapping[str, int]
    # Solvers that are allowed and fit as well.
    others: tuple[str, ...] = ()
    # The solver that was chosen first, and cannot differentiate the model.
    unable: str | None = None

    @property
    def status(self) -> str:
        """Return ``"ok"``, or that the solver is not the one planned."""
        return OK if self.unable is None else solved_by(self.solver, unable=self.unable)

    @property
    def chunk_size(self) -> int | None:
        """Samples recorded at a time by the solver chosen; None takes all."""
        return self.exact.chunk_size if self.solver == "exact" else self.lanczos.chunk_size

    def describe(self) -> str:
        """Return a sentence for a user who waits."""
        costs = ", ".join(f"{name} {cost:.3g}" for name, cost in self.costs.items())
        peaks = ", ".join(f"{name} {format_bytes(peak)}" for name, peak in self.peaks.items())
        return f"{self.solver} (n = {self.n_outputs}; predicted cost: {costs}; memory: {peaks})"

    def announce(self, snapshot: Snapshot, verbose: int) -> None:
        """Write a line on a snapshot to the standard error where the user wants to know."""
        if verbose >= 1:
            name = "" if snapshot.name is None else f" of {snapshot.name}"
            label = f"snapshot{name} at tau={snapshot.tau:g}, batch={snapshot.batch}"
            tqdm.write(f"{label}: {self.describe()}", file=sys.stderr)

    def as_row(self) -> dict[str, Any]:
        """Return the columns of ``plan_``; NaN for a solver that the measurement does not have."""
        unknown = float("nan")
        values = (
            self.solver,
            self.n_outputs,
            self.costs["exact"],
            self.costs.get("lanczos", unknown),
            self.peaks["exact"],
            self.peaks.get("lanczos", unknown),
            self.chunk_size,
            self.unable,
        )
        return dict(zip(PLAN_COLUMNS, values, strict=True))


def carry_out(plan: SolverPlan, measure: Callable[[SolverPlan], _Measured]) -> _Measured:
    """Return ``measure(plan)``; where its solver cannot differentiate the model, by another's.

    Only one that the user allows, and that fits; any other error is the model's own.
    """
    try:
        return measure(plan)
    except ReverseModeError:  # which all solvers need
        raise
    except DifferentiationError as failure:
        if not plan.others:
            raise
        other = replace(plan, solver=plan.others[0], others=plan.others[1:], unable=plan.solver)
        try:
            return measure(other)
        except DifferentiationError as second:
            raise DifferentiationError(
                f"{failure} solver={other.solver!r} was tried as well: {second}"
            ) from second


def survey_snapshot(
    snapshot: Snapshot, settings: KernelSettings, probes: torch.Generator, layers: Any = None
) -> KernelSurvey:
    """Evaluate a snapshot, and count what its kernel, or those of ``layers``, would cost."""
    return survey_kernel(
        snapshot,
        residual=settings.residual,
        parameters=settings.parameters,
        layers=layers,
        chunk_size=settings.chunk_size,
        device=settings.device,
        dtype=settings.dtype,
        generator=probes,
    )


def plan_by_memory(
    settings: KernelSettings, device: torch.device, plan: Callable[[int, str], SolverPlan]
) -> SolverPlan:
    """Return ``plan(max_bytes, solver)``, whose solver does not depend on what is free.

    Where less is free than is allowed by default, it works in smaller pieces, or a ValueError says.
    """
    chosen = plan(resolve_max_memory(settings.max_memory), settings.solver)
    free = free_bytes(device)
    if settings.max_memory is not None or fits(chosen.peaks[chosen.solver], free):
        return chosen
    try:
        return plan(free, chosen.solver)
    except ValueError as error:
        raise ValueError(
            f"max_memory=None allows {format_bytes(DEFAULT_MEMORY)}, for which the solver is "
            f"{chosen.solver!r}, and {format_bytes(free)} are free: {error} With max_memory="
            f"'{format_bytes(free)}' the solver is chosen for what is free."
        ) from error


def plan_spectrum(
    footprint: Footprint,
    max_bytes: int,
    *,
    solver: str = "auto",
    n_steps: int,
    chunk_size: int | None = None,
    needs_basis: bool = False,
) -> SolverPlan:
    """Choose between the whole spectrum and Lanczos; the same arguments give the same plan.

    ``needs_basis``: the vectors are asked for, and not the measure alone.
    """
    exact = plan_exact(footprint, max_bytes, chunk_size)
    lanczos = plan_lanczos(footprint, n_steps, max_bytes, chunk_size, needs_basis=needs_basis)
    costs = {"exact": exact.cost, "lanczos": lanczos.cost}
    peaks = {"exact": exact.peak_bytes, "lanczos": lanczos.peak_bytes}
    load = f"n = {footprint.n_entries} entries"
    chosen, *others = _choose(solver, costs, peaks, max_bytes, load, "take fewer samples or steps")
    return SolverPlan(chosen, footprint.n_entries, exact, lanczos, costs, peaks, tuple(others))


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
    lanczos_runs: float = 1.0,
    worth: float = 1.0,
) -> SolverPlan:
    """Choose between all modes and those of a block Krylov space, with their couplings.

    ``lanczos_runs`` multiplies the cost of Lanczos; ``"auto"`` pays ``worth`` times it for modes.
    """
    n = footprint.n_entries
    n_modes = min(n_steps * block_size, n)
    exact = plan_exact(footprint, max_bytes, chunk_size)
    lanczos = plan_lanczos(footprint, n_modes, max_bytes, chunk_size)
    product = product_cost(footprint, lanczos.chunk_size)
    # For each direction two kernels, or two products for each mode.
    of_all = 2.0 * exact.kernel_cost if derivative == "difference" else 2.0 * n * product
    costs = {
        "exact": exact.cost + n_directions * of_all,
        "lanczos": lanczos_runs * (lanczos.cost + n_directions * 2.0 * n_modes * product),
    }
    kept = 8 * (_MATRICES + n_directions)
    peaks = {
        "exact": int(exact.peak_bytes + kept * n**2),
        "lanczos": int(lanczos.peak_bytes + kept * n_modes**2 + 16 * n * n_modes),
    }
    load = f"n = {n} entries and {n_directions} directions"
    remedy = "take fewer samples, steps or random directions"
    chosen, *others = _choose(solver, costs, peaks, max_bytes, load, remedy, worth)
    return SolverPlan(chosen, n, exact, lanczos, costs, peaks, tuple(others))


def plan_blocks(
    footprint: Footprint, max_bytes: int, *, n_blocks: int, chunk_size: int | None = None
) -> SolverPlan:
    """Plan the exact kernels of blocks of parameters, for which there is no other solver."""
    n = footprint.n_entries
    exact = plan_exact(footprint, max_bytes, chunk_size)
    lanczos = plan_lanczos(footprint, 0, max_bytes, chunk_size)
    # Kernels of the blocks with their factors, and then the halves of all pairs of rates.
    matrices = max(3 * n_blocks, n_blocks + n_blocks**2 // 2)
    costs, peaks = {"exact": exact.cost}, {"exact": exact.peak_bytes + 8 * matrices * n**2}
    load = f"n = {n} entries and {n_blocks} blocks"
    _choose("exact", costs, peaks, max_bytes, load, "take fewer samples or join blocks")
    return SolverPlan("exact", n, exact, lanczos, costs, peaks)


def _choose(
    solver: str,
    costs: Mapping[str, float],
    peaks: Mapping[str, int],
    max_bytes: int,
    load: str,
    remedy: str,
    worth: float = 1.0,
) -> list[str]:
    """Return the solvers that fit, of those allowed, cheapest first; a tie goes to the exact.

    Raises ValueError where none fits: it says what would be needed, and the remedy.
    """
    allowed = list(peaks) if solver == "auto" else [solver]
    fitting = [name for name in allowed if fits(peaks[name], max_bytes)]
    if not fitting:
        # A solver is named where there is a choice of it.
        called = {name: f"solver={name!r}" if len(peaks) > 1 else "they" for name in peaks}
        what = f"solver={solver!r}" if len(peaks) > 1 else "the kernels"
        needs = ", ".join(
            f"{called[name]} need{'s' if len(peaks) > 1 else ''} about {format_bytes(peak / ROOM)}"
            for name, peak in peaks.items()
        )
        raise ValueError(
            f"max_memory: {format_bytes(max_bytes)} do not hold {what} for {load}: {needs}; allow "
            f"that much, or {remedy}."
        )
    return sorted(fitting, key=lambda name: costs[name] / (worth if name == "exact" else 1.0))
