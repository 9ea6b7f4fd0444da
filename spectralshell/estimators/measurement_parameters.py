"""The constructor parameters that say how a spectrum is measured, checked and gathered."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from sklearn.utils import check_random_state

from spectralshell.estimators.measurement import MeasurementConfig
from spectralshell.operators.memory_budget import resolve_max_memory
from spectralshell.parameter_checks import check_integer, check_option
from spectralshell.residuals import resolve_residual

_SOLVERS = ("auto", "lanczos", "exact")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


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


def resolve_dtype(dtype: Any) -> torch.dtype | None:
    """Return the number type that the parameter ``dtype`` stands for, None for the model's own.

    Raises
    ------
    ValueError
        If it is neither float32 nor float64.

    Examples
    --------
    >>> resolve_dtype("float64")
    torch.float64
    """
    resolved: Any = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if resolved is not None and resolved not in _DTYPES.values():
        raise ValueError(
            f"dtype must be None, 'float32' or 'float64', got {dtype!r}; "
            "half precision cannot resolve a spectrum."
        )
    return cast(torch.dtype | None, resolved)
