"""ToeplitzDiagnostic: whether shell couplings depend on the distance between shells alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from spectralshell.estimators.base import SnapshotEstimator, unchanged_on_failure
from spectralshell.estimators.toeplitz_frames import (
    ALTERNATIVES,
    Diagnosis,
    SnapshotShells,
    null_p_value,
    place_coupling_shells,
)
from spectralshell.measurements.cache import Measurement
from spectralshell.measurements.couplings import (
    CouplingSettings,
    ModeCouplings,
    measure_couplings,
    warn_of_held_gates,
)
from spectralshell.measurements.settings import (
    check_kernel_parameters,
    check_motion_parameters,
    kernel_settings,
    motion_settings,
    probe_seed,
)
from spectralshell.parameter_checks import MAX_DRAWS, check_integer, check_real, check_sample_weight
from spectralshell.shells import toeplitz_residual
from spectralshell.shells.coupling import CouplingRule
from spectralshell.shells.coupling_statistics import most_central, sliding_windows
from spectralshell.shells.frames import label_index
from spectralshell.statuses import OK, join_statuses, n_skipped

Floats = NDArray[np.float64]

ROW_NAMES = (
    "toeplitz_residual",
    "permutation_residual",
    "permutation_p",
    "random_residual",
    "random_p",
    "central_residual",
    "central_permutation_residual",
    "central_permutation_p",
    *[name for name in ALTERNATIVES if name != "toeplitz_residual"],
    "n_shells",
    "n_modes",
)


def scalar_frame(
    snapshots: Sequence[SnapshotShells], n_null: int, window_shells: int
) -> pd.DataFrame:
    """Return the columns ``ROW_NAMES`` for each snapshot, none of which depends on the others."""
    index = label_index([s.couplings for s in snapshots])
    rows = [_row(snapshot, n_null, window_shells) for snapshot in snapshots]
    return pd.DataFrame(rows, index=index, columns=list(ROW_NAMES), dtype=np.float64)


def log_gain(snapshot: SnapshotShells, n_null: int) -> float:
    """Return −ln(residual / median residual of the permutations).

    NaN where nothing is to compare: a number would reward shells so wide that nothing is left.
    """
    if snapshot.modes.usable.sum() < 2 or snapshot.observed.is_zero():
        return float("nan")
    observed = float(toeplitz_residual(snapshot.observed.coupling))
    null = np.median(toeplitz_residual(snapshot.permuted(n_null, with_flux=False).coupling))
    # Equal entries leave rounding alone, on either side.
    rounding = np.finfo(np.float64).eps
    return float(np.log(max(null, rounding) / max(observed, rounding)))


def _row(snapshot: SnapshotShells, n_null: int, window_shells: int) -> dict[str, float]:
    observed = {name: float(v) for name, v in snapshot.observed.statistics().items()}
    residual = float("nan") if snapshot.observed.is_zero() else observed["toeplitz_residual"]
    permuted = snapshot.permuted(n_null, with_flux=False).statistics()["toeplitz_residual"]
    random = snapshot.random.statistics()["toeplitz_residual"]
    return observed | {
        "permutation_residual": float(np.median(permuted)),
        "permutation_p": null_p_value(residual, permuted, "less"),
        "random_residual": float(np.median(random)),
        "random_p": null_p_value(residual, random, "less"),
        **_central(snapshot, n_null, window_shells),
        "n_shells": float(snapshot.modes.usable.sum()),
        "n_modes": float(snapshot.modes.modes.size),
    }


def _central(snapshot: SnapshotShells, n_null: int, window_shells: int) -> dict[str, float]:
    windows = sliding_windows(snapshot.modes.usable, window_shells)
    chosen = most_central(windows)
    residual, tested, null = np.nan, np.nan, np.full(1, np.nan)
    if chosen is not None:
        window = windows[chosen]
        inner = snapshot.observed.coupling[window.shells, window.shells]
        residual = float(toeplitz_residual(inner))
        null = np.asarray(toeplitz_residual(snapshot.permuted_within(window, n_null)))
        tested = residual if np.nan_to_num(inner).any() else np.nan
    return {
        "central_residual": residual,
        "central_permutation_residual": float(np.median(null)),
        "central_permutation_p": null_p_value(tested, null, "less"),
    }


class ToeplitzDiagnostic(SnapshotEstimator):
    """Couplings between shells of a moving kernel, and how far they are from shift invariance.

    V = Uᵀ (dM/dt) U says how a direction of the parameters couples the modes of M. Averaged over
    pairs of shells it gives K_αβ, whose Toeplitz residual ‖K − T(K)‖_F / ‖K‖_F is 0 if the coupling
    depends on the distance between shells alone. Every statistic comes with two nulls: the entries
    of V in random places, and random directions of the same norm.

    Parameters
    ----------
    q : float, default=2.0
        Shell ratio, greater than 1. A grid over ``q`` costs the couplings of one fit.
    lambda_0 : float, default=1.0
        An edge of the partition, 1/τ.
    residual : {"mse", "brier", "cross-entropy", "nll"} or callable, default="mse"
        Which error and which Jacobian; see the user guide.
    solver : {"auto", "lanczos", "exact"}, default="auto"
        ``"exact"`` takes all modes of M, ``"lanczos"`` the converged ones of a block Krylov space
        that begins with the error, ``"auto"`` the cheaper of the two by operation counts.
    n_steps, block_size : int, default=50, 8
        Steps of block Lanczos, and vectors of a block: the error, and random ones.
    direction : str, Snapshot, mapping or callable, default="gradient-flow"
        What the parameters do: ``"gradient-flow"`` of the residual's own loss, ``"cross-entropy"``,
        ``"random"``, a snapshot to move to, a mapping from parameter names to tensors, or a
        callable that gives one of these for each snapshot. Couplings are per unit of it: per τ, but
        for tensors and snapshots of equal times, of which ``status_`` says so.
    derivative : {"exact", "difference"}, default="exact"
        How M is differentiated; only differences see the gates of ReLU-like activations flip.
    step : float, optional
        Step of the difference, in units of the direction; by default J changes by about eps^(1/3)
        of itself, and the parameters by no more than that.
    normalization : {"sqrt", "product", "raw"}, default="sqrt"
        Divide V_uv by √(λ_u λ_v), by λ_u λ_v, or by nothing. See `shells.shell_coupling` for this
        and the next two.
    reducer : {"mean-square", "rms", "mean-abs"}, default="mean-square"
        Average over the pairs of modes of two shells.
    diagonal : {"block", "modes", "pairs"}, default="block"
        Pairs that K_αα averages over: all, u = v, or u ≠ v.
    window_shells : int, default=6
        Shells of a sliding window, at least 2.
    min_modes : int, default=3
        Shells with fewer resolved modes are masked.
    n_null : int, default=20
        Permutations, and random directions. Each random direction costs as much as the direction
        itself; p-values are multiples of 1 / (1 + n_null), so that fewer than 19 tell nothing at
        5 %. At most a million.
    parameters, chunk_size, max_memory, device, dtype, memory, n_jobs, on_error, verbose
        As in `ShellEnergyEstimator`.
    random_state : int, RandomState instance or None, default=None
        Seeds the permutations, random directions, start block and probes; a fixed seed if None.

    Attributes
    ----------
    coupling_ : DataFrame of shape (n_shells, n_shells)
        K_αβ, the mean over the training snapshots; shells are named ``shell[lo,hi)``, masked ones
        are NaN. Unit 1/τ² by default.
    toeplitz_residual_ : float
        Residual of ``coupling_``.
    p_value_ : float
        (1 + #{permuted residuals ≤ residual}) / (1 + n_null): small if permuted entries are less
        Toeplitz. The p-value against random directions is in ``statistics_``.
    statistics_ : DataFrame
        One row per statistic: ``value, lower, upper`` (95 % jackknife over batches, NaN with one;
        snapshots with different names are batches of their own), ``alternative`` (the side on which
        the papers' claim lies), and for the nulls ``permutation`` and ``random`` their ``_median,
        _lower, _upper`` (5 % and 95 % of the draws) and ``_p`` (two-sided: as far from the median).
        Rows: ``toeplitz_residual``; slope and R² of the diagonal (``coupling_slope, coupling_r2,
        signed_slope, signed_r2``); ``intra_inter_ratio``; ``adjacent_share``, the share of the flux
        between shells that joins neighbours.
    null_ : DataFrame
        One row per ``null`` and ``draw``, one column per statistic.
    windows_ : DataFrame
        One row per window, from the upper spectral edge to the lower one: ``window, lambda_lo,
        lambda_hi, centrality`` (0 at an edge, 1 in the middle), ``n_shells`` (with enough modes),
        ``residual`` with interval and nulls, ``status``. Only the window's own entries are
        permuted.
    diagonal_ : DataFrame
        Slopes against ln λ of ln K_αα (``coupling``) and of the mean of the normalised V_uu
        (``signed_mean``), as from `shells.diagonal_scaling`, and where the ``interval`` is from.
    kernel_ : DataFrame
        Coupling by shell ``offset``, ``spread`` over pairs of shells, interval and nulls.
    locality_ : DataFrame
        ``flux`` (Σ |F_αβ|, energy per τ) and ``share`` by ``distance`` |α − β|, interval and nulls.
        F is the exchange of soft-shell energy, see `shells.shell_balance`.
    intra_inter_ratio_ : float
        Mean of K_αα over mean of K_αβ, α ≠ β.
    shells_ : DataFrame
        One row per shell: ``shell, lambda_lo, lambda_hi, lambda_mean`` (geometric mean of the
        modes), ``n_modes, coupling`` (K_αα with interval), ``signed_mean, status``.
    edges_, n_shells_ : ndarray of shape (n_shells + 1,), int
        Shell edges, 1/τ, and the number of shells.
    lambda_max_, resolution_floor_ : float
        Largest eigenvalue of the training snapshots, and the λ below which no mode counts.
    solver_, n_matvecs_ : str, int
        The solver (``"mixed"`` if it differs between snapshots), and its products with M.
    skipped_, n_skipped_ : DataFrame, int
        Training snapshots that were left out, and why, as for `ShellEnergyEstimator`.
    plan_ : DataFrame
        What was predicted for both solvers, as for `ShellEnergyEstimator`.
    dynamics_exact_ : bool
        Whether ė = −M e along the direction; nothing here needs it.
    status_ : str
        ``"ok"``, or what to know about the result.

    See Also
    --------
    ShellEnergyEstimator : The energies of the same shells.
    ToeplitzDisplay : Draws a fitted diagnostic.

    Notes
    -----
    Fit it on several batches of one model state: couplings of different times differ in size, and
    in their mean the largest weigh most (``status_`` says so). `transform` gives every snapshot its
    own row, for a trajectory. Times of one batch are permuted alike, and where their modes are not
    as many, permutation p-values are NaN. Where nothing couples, all p-values are.

    A small residual alone means nothing: it falls as shells hold more modes, also for noise. The
    permutation null keeps the modes per shell and the entries; it is exact if entries are
    exchangeable, whatever their tails. If random directions pass as well, the property belongs to
    the kernel's geometry and not to learning.

    The measurement with k modes and n_null + 1 directions takes 2 k products for each direction,
    or less where kernels are built exactly, and holds (5 + n_null) k² numbers for each snapshot.

    Sections 3 and 7 of "When Does Learning Renormalize? Sufficient Conditions for Power-Law
    Spectral Dynamics", with the normalisation that makes its claims compatible.

    Examples
    --------
    >>> from spectralshell import ToeplitzDiagnostic
    >>> from spectralshell.datasets import load_digits_trajectory
    >>> X = load_digits_trajectory(n_snapshots=2, n_batches=2, batch_size=8, hidden=(8,),
    ...                            max_iter=50)
    >>> diagnostic = ToeplitzDiagnostic(n_null=5).fit(X[-2:])
    >>> bool(0 < diagnostic.toeplitz_residual_ < 1), len(diagnostic.null_)
    (True, 10)
    >>> list(diagnostic.transform(X).index.names)
    ['tau', 'batch']
    """

    def __init__(
        self,
        *,
        q: float = 2.0,
        lambda_0: float = 1.0,
        residual: str | Callable[..., Any] = "mse",
        solver: str = "auto",
        n_steps: int = 50,
        block_size: int = 8,
        direction: Any = "gradient-flow",
        derivative: str = "exact",
        step: float | None = None,
        normalization: str = "sqrt",
        reducer: str = "mean-square",
        diagonal: str = "block",
        window_shells: int = 6,
        min_modes: int = 3,
        n_null: int = 20,
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
        self.block_size = block_size
        self.direction = direction
        self.derivative = derivative
        self.step = step
        self.normalization = normalization
        self.reducer = reducer
        self.diagonal = diagonal
        self.window_shells = window_shells
        self.min_modes = min_modes
        self.n_null = n_null
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

    def fit(self, X: Sequence[Any], y: Any = None) -> ToeplitzDiagnostic:
        """Measure the snapshots, place the shells, and diagnose their mean coupling.

        Parameters
        ----------
        X : list of Snapshot
            Batches of one model state, as a rule; tuples (model, inputs, targets) are accepted.
        y : None
            Ignored, present for scikit-learn.

        Returns
        -------
        ToeplitzDiagnostic
            The fitted estimator.

        Raises
        ------
        ValueError, TypeError
            If a parameter or a snapshot is not usable; the message names it and the remedy. So is a
            model whose outputs do not change as its reverse-mode Jacobian says.

        Warns
        -----
        GateWarning
            If ``derivative="exact"`` meets activations whose gates flip; ``status_`` says ``gates
            held`` as well.
        """
        with unchanged_on_failure(self):
            warn_of_held_gates(self._fit(X), stacklevel=2)
        return self

    def transform(self, X: Sequence[Any]) -> pd.DataFrame:
        """Return the statistics of each snapshot alone, in the fitted shells.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others.

        Returns
        -------
        DataFrame
            One row per snapshot, index levels ``tau`` and ``batch`` (and ``name`` where set):
            ``toeplitz_residual`` with the median (``permutation_residual, random_residual``) and
            p-value (``permutation_p, random_p``) of its nulls; ``central_residual,
            central_permutation_residual, central_permutation_p`` of the most central window;
            ``coupling_slope, coupling_r2, signed_slope, signed_r2, intra_inter_ratio,
            adjacent_share``; ``n_shells, n_modes`` that entered. NaN where there is nothing to
            compare, 0 where the kernel does not move.
        """
        check_is_fitted(self)
        measured = self._measure_new(X)
        shells = [self._in_shells(m) for m in measured.measures]
        return measured.with_rows(scalar_frame(shells, self._n_null, self._window_shells))

    def mode_couplings(self, X: Sequence[Any]) -> list[ModeCouplings]:
        """Return the modes and couplings of snapshots under the fitted settings.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots; what they remember is not computed again.

        Returns
        -------
        list of ModeCouplings
            Eigenvalues, amplitudes of the error, and V along all directions, whatever ``q`` is. Of
            snapshots that are skipped there is none.
        """
        check_is_fitted(self)
        return self._measure_new(X).measures

    def score(self, X: Sequence[Any], y: Any = None, sample_weight: Any = None) -> float:
        """Mean over snapshots of −ln(residual / median of its permutation null).

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others.
        y : None
            Ignored.
        sample_weight : array-like of shape (n_snapshots,), optional

        Returns
        -------
        float
            Above 0 if the couplings are closer to Toeplitz than their entries in random places,
            which the bare residual does not tell, as it falls with coarser shells on pure noise.
            Snapshots with fewer than two usable shells or without coupling are left out; NaN if
            there is no other, which a grid search ranks last.
        """
        check_is_fitted(self)
        measured = self._measure_new(X)
        given = measured.kept(check_sample_weight(sample_weight, len(measured.results)))
        gains = np.array([log_gain(self._in_shells(m), self._n_null) for m in measured.measures])
        weights = np.where(np.isnan(gains), 0.0, given)
        if not weights.sum() > 0.0:
            return float("nan")
        return float(np.average(np.nan_to_num(gains), weights=weights))

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the column names of `transform`.

        Parameters
        ----------
        input_features : None
            Ignored.

        Returns
        -------
        ndarray of str
        """
        check_is_fitted(self)
        return np.asarray(ROW_NAMES, dtype=object)

    def _check_parameters(self) -> None:
        check_kernel_parameters(self)
        check_integer("block_size", self.block_size, low=1)
        check_motion_parameters(self)
        check_real("q", self.q, low=1.0, low_open=True)
        check_real("lambda_0", self.lambda_0, low=0.0, low_open=True)
        check_integer("window_shells", self.window_shells, low=2)
        check_integer("n_null", self.n_null, low=1, high=MAX_DRAWS)

    def _gather(self) -> Measurement:
        self._rule = CouplingRule(self.normalization, self.reducer, self.diagonal, self.min_modes)
        # Two draws: a RandomState seeds permutations and directions apart.
        self._seed, seed = probe_seed(self.random_state), probe_seed(self.random_state)
        motion = motion_settings(self, seed, draws=True)
        settings = CouplingSettings(
            kernel=kernel_settings(self),
            motion=motion,
            block_size=0 if self.solver == "exact" else int(self.block_size),
            n_random=int(self.n_null),
        )
        return Measurement(measure_couplings, settings, motion.random_seed)

    def _in_shells(self, couplings: ModeCouplings) -> SnapshotShells:
        return SnapshotShells(couplings, self._partition, self._rule, self._seed)

    def _set_results(self, measured: list[ModeCouplings]) -> None:
        placed = place_coupling_shells(measured, q=self.q, lambda_0=self.lambda_0)
        self._partition = placed.partition
        shells = [self._in_shells(m) for m in measured]
        self._n_null, self._window_shells = int(self.n_null), int(self.window_shells)
        diagnosis = Diagnosis(shells, self._n_null, self._window_shells)
        self.edges_, self.n_shells_ = placed.partition.edges, placed.partition.n_shells
        self.lambda_max_, self.resolution_floor_ = placed.lambda_max, placed.floor
        self.coupling_ = diagnosis.coupling
        self.statistics_ = diagnosis.statistics
        self.null_ = diagnosis.null
        self.windows_ = diagnosis.window_frame
        self.diagonal_ = diagnosis.diagonal
        self.kernel_ = diagnosis.kernel
        self.locality_ = diagnosis.locality
        self.shells_ = diagnosis.shells
        values = self.statistics_["value"]
        self.toeplitz_residual_ = float(values["toeplitz_residual"])
        self.intra_inter_ratio_ = float(values["intra_inter_ratio"])
        self.p_value_ = float(self.statistics_["permutation_p"]["toeplitz_residual"])
        left_out = self.n_skipped_
        total = left_out + len(measured)
        phrases = [diagnosis.status, n_skipped(left_out, total) if left_out else OK]
        self.status_ = join_statuses(phrases)
