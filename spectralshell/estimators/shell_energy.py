"""ShellEnergyEstimator: error energies in logarithmic shells of the tangent-kernel spectrum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from spectralshell.estimators.base import SnapshotEstimator, unchanged_on_failure
from spectralshell.estimators.placement import (
    ShellDensity,
    place_shells,
    warn_of_hidden_energy,
    warn_of_other_derivative,
)
from spectralshell.estimators.skipped import with_skipped
from spectralshell.krylov import EigenPairs, dense_pairs, lanczos, ritz_pairs
from spectralshell.measurements.cache import Measurement, naming
from spectralshell.measurements.settings import (
    KernelSettings,
    check_kernel_parameters,
    kernel_settings,
    probe_seed,
)
from spectralshell.measurements.solver import SolverPlan, carry_out
from spectralshell.measurements.spectrum import exact_measure, measure_spectrum, survey_spectrum
from spectralshell.operators import ExactKernel
from spectralshell.operators.noise import spectral_norm
from spectralshell.parameter_checks import (
    check_integer,
    check_option,
    check_real,
    check_sample_weight,
    check_window,
)
from spectralshell.shells import ShellPartition, SpectralMeasure, energy_frame, shell_frame
from spectralshell.shells.carriers import FLOOR
from spectralshell.shells.partition import NULL
from spectralshell.snapshots import Snapshot, as_snapshots


class KernelQueriesMixin:
    """Shell energies of layers and leading eigenpairs, for an estimator with a partition."""

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
        settings = replace(self._measurement.settings, solver="exact")
        frames = []
        for snapshot in as_snapshots(X):
            with naming(snapshot):
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

    def _settings(self: Any) -> KernelSettings:
        self._check_parameters()
        return kernel_settings(self)

    def _pairs_of_one(
        self: Any, snapshot: Snapshot, settings: KernelSettings, k: int
    ) -> EigenPairs:
        with naming(snapshot):
            return self._find_pairs(snapshot, settings, k)

    def _find_pairs(self: Any, snapshot: Snapshot, settings: KernelSettings, k: int) -> EigenPairs:
        survey, plan = survey_spectrum(
            snapshot, settings, probe_seed(self.random_state), self.verbose, needs_basis=True
        )

        def solve(plan: SolverPlan) -> EigenPairs:
            if plan.solver == "exact":
                with survey.build_exact(plan.exact) as exact:
                    return dense_pairs(exact.to_dense(), k, exact.noise)
            with survey.build_matrix_free(plan.lanczos.chunk_size) as kernel:
                run = lanczos(kernel.matvec, kernel.residual_vector, settings.n_steps)
                largest = max([kernel.norm, *map(float, run.alpha)])
                return ritz_pairs(run, k, kernel.noise * largest)

        return carry_out(plan, solve)

    def _layer_measures(
        self: Any, snapshot: Snapshot, settings: KernelSettings, layers: Any
    ) -> Iterator[tuple[str, SpectralMeasure]]:
        survey, plan = survey_spectrum(
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


def _with_skipped(shells: pd.DataFrame, left_out: pd.DataFrame) -> pd.DataFrame:
    return with_skipped(shells, left_out, shell=NULL)


def _wide(kernel: ExactKernel, matrix: Tensor) -> Tensor:
    return matrix.to(kernel.residual_vector)


class ShellEnergyEstimator(KernelQueriesMixin, SnapshotEstimator):
    """Error energy per logarithmic shell of the empirical tangent kernel.

    For each snapshot (one model state on one batch) the residual e is decomposed in the
    eigenbasis of M = J J*, and its energy ½ g² is collected in shells [λ0 q^α, λ0 q^(α+1)).
    Lanczos started at e gives the error's own spectral measure by Gauss quadrature, with
    certified bounds at every shell edge; the exact solver diagonalises M.

    Parameters
    ----------
    q : float, default=2.0
        Shell ratio, greater than 1. A grid over ``q`` costs the products of one fit.
    lambda_0 : float, default=1.0
        An edge of the partition, 1/τ.
    residual : {"mse", "brier", "cross-entropy", "nll"} or callable, default="mse"
        Which error and which Jacobian; see the user guide. A callable f(outputs, targets) gives
        the error, sample dimension first.
    solver : {"auto", "lanczos", "exact"}, default="auto"
        ``"auto"`` takes the cheaper one by operation counts, which ``plan_`` reports; the same
        input always gets the same solver.
    n_steps : int, default=100
        Lanczos steps m. A smooth measure is resolved down to about 40 λ_max/m².
    floor : "auto" or float, default="auto"
        Resolution floor, 1/τ; the first edge lies at or above it, in the shell of the lowest rate
        that has energy. ``"auto"`` takes the highest floor of the training snapshots.
    window : (float, float), optional
        Rates on which `score` compares; by default from the resolution floor to the largest
        eigenvalue of the training snapshots.
    parameters : str or callable, optional
        A regular expression or a predicate over parameter names, for the kernel of those
        parameters alone; all trainable ones by default.
    chunk_size : int, optional
        Samples recorded at a time, to bound memory; needs samples that do not interact. By default
        as many as ``max_memory`` allows.
    max_memory : int or str, optional
        Bytes of working memory for each snapshot, or a string such as ``"1GB"``; by default 8 GB,
        whatever is free, so that the same input gets the same solver everywhere. A solver that does
        not fit works in chunks, gives way to the other one (``solver="auto"``), or raises an error
        that says what would fit. Where less than 8 GB are free, the solver chosen for them works in
        smaller pieces.
    device : str, default="auto"
        Where to compute; ``"auto"`` is where the model is.
    dtype : {"float32", "float64"} or torch.dtype, optional
        Number type of the products, by default the model's (float32 for half-precision models).
    memory : str, path or joblib.Memory, optional
        Cache on disk. Each snapshot is stored as soon as it is measured, so that an interrupted
        run resumes with what it had.
    n_jobs : int, optional
        Processes over snapshots.
    random_state : int, RandomState instance or None, default=None
        Seeds the random probes that check the operator, a fixed seed if None; the figures do not
        depend on it.
    on_error : {"raise", "skip"}, default="raise"
        What to do with a snapshot that cannot be measured. ``"skip"`` leaves it out with a warning
        that names it; its rows are NaN, and ``skipped_`` says why. If none can be measured, the
        first error is raised.
    verbose : int, default=0
        1 shows a progress bar over snapshots and the plan of each before it is begun, 2 also a
        progress bar over its Lanczos steps.

    Attributes
    ----------
    edges_ : ndarray of shape (n_shells + 1,)
        Shell edges, 1/τ.
    n_shells_ : int
        Number of shells.
    shells_ : DataFrame
        One row per (training snapshot, shell): energies with their bounds, dissipation (energy
        per τ), density (energy per unit λ) and whether the shell is resolved; see `shell_frame`.
    solver_ : str
        The solver used; ``"mixed"`` if ``"auto"`` chose differently for different snapshots.
    plan_ : DataFrame
        One row per training snapshot: the solver, and for both solvers the predicted cost (seconds
        of a reference machine, from operation counts) and peak memory (bytes), which decided.
    skipped_ : DataFrame
        One row per training snapshot that was left out: ``tau, batch, [name], status``.
    n_skipped_ : int
        Their number.
    n_matvecs_ : int
        Products with M behind the result, none where the exact kernel was built from layers;
        probes are counted in ``n_probes_``.
    n_probes_ : int
        Products spent on checking the operators.
    resolution_floor_ : float
        The floor below the first edge, 1/τ.
    lambda_max_ : float
        Largest eigenvalue of the training snapshots, 1/τ.
    window_ : tuple of float
        The window that `score` uses.
    dynamics_exact_ : bool
        Whether ė = −M e holds for gradient flow on this residual's loss; not where the outputs
        change otherwise than the Jacobian says.

    See Also
    --------
    GRSDTailFitter : Fits the power-law tail of the frames that `transform` gives.

    Notes
    -----
    One product costs about a forward pass in forward mode and a backward pass. Lanczos takes
    ``n_steps`` of them and (n_steps + 1) vectors of n float64 numbers, where n is the number of
    (row, output) entries. The exact solver takes a backward pass for each output of a sample, n²
    numbers, and an eigenproblem of 9 n³ operations. Results of batches of
    different sizes can be compared in scale (largest eigenvalue, total), not in the shape of the
    low-λ tail: that depends on n.

    Shell energies follow "Renormalizable Spectral-Shell Dynamics as the Origin of Neural Scaling
    Laws" (arXiv 2512.10427), section 3.2, eq. (25), with the factor ½ and every inner product a
    mean over rows.

    Examples
    --------
    >>> import numpy as np
    >>> from spectralshell import ShellEnergyEstimator
    >>> from spectralshell.datasets import load_digits_trajectory
    >>> X = load_digits_trajectory(n_snapshots=2, n_batches=2, batch_size=16, max_iter=50)
    >>> estimator = ShellEnergyEstimator(q=2.0).fit(X)
    >>> frame = estimator.transform(X)
    >>> totals = [measure.total for measure in estimator.spectral_measures(X)]
    >>> np.allclose(frame.sum(axis=1), totals, rtol=1e-12)
    True
    """

    _shells: pd.DataFrame | None

    def __init__(
        self,
        *,
        q: float = 2.0,
        lambda_0: float = 1.0,
        residual: str | Callable[..., Any] = "mse",
        solver: str = "auto",
        n_steps: int = 100,
        floor: str | float = "auto",
        window: tuple[float, float] | None = None,
        parameters: str | Callable[[str], bool] | None = None,
        chunk_size: int | None = None,
        max_memory: int | str | None = None,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        memory: Any = None,
        n_jobs: int | None = None,
        random_state: Any = None,
        on_error: str = "raise",
        verbose: int = 0,
    ) -> None:
        self.q = q
        self.lambda_0 = lambda_0
        self.residual = residual
        self.solver = solver
        self.n_steps = n_steps
        self.floor = floor
        self.window = window
        self.parameters = parameters
        self.chunk_size = chunk_size
        self.max_memory = max_memory
        self.device = device
        self.dtype = dtype
        self.memory = memory
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.on_error = on_error
        self.verbose = verbose

    def fit(self, X: Sequence[Any], y: Any = None) -> ShellEnergyEstimator:
        """Measure the snapshots and place the shells.

        Parameters
        ----------
        X : list of Snapshot
            Training snapshots; tuples (model, inputs, targets) are accepted, each its own batch.
        y : None
            Ignored, present for scikit-learn.

        Returns
        -------
        ShellEnergyEstimator
            The fitted estimator.

        Raises
        ------
        ValueError, TypeError
            If a parameter or a snapshot is not usable; the message names it and the remedy.

        Warns
        -----
        ResolutionWarning
            If the energy per shell is largest next to the resolution floor while energy lies
            below it, as such a peak may move with ``n_steps``; or if most of the energy of a
            snapshot lies below the floor.
        DynamicsWarning
            If the outputs of a model do not change as its reverse-mode Jacobian says: with
            straight-through estimators, parts detached, gradients that hooks change. ``status``
            says so as well.
        SnapshotWarning
            If snapshots were skipped, or a batch does not hold the same data at every tau.
        """
        with unchanged_on_failure(self):
            measures = self._fit(X)
            self.n_probes_ = sum(m.n_probes for m in measures)
            warn_of_hidden_energy(measures, self._partition, self.resolution_floor_)
            warn_of_other_derivative(measures)
        return self

    def transform(self, X: Sequence[Any]) -> pd.DataFrame:
        """Return shell energies, one row per snapshot.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others.

        Returns
        -------
        DataFrame of shape (n_snapshots, 1 + n_shells)
            Index levels ``tau``, ``batch`` (and ``name`` where set), ``lambda_max`` and
            ``resolution_floor``: each row's own, or the given floor. Column ``null`` holds the
            energy below the first edge, the others E_α; a row sums to ½‖e‖². Energy above the
            last edge is in the last shell. ``attrs`` carry ``resolution_floor`` (the fitted
            one, or a higher one of these snapshots if ``floor="auto"``) and ``lambda_max``.
        """
        partition = self._fitted_partition()
        measured = self._measure_new(X)
        frame = energy_frame(measured.measures, partition)
        fitted = self.resolution_floor_
        if self._floor == "auto":
            frame.attrs[FLOOR] = max(fitted, frame.attrs[FLOOR])
        else:
            labels = frame.index.to_frame(index=False).assign(**{FLOOR: fitted})
            frame.index = pd.MultiIndex.from_frame(labels)
            frame.attrs[FLOOR] = fitted
        return measured.with_rows(frame)

    def shell_frame(self, X: Sequence[Any]) -> pd.DataFrame:
        """Return the tidy frame of new snapshots in the fitted shells.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others.

        Returns
        -------
        DataFrame
            Columns as in ``shells_``. The rows ``null`` (rates lost in rounding, or outside the
            range of M) and ``unresolved`` (from there to the first edge) add up to the column
            ``null`` of `transform`.
        """
        partition = self._fitted_partition()
        measured = self._measure_new(X)
        return _with_skipped(shell_frame(measured.measures, partition), measured.skipped())

    def spectral_measures(self, X: Sequence[Any]) -> list[SpectralMeasure]:
        """Return the spectral measures of snapshots under this estimator's settings.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots; what they remember is not computed again.

        Returns
        -------
        list of SpectralMeasure
            Rates, energies and certified bounds, which do not depend on ``q``. Of snapshots that
            are skipped there is none.
        """
        self._check_parameters()
        return self._measure_new(X, self._gather()).measures

    @property
    def shells_(self) -> pd.DataFrame:
        """Tidy frame of the training snapshots; its bounds are computed when it is first read."""
        check_is_fitted(self)
        if self._shells is None:
            shells = shell_frame(self._measures, self._partition)
            self._shells = _with_skipped(shells, self.skipped_)
        return self._shells

    def score(self, X: Sequence[Any], y: Any = None, sample_weight: Any = None) -> float:
        """Mean log-likelihood per unit ln λ of held-out spectral nodes, in nats.

        The fitted density is constant in ln λ on each shell inside the window, with the share of
        energy the training snapshots have there, mixed with 1 % of the uniform density. The
        nodes of ``X`` are weighted by their energy: Σ w ln f(ln λ) / Σ w. Fine shells follow the
        training snapshots' noise and coarse ones lose resolution, so that a grid search over
        ``q`` means something.

        Parameters
        ----------
        X : list of Snapshot
            Held-out snapshots.
        y : None
            Ignored.
        sample_weight : array-like of shape (n_snapshots,), optional
            Weight of each snapshot.

        Returns
        -------
        float
            Larger is better; NaN if the snapshots have no energy inside the window.
        """
        check_is_fitted(self)
        measured = self._measure_new(X)
        weights = check_sample_weight(sample_weight, len(measured.results))
        return self._density.score(measured.measures, measured.kept(weights))

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the column names of `transform`.

        Parameters
        ----------
        input_features : None
            Ignored.

        Returns
        -------
        ndarray of str
            ``null`` and one name per shell.
        """
        return np.asarray(["null", *self._fitted_partition().names], dtype=object)

    def _check_parameters(self) -> None:
        check_kernel_parameters(self)
        check_real("q", self.q, low=1.0, low_open=True)
        check_real("lambda_0", self.lambda_0, low=0.0, low_open=True)
        if isinstance(self.floor, str):
            check_option("floor", self.floor, ("auto",))
        else:
            check_real("floor", self.floor, low=0.0, low_open=True)
        check_window("window", self.window)

    def _gather(self) -> Measurement:
        return Measurement(measure_spectrum, kernel_settings(self), probe_seed(self.random_state))

    def _set_results(self, measures: list[SpectralMeasure]) -> None:
        placed = place_shells(measures, q=self.q, lambda_0=self.lambda_0, floor=self.floor)
        self._partition = placed.partition
        self.edges_ = placed.partition.edges
        self.n_shells_ = placed.partition.n_shells
        self.resolution_floor_ = placed.floor
        self.lambda_max_ = placed.lambda_max
        window = check_window("window", self.window)
        self.window_ = placed.range if window is None else window
        self._floor = self.floor
        self._measures = measures
        self._shells = None
        self._density = ShellDensity.from_measures(measures, self.edges_, self.window_)

    def _fitted_partition(self) -> ShellPartition:
        check_is_fitted(self)
        return self._partition
