"""JacobianBlockDiagnostic: locality, coherence and rate of the blocks of a network's Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.utils.validation import check_is_fitted

from spectralshell.estimators.base import SnapshotEstimator, unchanged_on_failure
from spectralshell.estimators.jacobian_block_frames import (
    FEATURES,
    NullSettings,
    block_frame,
    coherence_frame,
    null_frames,
    profile_frame,
    profile_score,
    scalar_frame,
    suprema_frame,
    trajectory_frame,
    window_frame,
)
from spectralshell.estimators.skipped import with_skipped
from spectralshell.measurements.blocks import (
    BlockMeasure,
    BlockSettings,
    check_blocks,
    measure_blocks,
)
from spectralshell.measurements.cache import Measurement
from spectralshell.measurements.couplings import warn_of_held_gates
from spectralshell.measurements.settings import (
    check_kernel_parameters,
    check_motion_parameters,
    kernel_settings,
    motion_settings,
    probe_seed,
)
from spectralshell.parameter_checks import MAX_DRAWS, check_integer, check_sample_weight


def check_same_blocks(measures: Sequence[BlockMeasure], expected: tuple[str, ...]) -> None:
    """Raise ValueError if a snapshot has other blocks than expected."""
    for position, measure in enumerate(measures):
        if measure.blocks != expected:
            raise ValueError(
                f"X[{position}] has the blocks {list(measure.blocks)}, expected {list(expected)}: "
                "all snapshots must be of one model, or get the same labels from `blocks`."
            )


class JacobianBlockDiagnostic(SnapshotEstimator):
    """Blocks of the Jacobian by depth: their coherence, and how near their change stays.

    Blocks l = 1 … L of the parameters split J = [J_1 … J_L] and M = Σ M_l, M_l = J_l J_l*. This
    measures what the first three conditions of the theory are about: the coherence ‖J_l* J_m‖ of
    two blocks and how it falls with |l − m|, the norms ‖J‖ and ‖dJ/dt‖, and which blocks' motion
    changes the kernel of each block.

    Parameters
    ----------
    residual : {"mse", "brier", "cross-entropy", "nll"} or callable, default="mse"
        Which error and which Jacobian; see the user guide.
    blocks : {"auto", "module", "parameter"}, mapping or callable, default="auto"
        The parts and their order. ``"auto"`` follows the module tree: members of containers, such
        as the residual blocks of a ResNet or the layers of a transformer, each with the
        normalisation after it. ``"module"`` and ``"parameter"`` take each module with parameters
        of its own, and each parameter. A mapping takes regular expressions to labels, the first
        that finds a name counts, and its order is the depth; otherwise the depth is the order in
        which the model registers its parameters.
    band : int, default=1
        Blocks at a distance up to this are near. It costs nothing to change.
    window_blocks : int, default=4
        Consecutive blocks of a window of ``windows_``.
    direction : str, Snapshot, mapping or callable, default="gradient-flow"
        What the parameters do: ``"gradient-flow"``, ``"cross-entropy"``, ``"random"``, the way to
        another snapshot, tensors by name, or a callable that gives one of these for a snapshot.
        Rates are per unit of it: per τ, but for tensors and snapshots of equal times (see status).
    derivative : {"exact", "difference"}, default="exact"
        Twice automatically, or by central differences of exact kernels, which is cheaper for large
        models and sees the gates of ReLU.
    step : float, optional
        Step of the difference, in units of the direction; by default J changes by about eps^(1/3)
        of its norm. Half of it is tried as well, and the status says what more than 1 % changed.
    n_null : int, default=99
        Random orders of the blocks, for the p-values; at most a million.
    parameters : str or callable, optional
        A regular expression or predicate over names; all trainable ones by default.
    chunk_size : int, optional
        Samples recorded at a time.
    max_memory : int or str, optional
        Working memory, in bytes or such as ``"1GB"``; by default 8 GB, or what is free.
    device : str, default="auto"
        Where to compute; ``"auto"`` is where the model is.
    dtype : {"float32", "float64"} or torch.dtype, optional
        Number type of the products, by default the model's (float32 for half-precision models).
    memory : str, path or joblib.Memory, optional
        Cache on disk; each snapshot is stored as soon as it is measured.
    n_jobs : int, optional
        Processes over snapshots.
    random_state : int, RandomState instance or None, default=None
        Seeds random orders, random directions and the probes of operators; fixed if None.
    on_error : {"raise", "skip"}, default="raise"
        What to do with a snapshot that cannot be measured, as for `ShellEnergyEstimator`.
    verbose : int, default=0
        1 shows a progress bar over snapshots.

    Attributes
    ----------
    block_names_ : list of str
        By depth.
    n_blocks_ : int
    coherence_ : DataFrame
        One row per training snapshot and ordered pair of blocks; see `coherence_frame`.
    blocks_ : DataFrame
        One row per training snapshot and block; see `block_frame`.
    windows_ : DataFrame
        Toeplitz residual of ``window_blocks`` consecutive blocks against their depth: whether
        blocks in the middle are more alike than those at the ends.
    null_ : DataFrame
        What depends on the order of the blocks, beside the same under random orders. With four
        blocks or fewer no p-value can fall to 5 %; ``status`` says so.
    profile_ : DataFrame
        Coherence by distance over the training snapshots, which `score` predicts with.
    trajectory_ : DataFrame
        The norms ‖J‖ and ‖dJ/dt‖ of each training snapshot, its row sums, and its ``status``,
        which of a skipped one is all.
    suprema_ : DataFrame
        Their largest values for each batch (and name).
    solver_, n_matvecs_ : str, int
        ``"exact"`` and 0: kernels are built from layers.
    skipped_, n_skipped_ : DataFrame, int
        Training snapshots that were left out, and why, as for `ShellEnergyEstimator`.
    plan_ : DataFrame
        What was predicted for each training snapshot, as for `ShellEnergyEstimator`.
    dynamics_exact_ : bool
        Whether ė = −M e along the direction; nothing here needs it.

    See Also
    --------
    CoherenceDisplay : Draws the frames.

    Notes
    -----
    Conditions 1 to 3 of "When Does Learning Renormalize? Sufficient Conditions for Power-Law
    Spectral Dynamics", section 3.2, and eqs. (11) to (13) of its appendix A.2.

    *Coherence*, condition 2, eq. (12): ‖J_l* J_m‖ = √λ_max(M_l^½ M_m M_l^½), in 1/τ, for m = l the
    square ‖J_l‖². Eq. (12) wants its largest value at each distance summable. Row sums are finite
    in any network; what they are worth is told by λ_max(M) ≤ max_l Σ_m ‖J_l* J_m‖ ≤ L max ‖J_l‖²
    (Schur): blocks are incoherent where the sum is close to its own diagonal term, so
    ``normalized_sum``, of ‖J_l* J_m‖ / (‖J_l‖ ‖J_m‖), is close to 1, and fully coherent where it is
    close to L. Operator norms see the most coherent direction alone, often the batch's mean.

    *Change*, condition 1, eq. (11): the paper writes dJ_l/dt in terms of the J_m near l. With
    coefficients in parameter space, as its eqs. (16) to (18) need, any J_l of full rank n does that
    alone, so the condition cannot fail. What is measured here can: along the direction θ̇ = Σ_m θ̇_m
    the rate of the kernel of block l is dM_l = Σ_m D_lm, with D_lm its rate when block m alone
    moves, and

        explained_l = 1 − ‖Σ_{|m − l| > band} D_lm‖_F² / ‖dM_l‖_F².

    It is 1 where only near blocks matter, and below 0 where near and far parts nearly cancel.
    ``change_within_band`` takes all blocks together, numerators and denominators summed over l.

    *Norms*, condition 3, eq. (13): ‖J‖ = √λ_max(M) and ‖dJ/dt‖ along the direction, and their
    suprema in ``suprema_``, finite for any finite set of snapshots: look at how they grow.

    *Toeplitz residual*: that of the normalised coherence by depth, ‖C − T(C)‖_F / ‖C‖_F; 0 where
    coherence depends on |l − m| alone, as Theorem 2 has it for blocks past a threshold depth.

    The three statistics that depend on depth come with the same under random orders of the blocks
    and a one-sided p-value, since what blocks in any order show is not locality.

    Cost: the exact kernels of the blocks, an eigenproblem for each and one eigenvalue for each
    pair, and the rates of all blocks along L restricted directions: n backward passes of each
    direction's graph (``"exact"``), or two exact kernels (``"difference"``). Memory: 4 n² L² bytes.
    Coherence below √η ‖J_l‖ ‖J_m‖, η the relative rounding of the kernels (4e-15, or about 1e-6 in
    float32), is not resolved: ``uncertainty`` says so.

    Examples
    --------
    >>> from spectralshell import JacobianBlockDiagnostic
    >>> from spectralshell.datasets import load_digits_trajectory
    >>> X = load_digits_trajectory(
    ...     n_snapshots=2, n_batches=1, batch_size=6, hidden=(8, 8, 8), max_iter=20)
    >>> diagnostic = JacobianBlockDiagnostic().fit(X)
    >>> diagnostic.block_names_
    ['0', '2', '4', '6']
    >>> bounds = diagnostic.transform(X)
    >>> bool((bounds["jacobian_norm"] ** 2 <= bounds["coherence_sum"]).all())
    True
    """

    def __init__(
        self,
        *,
        residual: str | Callable[..., Any] = "mse",
        blocks: str | Mapping[str, str] | Callable[[str], str] = "auto",
        band: int = 1,
        window_blocks: int = 4,
        direction: Any = "gradient-flow",
        derivative: str = "exact",
        step: float | None = None,
        n_null: int = 99,
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
        self.residual = residual
        self.blocks = blocks
        self.band = band
        self.window_blocks = window_blocks
        self.direction = direction
        self.derivative = derivative
        self.step = step
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

    def fit(self, X: Sequence[Any], y: Any = None) -> JacobianBlockDiagnostic:
        """Measure the snapshots, and how their coherence falls with distance.

        Parameters
        ----------
        X : list of Snapshot
            Training snapshots of one model; tuples (model, inputs, targets) are accepted.
        y : None
            Ignored, present for scikit-learn.

        Returns
        -------
        JacobianBlockDiagnostic
            The fitted estimator.

        Raises
        ------
        ValueError, TypeError
            If a parameter or a snapshot is not usable, such as a model whose outputs do not change
            as its reverse-mode Jacobian says, or snapshots differ in their blocks.

        Warns
        -----
        GateWarning
            If ``derivative="exact"`` and the model uses activations with kinks; the statuses in
            ``trajectory_`` say ``gates held`` as well.
        """
        with unchanged_on_failure(self):
            warn_of_held_gates(self._fit(X), stacklevel=2)
        return self

    def transform(self, X: Sequence[Any]) -> pd.DataFrame:
        """Return one row of scalars per snapshot.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others of the same model.

        Returns
        -------
        DataFrame of shape (n_snapshots, 12)
            Index levels ``tau`` and ``batch`` (and ``name`` where set). ``jacobian_norm`` (1/√τ),
            ``jacobian_rate`` (the same per τ), ``coherence_sum`` (largest row sum, 1/τ),
            ``normalized_sum`` (between 1 and L), ``coherence_within_band`` (share of the normalised
            coherence), ``decay_rate`` and ``decay_power`` (fits of the normalised coherence of
            different blocks by exp(−d/ξ), 1/ξ, and by d^−p), ``change_within_band``,
            ``toeplitz_residual``, and three p-values. NaN where there is nothing to observe: no
            decay with fewer than three blocks, no share of a change that is zero.
        """
        check_is_fitted(self)
        measured = self._measure_new(X)
        measures = self._checked(measured.measures)
        return measured.with_rows(scalar_frame(measures, self._null))

    def coherence_frame(self, X: Sequence[Any]) -> pd.DataFrame:
        """Return the coherence of all pairs of blocks of new snapshots.

        Parameters
        ----------
        X : list of Snapshot

        Returns
        -------
        DataFrame
            One row per snapshot and ordered pair: ``tau, batch, [name], block, other, depth,
            other_depth, distance, coherence`` (1/τ), ``normalized, uncertainty`` (of the coherence,
            from rounding), ``influence`` (‖D_lm‖_F / ‖dM_l‖_F for block l and other m).
        """
        return coherence_frame(self._measure_fitted(X))

    def block_frame(self, X: Sequence[Any]) -> pd.DataFrame:
        """Return the blocks of new snapshots.

        Parameters
        ----------
        X : list of Snapshot

        Returns
        -------
        DataFrame
            One row per snapshot and block: ``tau, batch, [name], block, depth, n_parameters, norm``
            (‖J_l‖), ``trace_share`` (of tr M), ``coherence_sum`` (Σ_m ‖J_l* J_m‖), ``change``
            (‖dM_l/dt‖_F), ``explained`` (NaN where nothing changes) and ``status``.
        """
        return block_frame(self._measure_fitted(X), self._null.band)

    def score(self, X: Sequence[Any], y: Any = None, sample_weight: Any = None) -> float:
        """How well distance predicts the coherence of held-out snapshots, against a constant.

        R² = 1 − Σ (c_lm − ĉ(|l − m|))² / Σ (c_lm − c̄)² over the pairs of different blocks of all
        snapshots, c the normalised coherence, ĉ its mean at that distance and c̄ its mean over all
        distances in the training snapshots: 1 where coherence depends on distance alone, 0 where
        distance tells nothing, below 0 where it misleads.

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
            0 where the constant is exact, as with one block; NaN where no snapshot has weight.
        """
        check_is_fitted(self)
        measured = self._measure_new(X)
        measures = self._checked(measured.measures)
        weights = measured.kept(check_sample_weight(sample_weight, len(measured.results)))
        profile = self.profile_[["normalized", "n_pairs"]].to_numpy(dtype=np.float64)
        return profile_score(
            [(measure.coherence, measure.norms) for measure in measures],
            weights,
            profile[:, 0],
            profile[:, 1],
        )

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
        return np.asarray(FEATURES, dtype=object)

    def _check_parameters(self) -> None:
        check_kernel_parameters(self)
        check_blocks(self.blocks)
        check_motion_parameters(self)
        check_integer("band", self.band, low=0)
        check_integer("window_blocks", self.window_blocks, low=2)
        check_integer("n_null", self.n_null, low=0, high=MAX_DRAWS)

    def _gather(self) -> Measurement:
        seed = probe_seed(self.random_state)
        self._null = NullSettings(self.band, self.n_null, seed)
        settings = BlockSettings(kernel_settings(self), motion_settings(self, seed), self.blocks)
        return Measurement(measure_blocks, settings, seed)

    def _set_results(self, measures: list[BlockMeasure]) -> None:
        check_same_blocks(measures, measures[0].blocks)
        self.block_names_ = list(measures[0].blocks)
        self.n_blocks_ = len(self.block_names_)
        self.coherence_ = coherence_frame(measures)
        self.blocks_ = block_frame(measures, self._null.band)
        self.windows_ = window_frame(measures, self.window_blocks)
        self.null_ = null_frames(measures, self._null)
        self.profile_ = profile_frame(measures)
        trajectory = trajectory_frame(measures)
        self.trajectory_ = with_skipped(trajectory, self.skipped_)
        self.suprema_ = suprema_frame(trajectory)

    def _measure_fitted(self, X: Sequence[Any]) -> list[BlockMeasure]:
        check_is_fitted(self)
        return self._checked(self._measure_new(X).measures)

    def _checked(self, measures: list[BlockMeasure]) -> list[BlockMeasure]:
        check_same_blocks(measures, tuple(self.block_names_))
        return measures
