"""Settings of a measurement: what a result depends on beside its snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from spectralshell.operators import Direction
from spectralshell.operators.costs import resolve_max_memory
from spectralshell.operators.motion.directions import AS_GIVEN, NAMED_DIRECTIONS, PER_TAU
from spectralshell.operators.problem import resolve_dtype
from spectralshell.parameter_checks import check_integer, check_option, check_real
from spectralshell.residuals import resolve_residual
from spectralshell.snapshots import Snapshot

_SOLVERS = ("auto", "lanczos", "exact")


DERIVATIVES = ("exact", "difference")


def check_direction(direction: Any) -> None:
    """Check a direction, or a callable that gives one for a snapshot.

    Raises
    ------
    ValueError, TypeError
        If it is none of those allowed; the message lists them.
    """
    if isinstance(direction, str):
        check_option("direction", direction, NAMED_DIRECTIONS)
    elif not (callable(direction) or isinstance(direction, Snapshot) or _is_mapping(direction)):
        raise TypeError(
            f"direction must be one of {', '.join(map(repr, NAMED_DIRECTIONS))}, a Snapshot to "
            "move to, a mapping of parameter names to tensors or arrays, or a callable that gives "
            f"one of these for a snapshot, got {direction!r}."
        )


def settle_direction(direction: Any, snapshot: Snapshot) -> Any:
    """Return what a callable direction answers for a snapshot, checked.

    Raises
    ------
    ValueError, TypeError
        If the answer is no direction, or a callable again.
    """
    answer = direction(snapshot)
    if callable(answer):
        raise TypeError(
            "direction: the callable must answer with a name, a Snapshot or a mapping, got the "
            f"callable {answer!r}; call it inside."
        )
    check_direction(answer)
    return answer


def may_be_random(direction: Any) -> bool:
    """Tell whether a direction is drawn, or a callable might say so."""
    return callable(direction) or (isinstance(direction, str) and direction == "random")


def unit_of(direction: Direction) -> str:
    """Return what the rates along a direction are per, such as ``"per tau"`` or ``"as given"``.

    A random direction is as long as gradient flow, and so per τ as well.
    """
    return PER_TAU if direction.name == "random" else direction.unit


def unit_status(unit: str) -> str:
    """Return what a status says of rates in a unit, ``"ok"`` if they are simply per τ."""
    if unit == PER_TAU:
        return "ok"
    return f"rates per unit of the direction {unit}" if unit == AS_GIVEN else f"rates {unit}"


def _is_mapping(direction: Any) -> bool:
    return hasattr(direction, "items") and all(
        isinstance(name, str) and isinstance(value, (Tensor, np.ndarray))
        for name, value in direction.items()
    )


@dataclass(frozen=True)
class MeasurementConfig:
    """What a spectral measure depends on beside its snapshot; the shell ratio q is not in it.

    Parameters
    ----------
    residual : str or callable
        Kind of residual, as in :class:`~spectralshell.ShellEnergyEstimator`.
    solver : {"auto", "lanczos", "exact"}
        How the spectrum is found.
    n_steps : int
        Lanczos steps.
    parameters : str, callable or None
        Which parameters count.
    chunk_size : int or None
        Samples per chunk of a product.
    device : str
        Where the products run.
    dtype : torch.dtype or None
        Number type of the products.
    max_memory : int, str or None
        Working memory, as in :class:`~spectralshell.ShellEnergyEstimator`.
    """

    residual: Any = "mse"
    solver: str = "auto"
    n_steps: int = 100
    parameters: Any = None
    chunk_size: int | None = None
    device: str = "auto"
    dtype: torch.dtype | None = None
    max_memory: int | str | None = None


def check_measurement_parameters(estimator: Any) -> None:
    """Check the parameters that every estimator on snapshots has.

    Parameters
    ----------
    estimator : estimator
        With the attributes ``solver, n_steps, chunk_size, max_memory, verbose, residual, dtype``.

    Raises
    ------
    ValueError, TypeError
        If one is out of range; the message names it.
    """
    check_option("solver", estimator.solver, _SOLVERS)
    check_integer("n_steps", estimator.n_steps, low=1)
    check_kernel_parameters(estimator)


def check_kernel_parameters(estimator: Any) -> None:
    """Check the parameters of whatever builds kernels of snapshots, with or without a spectrum.

    Parameters
    ----------
    estimator : estimator
        With the attributes ``chunk_size, max_memory, verbose, parameters, residual, dtype``.

    Raises
    ------
    ValueError, TypeError
        If one is out of range; the message names it.
    """
    if estimator.chunk_size is not None:
        check_integer("chunk_size", estimator.chunk_size, low=1)
    if estimator.max_memory is not None:
        resolve_max_memory(estimator.max_memory, torch.device("cpu"))
    check_integer("verbose", estimator.verbose, low=0)
    chosen = estimator.parameters
    if chosen is not None and not isinstance(chosen, str) and not callable(chosen):
        raise TypeError(
            "parameters must be None, a regular expression or a predicate over names, got "
            f"{chosen!r}; for a list of names pass names.__contains__."
        )
    resolve_residual(estimator.residual)
    resolve_dtype(estimator.dtype)


def measurement_config(estimator: Any) -> MeasurementConfig:
    """Gather what the spectral measures of an estimator depend on.

    Parameters
    ----------
    estimator : estimator
        With checked parameters.

    Returns
    -------
    MeasurementConfig
        Equal for estimators whose measures are equal: the number of steps does not count where
        the solver has none.
    """
    return MeasurementConfig(
        residual=estimator.residual,
        solver=estimator.solver,
        n_steps=0 if estimator.solver == "exact" else int(estimator.n_steps),
        parameters=estimator.parameters,
        chunk_size=estimator.chunk_size,
        device=str(estimator.device),
        dtype=resolve_dtype(estimator.dtype),
        max_memory=estimator.max_memory,
    )


def probe_seed(random_state: Any) -> int:
    """Seed of the operator's probes, fixed for None so that numpy's own state stays as it is.

    Examples
    --------
    >>> probe_seed(None)
    0
    """
    if random_state is None:
        return 0
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


@dataclass(frozen=True)
class CouplingConfig:
    """What couplings depend on beside their snapshot; the shell ratio q is not in it.

    Parameters
    ----------
    residual, solver, n_steps, parameters, chunk_size, device, dtype, max_memory
        As in :class:`~spectralshell.measurements.spectrum.MeasurementConfig`; ``n_steps`` counts
        blocks.
    block_size : int
        Vectors of a block: the error and random ones.
    direction : str, Snapshot, mapping of str to Tensor or array, or callable
        What the parameters do; a callable is given the snapshot and returns one of the others.
    derivative : {"exact", "difference"}
        How M is differentiated.
    step : float or None
        Step of the difference, in units of τ.
    n_random : int
        Random directions.
    random_seed : int
        Of the random directions and the start block.
    """

    residual: Any = "mse"
    solver: str = "auto"
    n_steps: int = 50
    block_size: int = 8
    direction: Any = "gradient-flow"
    derivative: str = "exact"
    step: float | None = None
    n_random: int = 0
    random_seed: int = 0
    parameters: Any = None
    chunk_size: int | None = None
    device: str = "auto"
    dtype: torch.dtype | None = None
    max_memory: int | str | None = None


def check_coupling_parameters(estimator: Any) -> None:
    """Check the parameters of an estimator on couplings.

    Parameters
    ----------
    estimator : estimator
        With the attributes of a measurement and ``block_size, direction, derivative, step``.

    Raises
    ------
    ValueError, TypeError
        If one is out of range; the message names it.
    """
    check_measurement_parameters(estimator)
    check_integer("block_size", estimator.block_size, low=1)
    check_motion_parameters(estimator)


def check_motion_parameters(estimator: Any) -> None:
    """Check the parameters that say how the kernel moves: ``direction, derivative, step``.

    Raises
    ------
    ValueError, TypeError
        If one is out of range; the message names it.
    """
    check_option("derivative", estimator.derivative, DERIVATIVES)
    if estimator.step is not None:
        check_real("step", estimator.step, low=0.0, low_open=True)
    check_direction(estimator.direction)


def coupling_config(estimator: Any, n_random: int = 0) -> CouplingConfig:
    """Gather what the couplings of an estimator depend on.

    Parameters
    ----------
    estimator : estimator
        With checked parameters.
    n_random : int, default=0
        Random directions wanted.

    Returns
    -------
    CouplingConfig
        Equal for estimators whose couplings are equal.
    """
    spectrum = measurement_config(estimator)
    exact = estimator.solver == "exact"
    seeded = n_random > 0 or not exact or may_be_random(estimator.direction)
    return CouplingConfig(
        residual=spectrum.residual,
        solver=spectrum.solver,
        n_steps=spectrum.n_steps,
        block_size=0 if exact else int(estimator.block_size),
        direction=estimator.direction,
        derivative=estimator.derivative,
        step=None if estimator.step is None else float(estimator.step),
        n_random=n_random,
        random_seed=probe_seed(estimator.random_state) if seeded else 0,
        parameters=spectrum.parameters,
        chunk_size=spectrum.chunk_size,
        device=spectrum.device,
        dtype=spectrum.dtype,
        max_memory=spectrum.max_memory,
    )
