"""The constructor parameters of the block diagnostic, checked and gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spectralshell.estimators.coupling_parameters import check_motion_parameters
from spectralshell.estimators.direction_parameter import may_be_random
from spectralshell.estimators.jacobian_frames import NullSettings
from spectralshell.estimators.jacobian_grouping import check_blocks
from spectralshell.estimators.jacobian_measurement import BlockConfig, BlockMeasure
from spectralshell.estimators.measurement_parameters import (
    check_kernel_parameters,
    resolve_dtype,
)
from spectralshell.parameter_checks import check_integer


def check_block_parameters(estimator: Any) -> None:
    """Check the parameters of :class:`~spectralshell.JacobianBlockDiagnostic`.

    Raises
    ------
    ValueError, TypeError
        If one is out of range; the message names it.
    """
    check_kernel_parameters(estimator)
    check_blocks(estimator.blocks)
    check_motion_parameters(estimator)
    check_integer("band", estimator.band, low=0)
    check_integer("window_blocks", estimator.window_blocks, low=2)
    check_integer("n_null", estimator.n_null, low=0)


def block_config(estimator: Any, seed: int) -> BlockConfig:
    """Gather what the blocks of an estimator depend on, with checked parameters.

    ``seed`` is that of a random direction.
    """
    drawn = may_be_random(estimator.direction)
    return BlockConfig(
        residual=estimator.residual,
        blocks=estimator.blocks,
        direction=estimator.direction,
        derivative=estimator.derivative,
        step=None if estimator.step is None else float(estimator.step),
        parameters=estimator.parameters,
        chunk_size=estimator.chunk_size,
        device=str(estimator.device),
        dtype=resolve_dtype(estimator.dtype),
        max_memory=estimator.max_memory,
        random_seed=seed if drawn else 0,
    )


def null_settings(estimator: Any, seed: int) -> NullSettings:
    """Gather how an estimator compares with random orders of the blocks, drawn from a seed."""
    return NullSettings(estimator.band, estimator.n_null, seed)


def check_same_blocks(measures: Sequence[BlockMeasure], expected: tuple[str, ...]) -> None:
    """Raise ValueError if a snapshot has other blocks than expected."""
    for position, measure in enumerate(measures):
        if measure.blocks != expected:
            raise ValueError(
                f"X[{position}] has the blocks {list(measure.blocks)}, expected {list(expected)}: "
                "all snapshots must be of one model, or get the same labels from `blocks`."
            )


__all__ = ["block_config", "check_block_parameters", "check_same_blocks", "null_settings"]
