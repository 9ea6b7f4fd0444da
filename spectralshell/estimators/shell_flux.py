"""ShellFluxEstimator: how error energy moves between the shells of the tangent-kernel spectrum."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.utils.validation import check_is_fitted

from spectralshell.estimators.base import SnapshotEstimator, unchanged_on_failure
from spectralshell.estimators.placement import ShellDensity, place_shells
from spectralshell.estimators.shell_flux_frames import (
    BalancedSnapshot,
    balance_all,
    distance_frame,
    edge_frame,
    fit_velocity,
    flux_name,
    integrability_frame,
    shell_balance_frame,
    summary_frame,
    trajectory_frame,
    wide_fluxes,
)
from spectralshell.estimators.skipped import with_skipped
from spectralshell.measurements.cache import Measurement
from spectralshell.measurements.couplings import warn_of_held_gates
from spectralshell.measurements.fluxes import FluxMeasurement, FluxSettings, measure_fluxes
from spectralshell.measurements.settings import (
    check_kernel_parameters,
    check_motion_parameters,
    kernel_settings,
    motion_settings,
)
from spectralshell.parameter_checks import (
    check_option,
    check_real,
    check_sample_weight,
    check_window,
)
from spectralshell.residuals import resolve_residual
from spectralshell.shells import SoftShells
from spectralshell.shells.soft_shells import SOFTNESS
from spectralshell.warning_categories import DynamicsWarning


class FluxResultsMixin:
    """Frames of the balances, made when they are asked for."""

    def flux_frame(self: Any, X: Sequence[Any]) -> pd.DataFrame:
        """Return the tidy frame of fluxes of new snapshots, columns as in ``fluxes_``.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others.

        Returns
        -------
        DataFrame
            One row per (snapshot, edge).
        """
        return edge_frame(self._balanced(X), self._fitted_shells())

    def balance_frame(self: Any, X: Sequence[Any]) -> pd.DataFrame:
        """Return the balance of every shell of new snapshots, columns as in ``balance_``.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others. ``lazy_energy`` starts at the first of each batch.

        Returns
        -------
        DataFrame
            One row per (snapshot, shell).
        """
        return shell_balance_frame(self._balanced(X), self._fitted_shells())

    def trajectory_frame(self: Any, X: Sequence[Any]) -> pd.DataFrame:
        """Return measured and predicted fluxes of new snapshots, columns as in ``trajectory_``.

        Parameters
        ----------
        X : list of Snapshot
            Several times of each batch.

        Returns
        -------
        DataFrame
            One row per (interval, edge).
        """
        return trajectory_frame(self._balanced(X), self._fitted_shells())

    @property
    def fluxes_(self: Any) -> pd.DataFrame:
        """Fluxes of the training snapshots, one row per (snapshot, edge)."""
        return edge_frame(self._trained(), self._fitted_shells())

    @property
    def balance_(self: Any) -> pd.DataFrame:
        """Balance of the training snapshots, one row per (snapshot, shell)."""
        return shell_balance_frame(self._trained(), self._fitted_shells())

    @property
    def summary_(self: Any) -> pd.DataFrame:
        """One row per training snapshot."""
        return with_skipped(summary_frame(self._trained()), self.skipped_)

    @property
    def locality_(self: Any) -> pd.DataFrame:
        """Share of transfer by shell distance, one row per (training snapshot, distance)."""
        return distance_frame(self._trained())

    @property
    def trajectory_(self: Any) -> pd.DataFrame:
        """Measured and predicted fluxes, one row per (interval, edge)."""
        return trajectory_frame(self._trained(), self._fitted_shells())

    @property
    def integrability_(self: Any) -> pd.DataFrame:
        """Integrals of flux and dissipation over the times measured, per (batch, edge)."""
        return integrability_frame(self._trained(), self._fitted_shells())

    @property
    def velocity_fit_(self: Any) -> pd.DataFrame:
        """Power law of the velocity, for all times and for each."""
        return fit_velocity(self.fluxes_, self._confidence)

    def _trained(self: Any) -> list[BalancedSnapshot]:
        check_is_fitted(self)
        trained: list[BalancedSnapshot] = self._training
        return trained

    def _balance(self: Any, measurements: list[FluxMeasurement]) -> list[BalancedSnapshot]:
        return balance_all(measurements, self._shells)


class ShellFluxEstimator(FluxResultsMixin, SnapshotEstimator):
    """Energy flux through the edges of logarithmic shells as the parameters move.

    The energy of a soft shell, E_α = ½⟨e, w_α(M) e⟩ with smooth weights Σ_α w_α = 1, changes by
    dissipation and by what it exchanges with other shells: dE_α/dt = −D_α + transfer_α. This
    holds at all times, for every residual and direction, also while eigenvalues cross edges, of a
    model whose outputs change as its Jacobian says; others (straight-through estimators, parts
    detached, gradients reversed or scaled) are refused. For each snapshot the estimator gives the
    flux through every edge, from above to below (``flux_down``), its parts from moving eigenvalues
    and from turning modes, and the drift velocity v = −flux_down/ε. Which way energy flows is a
    result.

    Parameters
    ----------
    q : float, default=2.0
        Shell ratio, greater than 1. A grid over ``q`` costs the products of one fit.
    lambda_0 : float, default=1.0
        An edge of the partition, 1/τ.
    softness : float, default=0.25
        Width of an edge in ln λ, in units of ln q.
    residual : {"mse", "brier", "cross-entropy", "nll"} or callable, default="mse"
        Which error and which Jacobian, as for :class:`ShellEnergyEstimator`.
    solver : {"auto", "lanczos", "exact"}, default="auto"
        ``"exact"`` takes all modes and the couplings between them. ``"lanczos"`` takes the
        difference of the energies of the frozen error in displaced kernels, by Lanczos: for
        large n; the parts of a flux are then unknown. ``"auto"`` takes the exact solver unless it
        does not fit in memory or needs over ten times the operations.
    n_steps : int, default=100
        Steps of each Lanczos run.
    direction : str, Snapshot, mapping or callable, default="gradient-flow"
        What the parameters do: ``"gradient-flow"`` of the residual's own loss, ``"cross-entropy"``,
        ``"random"`` (of the norm of gradient flow), the way to another snapshot, tensors by
        parameter name, or a callable that gives one of these for a snapshot. Rates are per unit of
        it: per τ, but for tensors and snapshots of equal times, of which ``status`` says so.
    derivative : {"exact", "difference"}, default="exact"
        How the exact solver differentiates M.
    step : float, optional
        Step of a difference, of either solver, in units of the direction; by default J changes by
        about eps^(1/3) of itself, and the parameters by no more than that. Lanczos tries half of
        it as well, and an edge whose flux changes by 5 % of the largest is not resolved.
    floor : "auto" or float, default="auto"
        Resolution floor, 1/τ, as for :class:`ShellEnergyEstimator`.
    window : (float, float), optional
        Rates on which `score` compares.
    confidence : float, default=0.95
        Coverage of the intervals of ``velocity_fit_``.
    parameters, chunk_size, max_memory, device, dtype, memory, n_jobs, on_error, verbose
        As for :class:`ShellEnergyEstimator`.
    random_state : int, RandomState instance or None, default=None
        As for :class:`ShellEnergyEstimator`; it also seeds ``direction="random"``.

    Attributes
    ----------
    edges_ : ndarray of shape (n_shells + 1,)
        Shell edges, 1/τ. Energy crosses all but the last.
    n_shells_ : int
        Number of shells.
    fluxes_ : DataFrame
        One row per (training snapshot, edge): ``flux_down`` (energy per τ), ``drift``,
        ``rotation``, ``density`` (ε at the edge, smoothed as the shells), ``velocity`` (1/τ²; NaN
        without a mode within half a shell), ``regime_index`` |v|/λ, the energy and dissipation
        below, |J|/D of the shell below, ``n_near`` modes, ``resolved``, ``status``.
    balance_ : DataFrame
        One row per (snapshot, shell), ``null`` first: soft energy, dissipation, transfer,
        velocity, regime index |v|/λ and the dimensionless |v|/(2λ²), and the energy that a kernel
        frozen at the first time of the batch would leave.
    summary_ : DataFrame
        One row per snapshot, of a skipped one its status alone: its energy ½‖e‖² beside that under
        a kernel frozen at the first and at the previous time of the batch, the null shell's
        exchange and its share of all transfer, the balance defect (rounding), direction, solver,
        status.
    locality_ : DataFrame
        Share of transfer by shell distance; distance 0 is that of the null shell.
    trajectory_ : DataFrame
        Where batches have several times: one row per (interval, edge) with the flux measured from
        the balance, ΔE_≤/Δτ + D_≤, beside the predicted one.
    integrability_ : DataFrame
        ∫|J| dτ over ∫|D| dτ of the shell below, for each batch and edge.
    velocity_fit_ : DataFrame
        The power law v = ±c λ^b with its interval and a test of the sign, for all times and each.
    solver_ : str
        The solver used; ``"mixed"`` if it differs between snapshots.
    plan_ : DataFrame
        One row per training snapshot: what was predicted for both solvers, as for
        :class:`ShellEnergyEstimator`.
    skipped_, n_skipped_ : DataFrame, int
        Training snapshots that were left out, and why, as for :class:`ShellEnergyEstimator`.
    n_matvecs_ : int
        Products with M; the exact solver builds its kernel from layers.
    resolution_floor_, lambda_max_ : float
        The floor below the first edge, and the largest eigenvalue of the training snapshots, 1/τ.
    window_ : tuple of float
        The window that `score` uses.
    dynamics_exact_ : bool
        Whether ė = −M e along the direction. Fluxes do not need it; the energies under a frozen
        kernel are those of gradient flow, and need it there.

    See Also
    --------
    ShellEnergyEstimator : Energies of hard shells with certified bounds.

    Notes
    -----
    The exact solver costs one exact kernel, an eigenproblem, 2 n products with the kernel's rate
    (or two more kernels with ``derivative="difference"``), and a few n × n matrices, of which a
    snapshot remembers one; Lanczos five runs of ``n_steps`` products. A Lanczos flux is resolved
    above the resolution floor where the last third of the steps, and half the difference, changed
    it, and those above it, by less than 5 % of the largest.

    Unstructured couplings, in proportion to √(λ_u λ_v), give b near 1: a slope of 1 is no evidence
    of structure. |v| ≪ λ compares figures of different units; the dimensionless comparison of
    drift and decay is |v|/(2λ²).

    The balance corrects equation (3) of "Renormalizable spectral-shell dynamics as the origin of
    neural scaling laws" (arXiv 2512.10427), which holds between crossings only; flux and velocity
    are those of its Definition 4.1 and equation (6) with their signs reconciled.

    Examples
    --------
    >>> from spectralshell import ShellFluxEstimator
    >>> from spectralshell.datasets import load_digits_trajectory
    >>> X = load_digits_trajectory(n_snapshots=2, n_batches=1, batch_size=8, max_iter=50)
    >>> estimator = ShellFluxEstimator(q=4.0).fit(X)
    >>> shells = estimator.balance_
    >>> gained = shells.groupby("tau")["transfer"].sum().abs().max()
    >>> bool(gained < 1e-12 * shells["transfer"].abs().max())  # what one shell gains another loses
    True
    """

    def __init__(
        self,
        *,
        q: float = 2.0,
        lambda_0: float = 1.0,
        softness: float = SOFTNESS,
        residual: str | Callable[..., Any] = "mse",
        solver: str = "auto",
        n_steps: int = 100,
        direction: Any = "gradient-flow",
        derivative: str = "exact",
        step: float | None = None,
        floor: str | float = "auto",
        window: tuple[float, float] | None = None,
        confidence: float = 0.95,
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
        self.softness = softness
        self.residual = residual
        self.solver = solver
        self.n_steps = n_steps
        self.direction = direction
        self.derivative = derivative
        self.step = step
        self.floor = floor
        self.window = window
        self.confidence = confidence
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

    def fit(self, X: Sequence[Any], y: Any = None) -> ShellFluxEstimator:
        """Measure the snapshots, place the shells and balance their energies.

        Parameters
        ----------
        X : list of Snapshot
            Training snapshots; tuples (model, inputs, targets) are accepted, each its own batch.
        y : None
            Ignored, present for scikit-learn.

        Returns
        -------
        ShellFluxEstimator
            The fitted estimator.

        Raises
        ------
        ValueError, TypeError
            If a parameter or a snapshot is not usable; the message names it and the remedy. So is a
            model whose outputs do not change as its reverse-mode Jacobian says.

        Warns
        -----
        DynamicsWarning
            If batches have several times and ė = −M e does not hold for gradient flow on the
            residual's loss, which the energies under a frozen kernel need.
        GateWarning
            If M is differentiated exactly and the model has activations with kinks; ``status``
            says ``gates held`` as well.
        """
        with unchanged_on_failure(self):
            measurements = self._fit(X)
            trajectories = {(m.batch, m.name) for m in measurements}
            linear = resolve_residual(self.residual).dynamics_exact
            if not linear and len(trajectories) < len(measurements):
                warnings.warn(
                    "The energies under a frozen kernel need ė = −M e, which this residual does "
                    "not have; the fluxes do not need it. Measure with residual='mse' or 'brier' "
                    "to compare with a frozen kernel.",
                    DynamicsWarning,
                    stacklevel=2,
                )
            warn_of_held_gates(measurements, stacklevel=2)
        return self

    def transform(self, X: Sequence[Any]) -> pd.DataFrame:
        """Return the flux through every edge, one row per snapshot.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others.

        Returns
        -------
        DataFrame of shape (n_snapshots, n_shells)
            Index levels ``tau`` and ``batch`` (and ``name`` where set), columns
            ``flux_down[edge]``, energy per τ. ``attrs`` carry ``resolution_floor`` and
            ``lambda_max`` of these snapshots.
        """
        shells = self._fitted_shells()
        measured = self._measure_new(X)
        return measured.with_rows(wide_fluxes(self._balance(measured.measures), shells))

    def score(self, X: Sequence[Any], y: Any = None, sample_weight: Any = None) -> float:
        """Mean log-likelihood per unit ln λ of held-out spectral nodes, in nats.

        The same figure as that of `ShellEnergyEstimator.score`, from the energies alone. The
        balance is exact for any ``q``, so no error of it can choose one; shells that resolve the
        energies and do not follow their noise are also those through which fluxes mean something.

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
        measures = [m.measure for m in measured.measures]
        return self._density.score(measures, measured.kept(weights))

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the column names of `transform`.

        Parameters
        ----------
        input_features : None
            Ignored.

        Returns
        -------
        ndarray of str
            One name per edge.
        """
        return np.asarray([flux_name(edge) for edge in self._fitted_shells().edges], dtype=object)

    def _check_parameters(self) -> None:
        check_kernel_parameters(self)
        check_motion_parameters(self)
        check_real("q", self.q, low=1.0, low_open=True)
        check_real("lambda_0", self.lambda_0, low=0.0, low_open=True)
        check_real("softness", self.softness, low=0.0, low_open=True)
        check_real("confidence", self.confidence, low=0.0, high=1.0, low_open=True, high_open=True)
        if isinstance(self.floor, str):
            check_option("floor", self.floor, ("auto",))
        else:
            check_real("floor", self.floor, low=0.0, low_open=True)
        check_window("window", self.window)

    def _gather(self) -> Measurement:
        motion = motion_settings(self)
        settings = FluxSettings(kernel_settings(self), motion)
        return Measurement(measure_fluxes, settings, motion.random_seed)

    def _set_results(self, measurements: list[FluxMeasurement]) -> None:
        measures = [m.measure for m in measurements]
        placed = place_shells(measures, q=self.q, lambda_0=self.lambda_0, floor=self.floor)
        self._confidence = self.confidence
        self._shells = SoftShells(placed.partition, self.softness)
        self.edges_ = placed.partition.edges
        self.n_shells_ = placed.partition.n_shells
        self.resolution_floor_ = placed.floor
        self.lambda_max_ = placed.lambda_max
        window = check_window("window", self.window)
        self.window_ = placed.range if window is None else window
        self._density = ShellDensity.from_measures(measures, self.edges_, self.window_)
        self._training = self._balance(measurements)

    def _balanced(self, X: Sequence[Any]) -> list[BalancedSnapshot]:
        check_is_fitted(self)
        return self._balance(self._measure_new(X).measures)

    def _fitted_shells(self) -> SoftShells:
        check_is_fitted(self)
        return self._shells
