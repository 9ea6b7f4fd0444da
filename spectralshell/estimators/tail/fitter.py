"""GRSDTailFitter: the tail of the error spectrum as a power law with a frontier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from spectralshell.estimators.tail.data import (
    build_problem,
    choose_window,
    collect,
    count_holes,
    usable_points,
)
from spectralshell.estimators.tail.estimate import (
    TailEstimate,
    estimate_tail,
    natural_parameters,
    no_estimate,
)
from spectralshell.estimators.tail.evidence import (
    empty_comparison,
)
from spectralshell.estimators.tail.names import NamedSlope, compare_names, slopes_by_name
from spectralshell.estimators.tail.reading import (
    RowLabels,
    ShellLayout,
    assumptions,
    check_taus,
    open_table,
    read_floors,
    read_labels,
    read_largest,
    read_layout,
    read_names,
    refuse_foreign_names,
    without_skipped,
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
from spectralshell.shells.carriers import NAME, TAU, ShellTable, as_frame
from spectralshell.shells.partition import shell_name
from spectralshell.statuses import (
    EMPTY_TAIL,
    OK,
    TOO_FEW_SHELLS,
    assumed,
    batches_missing,
    join_statuses,
    n_skipped,
    shells_left_empty,
)

CUTOFFS = ("free", "shared", "none")

OUTPUT_COLUMNS = ("amplitude", "cutoff", "frontier", "tail_energy")


class GRSDTailFitter(TransformerMixin, BaseEstimator):
    """Tail slope b and frontier of shell energies, with their intervals and their rivals.

    Fits ln ε = a_j − b ln λ − κ_j λ^(b−1), integrated over each shell, to the mean energies over
    batches: one amplitude a_j for each tau of each name, one b for all.

    Parameters
    ----------
    window : tuple of float, optional
        (λ_lo, λ_hi). Shells that lie in it are fitted; a shell that straddles an end is counted in
        scores only, by its fitted share. By default the resolved shells from the peak of the
        density upwards. Of every tau only shells below its own λ_max are fitted, the lowest of
        its rows (``lambda_max``): the shell of λ_max is half empty.
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
        Resolution floor, an absolute λ: shells that begin below it are left out. By default that
        of the frame's rows (``resolution_floor``): a tau of a name is fitted where all its rows
        are resolved. An array has none.

    Attributes
    ----------
    b_ : float
        Tail slope; NaN where ``status_`` says why. Of several names it is their shared slope, and
        ``status_`` says whether one slope for all is tenable, with the p-value.
    b_by_name_ : DataFrame
        ``name, b, lower, upper, status``: the slope of each name fitted alone, on a window of its
        own where none is given. One row, of name ``""``, where rows have no name.
    b_interval_ : tuple of float
        Jackknife-t over batches, which are left out at all taus together; NaN where b is NaN or
        degenerate, and where batches do not differ.
    frame_ : DataFrame
        One row per tau: ``tau, [name], amplitude, cutoff, frontier, frontier_lower,
        frontier_upper, n_shells, status``, at the slope ``b_``. Without a cutoff the frontier is
        NaN, near b = 1 too.
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
        Names of ``null`` and of the shells, where X was a frame.

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

    A frame is a pandas DataFrame, or anything that Arrow reads, such as one of polars. The labels
    of its rows (``tau, batch, name, lambda_max, resolution_floor``) are levels of its index or
    columns, so that it may have passed through a file. A frame that names shells and has no tau,
    no batch or no floor is refused. An array may lack all of them; the status says what was taken
    instead.

    A batch label means the same probe data under all names where these have the same labels; then
    it is left out of all of them together. Else every name has batches of its own. The test of
    equal slopes divides the scatter of ``b_by_name_`` by its jackknife covariance, an F test with
    degrees of freedom of Greenhouse and Geisser, or of Satterthwaite where batches are not shared.

    The default window ends at the first empty shell, unless more shells with energy lie beyond it
    than up to it: a hole near the peak does not end the tail.

    X that is poor (an empty tail, fewer than ``min_shells`` shells, a batch that is missing at
    some tau) gives a status, and NaN where there is no slope. A fit takes some 100 ms for 12
    batches, 6 taus and 10 shells, for several names as much again for each of them, and memory for
    as many replicates as there are batches.

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
    >>> fitter = GRSDTailFitter(edges=edges, floor=0.0, window=(1.0, 256.0))
    >>> fitter = fitter.fit(X, tau=np.zeros(8), batch=range(8))
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

    def fit(
        self, X: Any, y: None = None, *, tau: Any = None, batch: Any = None, name: Any = None
    ) -> GRSDTailFitter:
        """Fit the tail.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_rows, n_shells)
            Frame of ``ShellEnergyEstimator.transform``, or energies with ``edges``.
        y : None
            Ignored.
        tau : array-like of shape (n_rows,), optional
            Effective time of each row; by default the frame's, or 0 for an array.
        batch : sequence of shape (n_rows,), optional
            Batch of each row, the independent unit of the jackknife; by default the frame's, or
            for an array the position among the rows of equal tau.
        name : sequence of shape (n_rows,), optional
            Run or model of each row; by default the frame's, if it has names.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For negative or non-finite energies, foreign or unordered columns, a frame that names
            shells and lacks labels, edges that do not fit, repeated (tau, batch, name), a row
            whose batch or name is missing, or parameters out of range. The estimator is then as it
            was before.
        """
        before = vars(self).copy()
        try:
            return self._fit(X, tau, batch, name)
        except BaseException:
            # The names of an X that failed must not stand beside the result of another.
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _fit(self, X: Any, tau: Any, batch: Any, name: Any) -> GRSDTailFitter:
        window = check_window("window", self.window)
        check_option("cutoff", self.cutoff, CUTOFFS)
        confidence = check_real(
            "confidence", self.confidence, low=0.0, high=1.0, low_open=True, high_open=True
        )
        min_shells = check_integer("min_shells", self.min_shells, low=2)
        given = {"tau": tau, "batch": batch, "name": name}
        X, given, skipped = without_skipped(X, **given)
        if skipped is not None and skipped.all():
            raise ValueError(
                "X holds NaN alone: all snapshots were skipped; `skipped_` of the estimator before "
                "this step says why."
            )
        table = open_table(X)
        refuse_foreign_names(table, self.edges)
        values = validate_data(self, table.energies, dtype=np.float64, ensure_non_negative=True)
        layout = read_layout(table, values.shape[1], self.edges)
        labels = read_labels(table, len(values), **given, floor=self.floor)
        if self.cutoff == "shared" and (labels.taus < 0).any():
            raise ValueError('tau must not be negative with cutoff="shared", where κ_j = K τ_j.')
        assumed_labels = assumptions(
            table, tau=tau, batch=batch, floor=self.floor, edges=self.edges, window=window
        )

        def estimate(rows: np.ndarray) -> _Fit:
            part = labels.take(rows)
            return _fit_curves(
                values[rows], part, layout, window, self.cutoff, confidence, min_shells
            )

        whole = estimate(np.arange(len(values)))
        result = whole.result
        if labels.names is None or len(set(labels.names)) == 1:
            named = [whole.named("" if labels.names is None else labels.names[0])]
        else:
            each = {one: np.flatnonzero(labels.names == one) for one in sorted(set(labels.names))}
            named = [estimate(rows).named(one) for one, rows in each.items()]
        self._layout, self._result = layout, result
        self._named, self._assumed = named, assumed_labels
        self._left_out = OK if skipped is None else n_skipped(int(skipped.sum()), len(skipped))
        self.window_ = whole.window
        self.b_, self.b_interval_ = result.slope, result.interval
        self.frame_ = result.frame
        self.comparison_, self.falsifier_ = result.comparison, result.falsifier
        return self

    @property
    def status_(self) -> str:
        """``"ok"``, or phrases joined by ``"; "``."""
        check_is_fitted(self)
        compared = [compare_names(self._named)] if len(self._named) > 1 else []
        told = [*compared, assumed(self._assumed), self._left_out]
        return join_statuses([*self._result.phrases, *told])

    @property
    def b_by_name_(self) -> pd.DataFrame:
        """Slope of each name fitted alone: ``name, b, lower, upper, status``."""
        check_is_fitted(self)
        return slopes_by_name(self._named)

    def fit_transform(
        self, X: Any, y: None = None, *, tau: Any = None, batch: Any = None, name: Any = None
    ) -> Any:
        """Fit the tail, then each row of the same X; parameters as in `fit`."""
        return self.fit(X, y, tau=tau, batch=batch, name=name).transform(X, tau=tau)

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
            window. A frame for a frame, with its index. NaN where a row has too few shells, of
            which those below its own resolution floor or above its own λ_max are none, and where
            its snapshot was skipped.
        """
        check_is_fitted(self)
        measured, given, skipped = without_skipped(X, tau=tau)
        if skipped is None:
            return self._transform(X, tau)
        out = pd.DataFrame(np.nan, as_frame(X).index, list(OUTPUT_COLUMNS))
        if not skipped.all():
            out[~skipped] = self._transform(measured, **given).to_numpy()
        return out

    def _transform(self, X: Any, tau: Any) -> Any:
        table, values, energies = self._read(X)
        layout, result = self._layout, self._result
        out = np.full((len(values), 4), np.nan)
        if not np.isnan(self.b_):
            cutoffs = None
            if result.has_cutoff and self.cutoff == "shared":
                cutoffs = self._row_cutoffs(table, len(values), tau, None)
            floors = read_floors(table, len(values), self.floor)
            whole = layout.full_shells(read_largest(table, len(values)))
            if floors is not None:
                whole &= layout.resolved_shells(floors)
            intercept, coefficient, log_reference = fit_rows(
                np.where(whole, energies, 0.0),
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
        if isinstance(table.energies, pd.DataFrame):
            index = table.energies.index
            return pd.DataFrame(out, index=index, columns=list(OUTPUT_COLUMNS))
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

    def score_samples(self, X: Any, *, tau: Any = None, name: Any = None) -> np.ndarray:
        """Mean log-likelihood per unit ln λ of each row's energy in the window.

        Σ w_i E_fit[ln f | shell i ∩ window] / Σ w_i, with f the fitted density of the row's tau and
        name, which integrates to 1 over ``window_``. A tau between fitted ones gets a κ
        interpolated in tau; one before the first or after the last gets the κ of that end, without
        a warning, so far outside the score says little. A name that was not fitted, or none, gets
        the mean κ of all names. With ``cutoff="shared"`` κ = K τ everywhere.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_rows, n_shells)
            Same columns as in ``fit``.
        tau : array-like of shape (n_rows,), optional
            Needed for an array where several taus were fitted.
        name : sequence of shape (n_rows,), optional
            By default the frame's names.

        Returns
        -------
        ndarray of shape (n_rows,)
            NaN for a row without energy in the window or of a skipped snapshot, and where b is
            NaN.
        """
        check_is_fitted(self)
        measured, given, skipped = without_skipped(X, tau=tau, name=name)
        if skipped is None:
            return self._score_samples(X, tau, name)
        out = np.full(len(skipped), np.nan)
        if not skipped.all():
            out[~skipped] = self._score_samples(measured, **given)
        return out

    def _score_samples(self, X: Any, tau: Any, name: Any) -> np.ndarray:
        table, values, energies = self._read(X)
        if np.isnan(self.b_):
            return np.full(len(values), np.nan)
        cutoffs = self._row_cutoffs(table, len(values), tau, name)
        return score_rows(energies, self._layout, self.window_, self.b_, cutoffs)

    def score(
        self,
        X: Any,
        y: None = None,
        sample_weight: Any = None,
        *,
        tau: Any = None,
        name: Any = None,
    ) -> float:
        """Return the mean of `score_samples` over rows that have energy in the window.

        Parameters
        ----------
        X, tau, name
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
        scores = self.score_samples(X, tau=tau, name=name)
        weights = check_sample_weight(sample_weight, len(scores))
        known = np.isfinite(scores)
        total = weights[known].sum()
        return float((weights[known] * scores[known]).sum() / total) if total > 0 else np.nan

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the columns of `transform`."""
        check_is_fitted(self)
        return np.asarray(OUTPUT_COLUMNS, dtype=object)

    def _read(self, X: Any) -> tuple[ShellTable, np.ndarray, np.ndarray]:
        table = open_table(X)
        values = validate_data(
            self, table.energies, dtype=np.float64, ensure_non_negative=True, reset=False
        )
        return table, values, self._layout.shells_of(values)

    def _row_cutoffs(self, table: ShellTable, n_rows: int, tau: Any, name: Any) -> np.ndarray:
        """κ at the tau and name of each row, from the fit."""
        result = self._result
        if not result.has_cutoff:
            return np.zeros(n_rows)
        fitted = result.frame.dropna(subset="cutoff")
        tau = table.label(TAU) if tau is None else tau
        if tau is None and len(set(fitted[TAU])) > 1:
            raise ValueError(
                "tau must be passed for an X without it, since the fit has a cutoff for each of "
                "several taus; pass one tau per row, or a frame with an index level or column tau."
            )
        taus = np.full(n_rows, fitted[TAU].iloc[0]) if tau is None else check_taus(tau, n_rows)
        if self.cutoff == "shared" and tau is not None:
            return result.shared_cutoff * np.maximum(taus, 0.0)
        mean = fitted.groupby(TAU)["cutoff"].mean()
        cutoffs = np.interp(taus, mean.index, mean)
        names = read_names(table, n_rows, name) if NAME in fitted else None
        for one in () if names is None else set(names) & set(fitted[NAME]):
            own = fitted[fitted[NAME] == one]
            rows = names == one
            cutoffs[rows] = np.interp(taus[rows], own[TAU], own["cutoff"])
        return cutoffs


@dataclass(frozen=True)
class _Fit:
    """The fit of some rows, and where it was made."""

    result: TailEstimate
    window: tuple[float, float]
    units: np.ndarray  # codes of the batches that replicates leave out

    def named(self, name: str) -> NamedSlope:
        """Return what is compared between names."""
        result = self.result
        return NamedSlope(name, result.slopes, self.units, result.interval, result.phrases)


def _fit_curves(
    values: np.ndarray,
    labels: RowLabels,
    layout: ShellLayout,
    window: tuple[float, float] | None,
    cutoff: str,
    confidence: float,
    min_shells: int,
) -> _Fit:
    """Fit one slope to rows, by default in a window of their own."""
    data = collect(values, labels, layout)
    window = choose_window(window, data, layout)
    usable = usable_points(data, layout, window)
    problem = build_problem(data, layout, window, min_shells)
    if problem is None:
        n_shells = usable.sum(axis=1)
        phrases = [TOO_FEW_SHELLS if n_shells.any() else EMPTY_TAIL]
        n_columns = layout.edges.size - 1
        result = no_estimate(data.taus, n_shells, n_columns, phrases, empty_comparison())
        units = np.arange(0)
    else:
        result = estimate_tail(problem, data.taus, cutoff, confidence)
        units = np.asarray(problem.data.units)
    phrases = [*result.phrases]
    n_missing, n_pairs = data.count_missing()
    if n_missing:
        phrases.append(batches_missing(n_missing, n_pairs))
    if holes := count_holes(usable):
        phrases.append(shells_left_empty(holes))
    if data.names is not None:
        result.frame.insert(1, NAME, data.names)
    return _Fit(replace(result, phrases=phrases), window, units)


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
