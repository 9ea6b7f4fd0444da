"""GRSDTailFitter: the tail of the error spectrum as a power law with a frontier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from spectralshell.estimators.intervals import jackknife_t
from spectralshell.estimators.tail.data import (
    TailProblem,
    build_problem,
    choose_window,
    collect,
    is_wide_frame,
    read_labels,
    read_layout,
    refuse_other_input,
    usable_points,
)
from spectralshell.estimators.tail.evidence import (
    batch_phrases,
    batches_differ,
    compare,
    empty_comparison,
    empty_falsifier,
    evidence_phrases,
    falsify,
    minima_phrases,
    no_cutoff_p_value,
    not_converged_phrase,
)
from spectralshell.estimators.tail.models import (
    COMPARED,
    POWER_LAW,
    SMALLEST_POWER,
    TEMPLATE,
    TailModel,
)
from spectralshell.estimators.tail.profile import (
    TailFit,
    is_determined,
    likelihood_interval,
    profile_fit,
)
from spectralshell.estimators.tail.rows import (
    fit_rows,
    log_shell_energies,
    score_rows,
    window_energies,
)
from spectralshell.parameter_checks import (
    check_integer,
    check_option,
    check_real,
    check_sample_weight,
    check_window,
)
from spectralshell.shells.partition import shell_name
from spectralshell.statuses import (
    DEGENERATE_SLOPE,
    EMPTY_TAIL,
    FLAT_SLOPE,
    NO_CUTOFF,
    NO_FRONTIER_INTERVAL,
    OK,
    ONE_BATCH_OPTIMISTIC,
    TOO_FEW_SHELLS,
    join_statuses,
    taus_left_out,
)

CUTOFFS = ("free", "shared", "none")

OUTPUT_COLUMNS = ("amplitude", "cutoff", "frontier", "tail_energy")

FRAME_COLUMNS = (
    "tau",
    "amplitude",
    "cutoff",
    "frontier",
    "frontier_lower",
    "frontier_upper",
    "n_shells",
    "status",
)

# Level of the test of κ = 0; it decides the model, so it does not follow ``confidence``.
CUTOFF_LEVEL = 0.05


class GRSDTailFitter(TransformerMixin, BaseEstimator):
    """Tail slope b and frontier of shell energies, with their intervals and their rivals.

    Fits ln ε = a_j − b ln λ − κ_j λ^(b−1), integrated over each shell, to the mean energies over
    batches: one amplitude a_j for each tau, one b for all.

    Parameters
    ----------
    window : tuple of float, optional
        (λ_lo, λ_hi). Shells that lie in it are fitted; a shell that straddles an end is counted in
        scores only, by its fitted share. By default the resolved shells from the peak of the
        density upwards.
    cutoff : {"free", "shared", "none"}, default="free"
        κ_j ≥ 0 free for each tau, κ_j = K τ_j, or no cutoff.
    edges : array-like of shape (n_features + 1,), optional
        Shell edges of a plain array; by default consecutive shells of ratio 2 from 1. A frame's
        columns name its shells, and edges must agree with them.
    confidence : float, default=0.95
        Nominal coverage of the intervals.
    min_shells : int, default=4
        Usable shells that a tau needs to be fitted.
    floor : float, optional
        Resolution floor, an absolute λ: shells that begin below it are left out. By default the
        frame's ``attrs["resolution_floor"]``, or none.

    Attributes
    ----------
    b_ : float
        Tail slope; NaN where ``status_`` says why.
    b_interval_ : tuple of float
        Jackknife-t over batches, which are left out at all taus together; NaN where b is NaN or
        degenerate, and where batches do not differ.
    frame_ : DataFrame
        One row per tau: ``tau, amplitude, cutoff, frontier, frontier_lower, frontier_upper,
        n_shells, status``. Without a cutoff the frontier is NaN.
    window_ : tuple of float
        Where the fit was made.
    status_ : str
        ``"ok"``, or phrases joined by ``"; "``.
    comparison_ : DataFrame
        ``model, slope, n_parameters, aic, delta_aic, log_likelihood, rank`` of a power law, with
        the template's cutoff, with exp(−κλ) as a frozen kernel gives, and of a lognormal.
        ``log_likelihood`` is that of a batch left out, per shell.
    falsifier_ : Series
        The cutoff's power p fitted freely (``power, lower, upper, slope``) against
        ``template_power`` b − 1 and ``frozen_power`` 1. NaN, with a status, where κ = 0 stands.
    n_features_in_ : int
        Number of columns.
    feature_names_in_ : ndarray of str
        Column names, where X was a frame.

    Notes
    -----
    A cutoff near b = 1 imitates any power law. So κ = 0 is tested first, at 5 %, with variances
    over batches; where it stands, b is the pure slope and the status says ``no cutoff in window``.
    Where it falls and |b − 1| < 0.05 the status says ``degenerate`` and there is no interval, since
    nothing determines b. b ≤ 1 is reported as it is.

    b is the global minimum of the weighted squares of ln ε over −3 ≤ b ≤ 8, outside 1 ± 1e-6 where
    the cutoff would be constant, to 1e-9; so is that of every batch left out. ``status_`` says
    where a fit has not converged and where minima compete: another one 0.05 or more away has an
    AIC within 2, or a batch left out moves the fit to another. It also says what the falsifier
    excludes, and which model of the comparison fits better: where the two do not tie, or their AIC
    are 10 apart.

    With one batch the interval is a profile likelihood's; shells are not independent, so it is
    optimistic, and ``status_`` says so.

    X that is poor (an empty tail, fewer than ``min_shells`` shells) gives NaN and a status. A fit
    takes some 100 ms for 12 batches, 6 taus and 10 shells, and memory for as many replicates as
    there are batches.

    References
    ----------
    "Renormalizable spectral-shell dynamics", the tail template, with the errata of this package's
    theory page.

    Examples
    --------
    >>> import numpy as np
    >>> edges = 2.0 ** np.arange(9)
    >>> energies = edges[:-1] ** -0.5 - edges[1:] ** -0.5  # ε ∝ λ^−1.5
    >>> X = energies * np.random.default_rng(0).gamma(25.0, 1 / 25.0, size=(8, 8))
    >>> fitter = GRSDTailFitter(edges=edges).fit(X)
    >>> bool(abs(fitter.b_ - 1.5) < 0.2), fitter.status_
    (True, 'no cutoff in window')
    """

    def __init__(
        self,
        *,
        window: tuple[float, float] | None = None,
        cutoff: str = "free",
        edges: Any = None,
        confidence: float = 0.95,
        min_shells: int = 4,
        floor: float | None = None,
    ) -> None:
        self.window = window
        self.cutoff = cutoff
        self.edges = edges
        self.confidence = confidence
        self.min_shells = min_shells
        self.floor = floor

    def __sklearn_tags__(self) -> Any:
        """Say that X holds energies, which are not negative."""
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        """Return whether there is a result."""
        return hasattr(self, "_result")

    def fit(self, X: Any, y: None = None, *, tau: Any = None, batch: Any = None) -> GRSDTailFitter:
        """Fit the tail.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_rows, n_shells)
            Frame of ``ShellEnergyEstimator.transform``, or energies with ``edges``.
        y : None
            Ignored.
        tau : array-like of shape (n_rows,), optional
            Effective time of each row; by default the frame's index level, or 0.
        batch : sequence of shape (n_rows,), optional
            Batch of each row, the independent unit of the jackknife; by default the frame's index
            level, or the position among the rows of equal tau. Rows of one (tau, batch) under
            several ``name`` in the frame's index are averaged.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For negative or non-finite energies, foreign or unordered columns, edges that do not
            fit, repeated (tau, batch) or (tau, batch, name), a missing batch, or parameters out of
            range. The estimator is then as it was before.
        """
        before = vars(self).copy()
        try:
            return self._fit(X, tau, batch)
        except BaseException:
            # The names of an X that failed must not stand beside the result of another.
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _fit(self, X: Any, tau: Any, batch: Any) -> GRSDTailFitter:
        window = check_window("window", self.window)
        check_option("cutoff", self.cutoff, CUTOFFS)
        confidence = check_real(
            "confidence", self.confidence, low=0.0, high=1.0, low_open=True, high_open=True
        )
        min_shells = check_integer("min_shells", self.min_shells, low=2)
        refuse_other_input(X)
        values = validate_data(self, X, dtype=np.float64, ensure_non_negative=True)
        layout = read_layout(X, values.shape[1], self.edges, self.floor)
        taus, codes = read_labels(X, len(values), tau, batch)
        if self.cutoff == "shared" and (taus < 0).any():
            raise ValueError('tau must not be negative with cutoff="shared", where κ_j = K τ_j.')
        data = collect(values, taus, codes, layout)
        window = choose_window(window, data, layout)
        problem = build_problem(data, layout, window, min_shells)
        if problem is None:
            n_shells = usable_points(data, layout, window).sum(axis=1)
            phrases = [TOO_FEW_SHELLS if n_shells.any() else EMPTY_TAIL]
            n_columns = layout.edges.size - 1
            result = no_estimate(data.taus, n_shells, n_columns, phrases, empty_comparison())
        else:
            result = estimate_tail(problem, data.taus, self.cutoff, confidence)
        self._layout, self._result = layout, result
        self.window_ = window
        self.b_, self.b_interval_ = result.slope, result.interval
        self.frame_ = result.frame
        self.comparison_, self.falsifier_ = result.comparison, result.falsifier
        return self

    @property
    def status_(self) -> str:
        """``"ok"``, or phrases joined by ``"; "``."""
        check_is_fitted(self)
        return join_statuses(self._result.phrases)

    def fit_transform(self, X: Any, y: None = None, *, tau: Any = None, batch: Any = None) -> Any:
        """Fit the tail, then each row of the same X; parameters as in `fit`."""
        return self.fit(X, y, tau=tau, batch=batch).transform(X, tau=tau)

    def transform(self, X: Any, *, tau: Any = None) -> Any:
        """Fit amplitude and cutoff of each row at the fitted b.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_rows, n_shells)
            Same columns as in ``fit``.
        tau : array-like of shape (n_rows,), optional
            Needed for an array where ``cutoff="shared"``; a frame has it in its index.

        Returns
        -------
        DataFrame or ndarray of shape (n_rows, 4)
            ``amplitude, cutoff, frontier, tail_energy``: the last is the measured energy in the
            window. A frame for a frame, with its index. NaN where a row has too few shells.
        """
        values, energies = self._read(X)
        layout, result = self._layout, self._result
        out = np.full((len(values), 4), np.nan)
        if not np.isnan(self.b_):
            cutoffs = None
            if result.has_cutoff and self.cutoff == "shared":
                cutoffs = self._row_cutoffs(X, len(values), tau)
            intercept, coefficient, log_reference = fit_rows(
                energies,
                values.sum(axis=1),
                layout,
                result.shell_weights,
                self.b_,
                has_cutoff=result.has_cutoff,
                cutoffs=cutoffs,
                min_shells=self.min_shells,
            )
            amplitude, log_cutoff, log_frontier = natural_parameters(
                np.asarray(self.b_), intercept, coefficient, log_reference
            )
            with np.errstate(over="ignore"):
                out[:, :3] = np.stack([amplitude, np.exp(log_cutoff), np.exp(log_frontier)], 1)
        out[:, 3] = window_energies(energies, layout, self.window_, self.b_, out[:, 1])
        if isinstance(X, pd.DataFrame):
            return pd.DataFrame(out, index=X.index, columns=list(OUTPUT_COLUMNS))
        return out

    def inverse_transform(self, X: Any) -> Any:
        """Return the fitted energies of rows of tail parameters.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_rows, 4)
            As ``transform`` gives; a frame's columns are taken by name.

        Returns
        -------
        DataFrame or ndarray of shape (n_rows, n_features)
            Energies A ∫ λ^−b exp(−κ λ^(b−1)) dλ over every shell, 0 in ``null``. Outside
            ``window_`` they are extrapolations. A frame names its shells by their edges where the
            fit had no names.
        """
        check_is_fitted(self)
        table = _tail_parameters(X)
        layout = self._layout
        energies = np.full((len(table), layout.edges.size - 1), np.nan)
        known = np.isfinite(table[:, :2]).all(axis=1)
        if known.any() and not np.isnan(self.b_):
            logs, _ = log_shell_energies(
                layout.edges[:-1], layout.edges[1:], self.b_, table[known, 1]
            )
            with np.errstate(divide="ignore", over="ignore"):
                energies[known] = np.exp(np.log(table[known, :1]) + logs)
        if layout.has_null:
            energies = np.concatenate([np.zeros((len(table), 1)), energies], axis=1)
        if isinstance(X, pd.DataFrame):
            generated = [shell_name(*map(float, ends)) for ends in pairwise(layout.edges)]
            names = getattr(self, "feature_names_in_", generated)
            return pd.DataFrame(energies, index=X.index, columns=names)
        return energies

    def score_samples(self, X: Any, *, tau: Any = None) -> np.ndarray:
        """Mean log-likelihood per unit ln λ of each row's energy in the window.

        Σ w_i E_fit[ln f | shell i ∩ window] / Σ w_i, with f the fitted density of the row's tau,
        which integrates to 1 over ``window_``. A tau between fitted ones gets a κ interpolated
        in tau; one before the first or after the last gets the κ of that end, without a warning, so
        far outside the score says little. With ``cutoff="shared"`` κ = K τ everywhere.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_rows, n_shells)
            Same columns as in ``fit``.
        tau : array-like of shape (n_rows,), optional
            Needed for an array where several taus were fitted.

        Returns
        -------
        ndarray of shape (n_rows,)
            NaN for a row without energy in the window, and where b is NaN.
        """
        values, energies = self._read(X)
        if np.isnan(self.b_):
            return np.full(len(values), np.nan)
        cutoffs = self._row_cutoffs(X, len(values), tau)
        return score_rows(energies, self._layout, self.window_, self.b_, cutoffs)

    def score(self, X: Any, y: None = None, sample_weight: Any = None, *, tau: Any = None) -> float:
        """Return the mean of `score_samples` over rows that have energy in the window.

        Parameters
        ----------
        X, tau
            As in `score_samples`.
        y : None
            Ignored.
        sample_weight : array-like of shape (n_rows,), optional
            Weight of each row, not negative.

        Returns
        -------
        float
            Nearly the same for every shell ratio q on one explicit window: it compares models and
            windows of data, and cannot choose q.
        """
        scores = self.score_samples(X, tau=tau)
        weights = check_sample_weight(sample_weight, len(scores))
        known = np.isfinite(scores)
        total = weights[known].sum()
        return float((weights[known] * scores[known]).sum() / total) if total > 0 else np.nan

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the columns of `transform`."""
        check_is_fitted(self)
        return np.asarray(OUTPUT_COLUMNS, dtype=object)

    def _read(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self)
        refuse_other_input(X)
        values = validate_data(self, X, dtype=np.float64, ensure_non_negative=True, reset=False)
        return values, self._layout.shells_of(values)

    def _row_cutoffs(self, X: Any, n_rows: int, tau: Any) -> np.ndarray:
        """κ at the tau of each row, from the fit."""
        result = self._result
        if not result.has_cutoff:
            return np.zeros(n_rows)
        fitted = result.frame.dropna(subset="cutoff")
        if tau is None and not is_wide_frame(X) and len(fitted) > 1:
            raise ValueError(
                "tau must be passed for an array, since the fit has a cutoff for each of several "
                "taus; pass one tau per row, or a frame with an index level tau."
            )
        if tau is None and not is_wide_frame(X):
            return np.full(n_rows, fitted["cutoff"].iloc[0])
        taus, _ = read_labels(X, n_rows, tau, np.arange(n_rows))
        if self.cutoff == "shared":
            return result.shared_cutoff * np.maximum(taus, 0.0)
        return np.interp(taus, fitted["tau"], fitted["cutoff"])


