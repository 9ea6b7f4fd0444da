"""The base of all transformers of lists of snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pandas as pd
from sklearn.base import TransformerMixin

from spectralshell.snapshots import as_snapshots

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn < 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for the mixin of scikit-learn 1.9."""

    def with_callbacks(method: Any) -> Any:
        """Stand in for the decorator: a frame between caller and method, for warnings to count."""

        @wraps(method)
        def called(estimator: Any, *args: Any, **options: Any) -> Any:
            return method(estimator, *args, **options)

        return called


class FitTasks:
    """One callback task per snapshot, under the root task of ``fit``.

    Parameters
    ----------
    estimator : estimator
        The estimator being fitted.
    X : list of Snapshot
        Its training data, one subtask each.
    """

    def __init__(self, estimator: Any, X: list[Any]) -> None:
        self.estimator = estimator
        self.X = X
        start = getattr(estimator, "_init_callback_context", None)
        self.context = start(max_subtasks=len(X)) if start is not None else None

    @contextmanager
    def running(self) -> Iterator[FitTasks]:
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


class SnapshotTransformerMixin(TransformerMixin):
    """Fit and transform on one list, measured once; no validation of X as an array."""

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
