"""What an estimator can be asked about the kernels it measures, beside the error's energies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from torch import Tensor

from spectralshell.estimators.measurement import (
    MeasurementConfig,
    exact_measure,
    plan_snapshot,
)
from spectralshell.estimators.measurement_parameters import measurement_config, probe_seed
from spectralshell.krylov import EigenPairs, dense_pairs, lanczos, ritz_pairs
from spectralshell.operators import ExactKernel
from spectralshell.operators.exact_noise import spectral_norm
from spectralshell.parameter_checks import check_integer
from spectralshell.shells import SpectralMeasure, shell_frame
from spectralshell.snapshots import Snapshot, as_snapshots


class KernelQueriesMixin:
    """Shell energies of layers and leading eigenpairs, under the estimator's own settings.

    For an estimator that has the parameters of a measurement, ``_check_parameters`` and
    ``_fitted_partition``.
    """

    def layer_frame(
        self: Any,
        X: Sequence[Any],
        layers: str | Mapping[str, str] | Callable[[str], str] = "module",
    ) -> pd.DataFrame:
        """Return the shell energies of the error in the kernels of parts of the model.

        The kernel is a sum over parameters, M = Σ M_l. Each part's own kernel M_l has its own
        modes and rates, so its rows sum to ½‖e‖² by themselves, as if it alone were trained.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others.
        layers : {"module", "parameter"}, mapping or callable, default="module"
            The parts: one for each module that owns parameters, for each parameter, for each label
            that a mapping gives to the regular expression that finds a parameter's name, or that
            a callable gives to the name.

        Returns
        -------
        DataFrame
            Columns as in ``shells_``, with ``layer`` before them, in the fitted shells.

        Raises
        ------
        ValueError, TypeError
            If ``layers`` is not usable, the estimator is not fitted, or ``max_memory`` does not
            hold the exact kernels.

        Notes
        -----
        All kernels of a snapshot come from one set of backward passes; each costs an eigenproblem
        and n² numbers. They are always exact, whatever ``solver`` is. Nothing is remembered.
        """
        partition = self._fitted_partition()
        settings = replace(self._settings(), solver="exact")
        frames = []
        for snapshot in as_snapshots(X):
            for label, measure in self._layer_measures(snapshot, settings, layers):
                frame = shell_frame([measure], partition)
                frame.insert(0, "layer", label)
                frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def eigenpairs(self: Any, X: Sequence[Any], k: int = 10) -> list[EigenPairs]:
        """Return the largest eigenvalues of each snapshot's kernel with their modes.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots; the estimator need not be fitted.
        k : int, default=10
            Pairs wanted.

        Returns
        -------
        list of EigenPairs
            Eigenvalues in descending order (unit 1/τ), orthonormal modes of shape (n, k) on the
            device, and residual norms ‖M u − λ u‖. From Lanczos, ``n_steps`` steps from the error:
            a repeated eigenvalue comes once, and a mode without error not at all.

        Raises
        ------
        ValueError, TypeError
            If a parameter or a snapshot is not usable.

        Notes
        -----
        Costs what measuring costs; nothing is remembered, as modes take n k numbers.

        Examples
        --------
        >>> from spectralshell import ShellEnergyEstimator
        >>> from spectralshell.datasets import load_digits_trajectory
        >>> X = load_digits_trajectory(n_snapshots=2, n_batches=1, batch_size=16, max_iter=50)
        >>> exact = ShellEnergyEstimator(solver="exact").eigenpairs(X, k=2)[0]
        >>> lanczos = ShellEnergyEstimator(solver="lanczos").eigenpairs(X, k=2)[0]
        >>> bool(abs(lanczos.eigenvalues / exact.eigenvalues - 1).max() < 1e-5)
        True
        """
        check_integer("k", k, low=1)
        settings = self._settings()
        return [self._pairs_of_one(snapshot, settings, k) for snapshot in as_snapshots(X)]

    def _settings(self: Any) -> MeasurementConfig:
        self._check_parameters()
        return measurement_config(self)

    def _pairs_of_one(
        self: Any, snapshot: Snapshot, settings: MeasurementConfig, k: int
    ) -> EigenPairs:
        survey, plan = plan_snapshot(
            snapshot, settings, probe_seed(self.random_state), self.verbose
        )
        if plan.solver == "exact":
            with survey.build_exact(plan.exact) as exact:
                return dense_pairs(exact.to_dense(), k, exact.noise)
        with survey.build_matrix_free(plan.lanczos.chunk_size) as kernel:
            run = lanczos(kernel.matvec, kernel.residual_vector, settings.n_steps)
            largest = max([kernel.norm, *map(float, run.alpha)])
            return ritz_pairs(run, k, kernel.noise * largest)

    def _layer_measures(
        self: Any, snapshot: Snapshot, settings: MeasurementConfig, layers: Any
    ) -> Iterator[tuple[str, SpectralMeasure]]:
        survey, plan = plan_snapshot(
            snapshot, settings, probe_seed(self.random_state), self.verbose, layers
        )
        with survey.build_exact(plan.exact, layers) as kernel:
            absolute = kernel.noise * spectral_norm(kernel.matrix)
            for label, matrix in kernel.layers.items():
                # The rounding of the whole is known; a part's is not larger.
                norm = spectral_norm(matrix)
                noise = absolute / norm if norm > 0.0 else kernel.noise
                measure = exact_measure(kernel, _wide(kernel, matrix), noise)
                yield (
                    label,
                    measure.relabel(tau=snapshot.tau, batch=snapshot.batch, name=snapshot.name),
                )


def _wide(kernel: ExactKernel, matrix: Tensor) -> Tensor:
    return matrix.to(kernel.residual_vector)
