"""The constructor parameters that say how couplings are measured, checked and gathered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spectralshell.estimators.direction_parameter import check_direction, may_be_random
from spectralshell.estimators.measurement_parameters import (
    check_measurement_parameters,
    measurement_config,
    probe_seed,
)
from spectralshell.parameter_checks import check_integer, check_option, check_real

DERIVATIVES = ("exact", "difference")


@dataclass(frozen=True)
class CouplingConfig:
    """What couplings depend on beside their snapshot; the shell ratio q is not in it.

    Parameters
    ----------
    residual, solver, n_steps, parameters, chunk_size, device, dtype, max_memory
        As in :class:`~spectralshell.estimators.measurement.MeasurementConfig`; ``n_steps`` counts
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


__all__ = [
    "CouplingConfig",
    "check_coupling_parameters",
    "check_motion_parameters",
    "coupling_config",
]
