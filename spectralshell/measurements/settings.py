"""Settings of a measurement: what a result depends on beside its snapshot."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from spectralshell.operators.costs import resolve_max_memory
from spectralshell.operators.motion.directions import NAMED_DIRECTIONS
from spectralshell.operators.problem import resolve_dtype
from spectralshell.parameter_checks import call_given, check_integer, check_option, check_real
from spectralshell.residuals import resolve_residual
from spectralshell.snapshots import Snapshot

_SOLVERS = ("auto", "lanczos", "exact")


_DERIVATIVES = ("exact", "difference")


@dataclass(frozen=True)
class KernelSettings:
    """How a kernel is built and its spectrum found, as the parameters of an estimator say."""

    residual: Any = "mse"
    solver: str = "auto"
    n_steps: int = 100  # of Lanczos, or of block Lanczos
    parameters: Any = None
    chunk_size: int | None = None
    device: str = "auto"
    dtype: torch.dtype | None = None
    max_memory: int | str | None = None


@dataclass(frozen=True)
class MotionSettings:
    """What the parameters do, and how the kernel's rate is found."""

    direction: Any = "gradient-flow"
    derivative: str = "exact"
    step: float | None = None  # of a difference, in units of the direction
    random_seed: int = 0  # of whatever is drawn

    def settled(self, snapshot: Snapshot) -> MotionSettings:
        """Return the settings with what a callable direction answers for a snapshot, checked."""
        if not callable(self.direction):
            return self
        answer = call_given("direction", self.direction, snapshot)
        if callable(answer):
            raise TypeError(
                "direction: the callable must answer with a name, a Snapshot or a mapping, got the "
                f"callable {answer!r}; call it inside."
            )
        check_direction(answer)
        return replace(self, direction=answer)


def check_kernel_parameters(estimator: Any) -> None:
    """Check the parameters that kernel settings and measuring need; the message names a wrong one.

    An estimator without ``solver`` has the exact one alone.
    """
    if hasattr(estimator, "solver"):
        check_option("solver", estimator.solver, _SOLVERS)
        check_integer("n_steps", estimator.n_steps, low=1)
    if estimator.chunk_size is not None:
        check_integer("chunk_size", estimator.chunk_size, low=1)
    resolve_max_memory(estimator.max_memory)
    check_integer("verbose", estimator.verbose, low=0)
    chosen = estimator.parameters
    if chosen is not None and not isinstance(chosen, str) and not callable(chosen):
        raise TypeError(
            "parameters must be None, a regular expression or a predicate over names, got "
            f"{chosen!r}; for a list of names pass names.__contains__."
        )
    resolve_residual(estimator.residual)
    resolve_dtype(estimator.dtype)
    if str(estimator.device).split(":")[0] == "meta":
        raise ValueError(
            f"device={str(estimator.device)!r} holds no values to measure; use 'auto', 'cpu' or "
            "'cuda'."
        )
    _check_running(estimator)


def _check_running(estimator: Any) -> None:
    """Check the parameters that say how the work is run: no result depends on them but by draws."""
    if estimator.n_jobs is not None and check_integer("n_jobs", estimator.n_jobs) == 0:
        raise ValueError("n_jobs must be None or an integer other than 0, got 0; use 1 or -1.")
    try:
        check_random_state(estimator.random_state)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "random_state must be None, an integer from 0 to 4294967295 or a RandomState, got "
            f"{estimator.random_state!r}."
        ) from error
    if isinstance(estimator.memory, str) and not estimator.memory:
        raise ValueError(
            "memory must not be empty, got ''; pass a folder, or None to keep nothing."
        )
    if isinstance(estimator.memory, (str, os.PathLike)) and os.path.isfile(estimator.memory):
        raise ValueError(
            f"memory={os.fspath(estimator.memory)!r} is a file; pass the path of a folder, which "
            "need not exist."
        )


def check_motion_parameters(estimator: Any) -> None:
    """Check the parameters that motion settings need; the message names a wrong one."""
    check_option("derivative", estimator.derivative, _DERIVATIVES)
    if estimator.step is not None:
        check_real("step", estimator.step, low=0.0, low_open=True)
    check_direction(estimator.direction)


def check_direction(direction: Any) -> None:
    """Check a direction, or a callable that gives one for a snapshot."""
    if isinstance(direction, str):
        check_option("direction", direction, NAMED_DIRECTIONS)
    elif not (callable(direction) or isinstance(direction, Snapshot) or _is_mapping(direction)):
        raise TypeError(
            f"direction must be one of {', '.join(map(repr, NAMED_DIRECTIONS))}, a Snapshot to "
            "move to, a mapping of parameter names to tensors or arrays, or a callable that gives "
            f"one of these for a snapshot, got {direction!r}."
        )
    elif _is_mapping(direction) and len(direction) == 0:
        raise ValueError(
            "direction is an empty mapping, expected a tensor for at least one trainable parameter."
        )


def kernel_settings(estimator: Any) -> KernelSettings:
    """Gather kernel settings from an estimator's checked parameters; equal for equal measures."""
    solver = getattr(estimator, "solver", "exact")
    return KernelSettings(
        residual=estimator.residual,
        solver=solver,
        # The exact solver has no steps.
        n_steps=0 if solver == "exact" else int(estimator.n_steps),
        parameters=estimator.parameters,
        chunk_size=estimator.chunk_size,
        device=str(estimator.device),
        dtype=resolve_dtype(estimator.dtype),
        max_memory=estimator.max_memory,
    )


def motion_settings(
    estimator: Any, seed: int | None = None, *, draws: bool = False
) -> MotionSettings:
    """Gather motion settings from an estimator's checked parameters; equal for equal measures.

    A seed counts, and is drawn, only where direction or measurement (``draws``) may be random.
    """
    direction = estimator.direction
    may_be_random = callable(direction) or (isinstance(direction, str) and direction == "random")
    if not (draws or may_be_random):
        seed = 0
    elif seed is None:
        seed = probe_seed(estimator.random_state)
    return MotionSettings(
        direction=direction,
        derivative=estimator.derivative,
        step=None if estimator.step is None else float(estimator.step),
        random_seed=seed,
    )


def probe_seed(random_state: Any) -> int:
    """Return a seed drawn from ``random_state``, 0 for None so that numpy's own state stays."""
    if random_state is None:
        return 0
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def _is_mapping(direction: Any) -> bool:
    return isinstance(direction, Mapping) and all(
        isinstance(name, str) and isinstance(value, (Tensor, np.ndarray))
        for name, value in direction.items()
    )