def _tail_parameters(X: Any) -> np.ndarray:
    """Return the columns that `transform` gives, from a frame by name."""
    if isinstance(X, pd.DataFrame) and set(X.columns) >= set(OUTPUT_COLUMNS):
        X = X[list(OUTPUT_COLUMNS)]
    elif isinstance(X, pd.DataFrame):
        found = [str(column) for column in X.columns]
        raise ValueError(f"X must have the columns {OUTPUT_COLUMNS} of transform, got {found}.")
    table = np.asarray(X, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(OUTPUT_COLUMNS):
        raise ValueError(
            f"X must have the columns {OUTPUT_COLUMNS} of transform, got shape {table.shape}."
        )
    return table


@dataclass(frozen=True)
class TailEstimate:
    """Result of a fit."""

    slope: float  # b, NaN where the phrases say why
    interval: tuple[float, float]
    has_cutoff: bool
    shared_cutoff: float  # K of κ_j = K τ_j, NaN where κ_j is free
    frame: pd.DataFrame  # one row per tau
    shell_weights: np.ndarray  # mean weight of each shell over the taus, 0 outside the fit
    phrases: Sequence[str]  # what is to be said of b
    comparison: pd.DataFrame
    falsifier: pd.Series


def estimate_tail(
    problem: TailProblem, taus: np.ndarray, cutoff: str, confidence: float
) -> TailEstimate:
    """Fit all models, test κ = 0, and report b with its interval.

    ``taus`` are all of the input, also those with too few shells.
    """
    shared = cutoff == "shared"
    ratios = problem.data.taus if shared else None
    fits = {
        model: profile_fit(
            model,
            problem.log_density,
            problem.weights,
            problem.grid,
            None if model.kind == "lognormal" else ratios,
        )
        for model in COMPARED
    }
    found = _has_cutoff(problem, fits)
    chosen = TEMPLATE if found and cutoff != "none" else POWER_LAW
    fit = fits[chosen]
    comparison = compare(problem, fits, shared, confidence)
    falsifier = empty_falsifier(NO_CUTOFF)
    if found and is_determined(chosen, fit):
        falsifier = falsify(problem, ratios, confidence)
    phrases = [
        *_phrases(problem, chosen, fit, cutoff),
        not_converged_phrase(fits),
        *evidence_phrases(chosen, comparison, falsifier),
    ]
    if not is_determined(chosen, fit):
        return no_estimate(taus, problem.n_shells, len(problem.shells), phrases, comparison)
    weights = np.zeros(len(problem.shells))
    weights[problem.shells] = problem.weights[0].mean(axis=0)
    amplitude, log_cutoff, log_frontier = natural_parameters(
        fit.theta[:, None], fit.intercept, fit.coefficient, problem.grid.log_reference
    )
    rate = np.exp(log_cutoff[0])
    used = problem.data.taus > 0
    has_rate = shared and chosen is TEMPLATE and used.any()
    return TailEstimate(
        slope=float(fit.theta[0]),
        interval=_interval(problem, chosen, fit, ratios, confidence),
        has_cutoff=chosen is TEMPLATE,
        shared_cutoff=float((rate[used] / problem.data.taus[used])[0]) if has_rate else np.nan,
        frame=_tau_frame(problem, taus, amplitude[0], rate, log_frontier, cutoff, confidence),
        shell_weights=weights,
        phrases=phrases,
        comparison=comparison,
        falsifier=falsifier,
    )


def no_estimate(
    taus: np.ndarray,
    n_shells: np.ndarray,
    n_columns: int,
    phrases: Sequence[str],
    comparison: pd.DataFrame,
) -> TailEstimate:
    """Return NaN with a status, for input that is legal but too poor to fit."""
    status = join_statuses(phrases)
    blank = np.full((len(taus), 5), np.nan)
    return TailEstimate(
        slope=np.nan,
        interval=(np.nan, np.nan),
        has_cutoff=False,
        shared_cutoff=np.nan,
        frame=_frame(taus, blank, n_shells, [status] * len(taus)),
        shell_weights=np.zeros(n_columns),
        phrases=phrases,
        comparison=comparison,
        falsifier=empty_falsifier(status),
    )


def _has_cutoff(problem: TailProblem, fits: dict[TailModel, TailFit]) -> bool:
    without, with_cutoff = fits[POWER_LAW].sse[0], fits[TEMPLATE].sse[0]
    if not (fits[TEMPLATE].coefficient[0] != 0).any():
        return False
    p_value = no_cutoff_p_value(
        problem.data,
        problem.means,
        problem.weights[0],
        problem.log_lambda,
        max(without - with_cutoff, 0.0),
        with_cutoff,
    )
    return p_value < CUTOFF_LEVEL


def _phrases(problem: TailProblem, chosen: TailModel, fit: TailFit, cutoff: str) -> list[str]:
    phrases = []
    if not is_determined(chosen, fit):
        phrases.append(FLAT_SLOPE)
    if chosen is POWER_LAW and cutoff != "none":
        phrases.append(NO_CUTOFF)
    if _is_degenerate(chosen, float(fit.theta[0])):
        phrases.append(DEGENERATE_SLOPE)
    if chosen is TEMPLATE:
        phrases += minima_phrases(problem, chosen, fit, "b")
    if problem.n_batches == 1:
        phrases.append(ONE_BATCH_OPTIMISTIC)
    phrases += batch_phrases(problem)
    if not problem.used.all():
        phrases.append(taus_left_out(int((~problem.used).sum())))
    return phrases


def _interval(
    problem: TailProblem,
    chosen: TailModel,
    fit: TailFit,
    ratios: np.ndarray | None,
    confidence: float,
) -> tuple[float, float]:
    best = float(fit.theta[0])
    if _is_degenerate(chosen, best):
        # Cutoff and slope imitate each other: replicates agree on a b that nothing determines.
        return np.nan, np.nan
    if problem.n_batches > 1:
        if not batches_differ(problem):
            return np.nan, np.nan
        gap = np.abs(fit.theta - 1.0)
        one_branch = np.ptp(np.sign(fit.theta - 1.0)) == 0
        if chosen is TEMPLATE and one_branch and gap.min() >= SMALLEST_POWER:
            # A cutoff says the less about b the nearer b is to 1: ln|b − 1| has even spread.
            half = float(jackknife_t(np.log(gap), confidence)[0])
            ends = 1.0 + np.sign(best - 1.0) * gap[0] * np.exp([-half, half])
            return float(ends.min()), float(ends.max())
        half = float(jackknife_t(fit.theta, confidence)[0])
        return best - half, best + half
    extra = 0 if chosen is POWER_LAW else (1 if ratios is not None else problem.n_taus)
    return likelihood_interval(
        chosen,
        fit,
        problem.log_density,
        problem.weights,
        problem.grid,
        ratios,
        problem.n_taus + 1 + extra,
        confidence,
    )


def _is_degenerate(chosen: TailModel, slope: float) -> bool:
    return chosen is TEMPLATE and abs(slope - 1.0) < SMALLEST_POWER


def natural_parameters(
    slope: np.ndarray, intercept: np.ndarray, coefficient: np.ndarray, log_reference: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A, ln κ and ln λ* of A λ^−b exp(−κ λ^(b−1)); without a cutoff ln κ is −∞, ln λ* NaN.

    A overflows to infinity near b = 1, where cutoff and amplitude together imitate a power law.
    """
    power = np.where(slope == 1.0, 1.0, slope - 1.0)
    scaled = coefficient / power  # κ λ_ref^(b−1), not negative
    with np.errstate(divide="ignore", over="ignore"):
        log_cutoff = np.log(scaled) - power * log_reference
        amplitude = np.exp(intercept + slope * log_reference + scaled)
        log_frontier = np.where(scaled > 0, -log_cutoff / power, np.nan)
    return amplitude, log_cutoff, log_frontier


def _tau_frame(
    problem: TailProblem,
    taus: np.ndarray,
    amplitude: np.ndarray,
    cutoff: np.ndarray,
    log_frontier: np.ndarray,
    kind: str,
    confidence: float,
) -> pd.DataFrame:
    """One row per tau; the frontier's interval is a jackknife-t of ln λ*."""
    values = np.full((len(taus), 5), np.nan)
    statuses = [TOO_FEW_SHELLS] * len(taus)
    resampled = problem.n_batches > 1 and batches_differ(problem)
    for position, row in enumerate(np.flatnonzero(problem.used)):
        logs = log_frontier[:, position]
        has_interval = resampled and bool(np.isfinite(logs).all())
        with np.errstate(over="ignore"):
            values[row, :3] = amplitude[position], cutoff[position], np.exp(logs[0])
            if has_interval:
                half = float(jackknife_t(logs, confidence)[0])
                values[row, 3:] = np.exp(logs[0] + np.array([-half, half]))
        if cutoff[position] == 0 and kind != "none":
            statuses[row] = NO_CUTOFF
        elif cutoff[position] > 0 and not has_interval:
            statuses[row] = NO_FRONTIER_INTERVAL
        else:
            statuses[row] = OK
    return _frame(taus, values, problem.n_shells, statuses)


def _frame(
    taus: np.ndarray, values: np.ndarray, n_shells: np.ndarray, statuses: list[str]
) -> pd.DataFrame:
    columns = [taus, *values.T, n_shells, statuses]
    return pd.DataFrame(dict(zip(FRAME_COLUMNS, columns, strict=True)))
