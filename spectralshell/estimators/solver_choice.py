"""Which solver is cheaper, from operation counts with fixed constants."""

from __future__ import annotations

from dataclasses import dataclass

# Operations per entry of M³ of a dense symmetric eigenproblem with vectors (reduction to
# tridiagonal form, iteration, back-transformation).
_EIGENPROBLEM = 9.0
# Products on a block of the identity share overheads that a product on one vector pays alone.
_BLOCK_DISCOUNT = 0.5
# Two Gram–Schmidt passes of two products each, two operations an entry.
_REORTHOGONALISATION = 8.0


@dataclass(frozen=True)
class SolverPlan:
    """The cheaper solver and the two operation counts that decided.

    Parameters
    ----------
    solver : {"exact", "lanczos"}
        The cheaper one; a tie goes to the exact solver, which answers more.
    exact_operations, lanczos_operations : float
        Predicted floating-point operations.
    """

    solver: str
    exact_operations: float
    lanczos_operations: float


def choose_solver(n: int, n_steps: int, product_operations: float) -> SolverPlan:
    """Choose between the exact solver and Lanczos.

    Parameters
    ----------
    n : int
        Entries of the residual, the size of M.
    n_steps : int
        Lanczos steps asked for.
    product_operations : float
        Floating-point operations of one product with M.

    Returns
    -------
    SolverPlan
        The same arguments always give the same plan.

    Examples
    --------
    >>> choose_solver(40, 100, 1e6).solver
    'exact'
    >>> choose_solver(20_000, 100, 1e9).solver
    'lanczos'
    """
    steps = min(n_steps, n)
    exact = _BLOCK_DISCOUNT * n * product_operations + _EIGENPROBLEM * float(n) ** 3
    krylov = steps * product_operations + _REORTHOGONALISATION * n * float(steps) ** 2 / 2
    return SolverPlan("exact" if exact <= krylov else "lanczos", exact, krylov)
