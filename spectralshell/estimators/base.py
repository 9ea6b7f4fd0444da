"""The base of all estimators on lists of snapshots: checks, settings, measures, callbacks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin

from spectralshell.estimators.skipped import ON_ERROR, Measured
from spectralshell.measurements.cache import Measurement, measure_each, resolve_memory
from spectralshell.measurements.keys import hash_by_what_runs
from spectralshell.parameter_checks import check_option
from spectralshell.snapshots import Snapshot, as_snapshots, warn_of_other_data

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn < 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for the mixin of scikit-learn 1.9."""

    def with_callbacks(method: Any) -> Any:
        """Return the method as it is."""
        return method


@contextmanager
def unchanged_on_failure(estimator: Any) -> Iterator[None]:
    """Leave an estimator as it was where what is done inside fails or is interrupted."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


_STACKLEVEL = 3
"""From here over a method of an estimator to the caller's line."""


class SnapshotEstimator(CallbackSupportMixin, TransformerMixin, BaseEstimator):
    """An estimator whose samples are snapshots, each measured once.

    A subclass says how to measure, by its parameters, and what it makes of the measures.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Let a Pipeline with memory= see what an estimator's callables run."""
        super().__init_subclass__(**options)
        hash_by_what_runs(cls)

    def fit_transform(self: Any, X: Sequence[Any], y: Any = None) -> pd.DataFrame:
        """Fit and transform the same snapshots, each measured once.

        Parameters
        ----------
        X : list of Snapshot
            Training snapshots.
        y : None
            Ignored.

        Returns
        -------
        DataFrame
            As from `transform`.
        """
        # Tuples become snapshots once, so that the second step finds what the first remembered.
        snapshots = as_snapshots(X)
        return self.fit(snapshots).transform(snapshots)

    def __sklearn_tags__(self) -> Any:
        """Return the tags: X is a list of snapshots, nothing for scikit-learn to validate."""
        tags = super().__sklearn_tags__()
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        return tags

    @abstractmethod
    def _check_parameters(self) -> None:
        """Check the constructor's parameters; the message names a wrong one."""

    @abstractmethod
    def _gather(self) -> Measurement:
        """Return how to measure, from checked parameters."""

    @abstractmethod
    def _set_results(self, measures: list[Any]) -> None:
        """Set what the estimator makes of the measures of the training snapshots."""

    @with_callbacks
    def _fit(self, X: Sequence[Any]) -> list[Any]:
        """Check, gather, measure, set the results, and return the measures."""
        snapshots = as_snapshots(X)
        self._check_parameters()
        check_option("on_error", self.on_error, ON_ERROR)
        warn_of_other_data(snapshots)
        # What is fitted keeps it, whatever is set later, where `transform` measures by it.
        self._measurement = self._gather()
        with _FitTasks(self, snapshots).running() as tasks:
            measured = self._measure(snapshots, tasks.one_done)
            measures = measured.measures
            self.skipped_ = measured.skipped()
            self.n_skipped_ = len(self.skipped_)
            self._set_results(measures)
        measured.warn(stacklevel=_STACKLEVEL + 1)
        solvers = {m.solver for m in measures}
        self.solver_ = solvers.pop() if len(solvers) == 1 else "mixed"
        rows = [{"tau": m.tau, "batch": m.batch} | (m.plan or {}) for m in measures]
        rows += [{"tau": f.tau, "batch": f.batch} for f in measured.failures]
        self.plan_ = pd.DataFrame(rows)
        self.n_matvecs_ = sum(m.n_matvecs for m in measures)
        self.dynamics_exact_ = all(m.dynamics_exact for m in measures)
        return measures

    def _measure(
        self,
        snapshots: list[Snapshot],
        on_done: Callable[[], None] = lambda: None,
        measurement: Measurement | None = None,
    ) -> Measured:
        """Measure snapshots through the cache, by default as they were in ``fit``."""
        results = measure_each(
            snapshots,
            self._measurement if measurement is None else measurement,
            memory=resolve_memory(self.memory),
            n_jobs=self.n_jobs,
            verbose=self.verbose,
            on_done=on_done,
            on_error=self.on_error,
        )
        return Measured(results)

    def _measure_new(self, X: Sequence[Any], measurement: Measurement | None = None) -> Measured:
        """Measure snapshots that a method was given, and warn of those that are skipped."""
        measured = self._measure(as_snapshots(X), measurement=measurement)
        measured.warn(stacklevel=_STACKLEVEL)
        return measured


class _FitTasks:
    """One callback task per snapshot, under the root task of ``fit``."""

    def __init__(self, estimator: Any, X: list[Snapshot]) -> None:
        self.estimator = estimator
        self.X = X
        start = getattr(estimator, "_init_callback_context", None)
        self.context = start(max_subtasks=len(X)) if start is not None else None

    @contextmanager
    def running(self) -> Iterator[_FitTasks]:
        """Report the beginning and the end of ``fit``."""
        if self.context is not None:
            self.context.call_on_fit_task_begin(estimator=self.estimator, X=self.X)
        yield self
        if self.context is not None:
            self.context.call_on_fit_task_end(estimator=self.estimator, X=self.X)

    def one_done(self) -> None:
        """Report that one more snapshot has been measured."""
        if self.context is None:
            return
        task = self.context.subcontext(task_name="snapshot")
        task.call_on_fit_task_begin(estimator=self.estimator, X=self.X)
        task.call_on_fit_task_end(estimator=self.estimator, X=self.X)
