"""What a worker can time: one tool on one problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from benchmarks.problems import Problem


class Contender(ABC):
    """One way to compute something of a problem.

    Parameters
    ----------
    problem : Problem
    state, data : dict of str to ndarray
        As :func:`benchmarks.problems.load_arrays` returns them. Making the network and its data
        from them belongs to the constructor, which is neither timed nor counted as memory.
    options : dict
        What else the comparison fixes.
    """

    def __init__(
        self,
        problem: Problem,
        state: dict[str, np.ndarray],
        data: dict[str, np.ndarray],
        options: dict[str, Any],
    ) -> None:
        self.problem = problem
        self.options = options
        self.load(state, data)

    @abstractmethod
    def load(self, state: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> None:
        """Make the network and its data."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Do what is done once before many runs; reported apart from them."""

    @abstractmethod
    def run(self) -> Any:
        """Do what is timed, to the end."""

    def as_array(self, result: Any) -> np.ndarray:
        """Return what :meth:`run` gave in a form that contenders can be compared in."""
        return np.asarray(result, dtype=np.float64)

    def facts(self) -> dict[str, Any]:
        """Return what to know about the last run beside its time."""
        return {}
