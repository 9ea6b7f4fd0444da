"""scikit-learn's fit callbacks where the installed version has them, nothing where it has not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

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


__all__ = ["CallbackSupportMixin", "FitTasks", "with_callbacks"]
