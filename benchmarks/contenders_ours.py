"""The package itself."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import GridSearchCV, GroupKFold
from torch import Tensor

from benchmarks.contender import Contender
from benchmarks.networks_torch import load_data, load_network
from spectralshell import ShellEnergyEstimator, Snapshot, make_snapshots
from spectralshell.operators import build_exact_kernel, build_kernel
from spectralshell.warning_categories import ResolutionWarning

Q_GRID = tuple(float(q) for q in np.linspace(1.1, 3.0, 20))


class _Ours(Contender):
    def load(self, state: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> None:
        dtype = getattr(torch, self.options.get("dtype", "float32"))
        self.model = load_network(self.problem, state, dtype)
        self.data = load_data(data, dtype)

    def snapshot(self) -> Snapshot:
        # A new one each time: a snapshot remembers what was measured on it.
        return Snapshot(self.model, self.data["inputs"], self.data["targets"])


class ExactKernel(_Ours):
    """The whole kernel, from the snapshot on, in the network's own precision."""

    def run(self) -> Tensor:
        return build_exact_kernel(self.snapshot(), residual=self.problem.residual).matrix


class Product(_Ours):
    """M V after the kernel was set up once."""

    def prepare(self) -> None:
        self.kernel = build_kernel(self.snapshot(), residual=self.problem.residual)

    def run(self) -> Tensor:
        columns = self.data["vectors"][:, : self.options["columns"]]
        if self.options["columns"] == 1:
            return self.kernel.matvec(columns[:, 0])[:, None]
        # A wide block builds the matrix at the first call; so every timed run has to be a first.
        if not self.options.get("further"):
            self.kernel.forget_matrix()
        return self.kernel.matmat(columns)

    def facts(self) -> dict[str, Any]:
        matrix_from = self.kernel.matrix_from
        by_matrix = matrix_from is not None and self.options["columns"] >= matrix_from
        return {"rung": self.kernel.rung, "by_matrix": by_matrix}


class Fit(_Ours):
    """Shell energies of one snapshot: everything from the model to the spectral measure."""

    def run(self) -> ShellEnergyEstimator:
        self.estimator = ShellEnergyEstimator(
            residual=self.problem.residual,
            solver=self.options["solver"],
            n_steps=self.options.get("n_steps", 100),
            max_memory=self.options.get("max_memory"),
        )
        self.fitted_to = [self.snapshot()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResolutionWarning)  # the cost is asked for
            return self.estimator.fit(self.fitted_to)

    def as_array(self, result: ShellEnergyEstimator) -> np.ndarray:
        (measure,) = result.spectral_measures(self.fitted_to)
        if self.options.get("compare") == "eigenvalues":
            return np.sort(measure.nodes)[::-1][: self.options["count"]]
        return np.array([measure.weights @ measure.nodes**power for power in range(3)])

    def facts(self) -> dict[str, Any]:
        known: dict[str, Any] = {"solver": self.estimator.solver_}
        plan = self.estimator.plan_.iloc[0]
        return known | {name: _plain(value) for name, value in plan.items()}


class LeadingPairs(_Ours):
    """The largest eigenvalues with their modes, from the snapshot on."""

    def run(self) -> np.ndarray:
        estimator = ShellEnergyEstimator(
            residual=self.problem.residual, solver="lanczos", n_steps=self.options["n_steps"]
        )
        return estimator.eigenpairs([self.snapshot()], k=self.options["count"])[0].eigenvalues


class Grid(_Ours):
    """A grid over the shell ratio q, or one fit of the same snapshots."""

    def load(self, state: dict[str, np.ndarray], data: dict[str, np.ndarray]) -> None:
        super().load(state, data)
        self.groups = np.arange(self.options["batches"])

    def snapshots(self) -> list[Snapshot]:
        batches = [
            (inputs, targets)
            for inputs, targets in zip(
                self.data["inputs"].chunk(len(self.groups)),
                self.data["targets"].chunk(len(self.groups)),
                strict=True,
            )
        ]
        return make_snapshots(self.model, batches)

    def run(self) -> ShellEnergyEstimator:
        X = self.snapshots()
        estimator = ShellEnergyEstimator(
            solver=self.options["solver"], n_steps=self.options["n_steps"]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResolutionWarning)
            if self.options["search"] == "none":
                return estimator.fit(X)
            if self.options["search"] == "loop":
                return [estimator.set_params(q=q).fit(X) for q in Q_GRID][-1]
            folds = GroupKFold(self.options["folds"])
            search = GridSearchCV(estimator, {"q": list(Q_GRID)}, cv=folds, refit=False)
            search.fit(X, groups=self.groups)
            # The last value's fit, which costs no product, is what the three can be compared in.
            return estimator.set_params(q=Q_GRID[-1]).fit(X)

    def as_array(self, result: ShellEnergyEstimator) -> np.ndarray:
        return np.array([result.lambda_max_])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
