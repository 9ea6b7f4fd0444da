"""Cross-validation of the tail slope."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, check_cv
from sklearn.pipeline import Pipeline

from spectralshell.estimators.tail_data import is_wide_frame, label_codes
from spectralshell.parameter_checks import check_integer

FOLD_COLUMNS = ("fold", "b", "b_lower", "b_upper", "score", "n_train", "n_test")
# With more groups than this, leave-one-group-out costs more fits than it tells.
MAX_LEFT_OUT = 10
DEFAULT_FOLDS = 5


def cross_validate_exponent(
    estimator: Any,
    X: Any,
    *,
    cv: Any = None,
    groups: Any = None,
    n_jobs: int | None = None,
) -> pd.DataFrame:
    """Fit the tail slope on part of the data and score it on the rest, fold by fold.

    Parameters
    ----------
    estimator : GRSDTailFitter or Pipeline that ends in one
        Cloned for every fold; never changed.
    X : DataFrame, ndarray or list of Snapshot
        A wide frame of shell energies, an array, or snapshots for a Pipeline.
    cv : int, cross-validator or iterable, optional
        By default one group is left out at a time, or five folds over groups where there are more
        than ten. An integer of at least 2 gives so many folds over groups.
    groups : sequence of shape (n_rows,), optional
        Hashable labels, tuples too. By default the batches of the snapshots or of the frame's
        index: the batches are the independent units, snapshots of one batch at several taus or
        under several names are not. Rows of an array are their own groups.
    n_jobs : int, optional
        Folds fitted in parallel.

    Returns
    -------
    DataFrame
        One row per fold: ``fold, b, b_lower, b_upper, score, n_train, n_test``. The interval is
        that of the fold's own fit. A fit that could not be made gives NaN.

    Raises
    ------
    TypeError
        If the estimator does not fit a tail slope, or ``cv`` is a boolean.
    ValueError
        If ``groups`` has another length than X or a missing label, ``cv`` is an integer below 2,
        or there are fewer groups than folds.

    Notes
    -----
    Costs one fit per fold; snapshots remember their spectral measures, so a Pipeline multiplies by
    the kernel once per snapshot whatever the number of folds. Folds share most of their batches:
    the spread of ``b`` over them is smaller than the uncertainty that ``b_interval_`` gives.

    Examples
    --------
    >>> from spectralshell.datasets.synthetic import make_grsd_spectra
    >>> from spectralshell.estimators.tail_fit import GRSDTailFitter
    >>> from spectralshell.shells import ShellPartition, energy_frame
    >>> measures = make_grsd_spectra(1.5, K=0, n_batches=4, random_state=0)
    >>> X = energy_frame(measures, ShellPartition.covering(1e-3, 0.9, q=2.0))
    >>> folds = cross_validate_exponent(GRSDTailFitter(), X)
    >>> len(folds), bool((abs(folds["b"] - 1.5) < 0.1).all())
    (4, True)
    """
    _check_estimator(estimator)
    n_rows = len(X)
    codes = label_codes("groups", _find_groups(X, n_rows) if groups is None else groups, n_rows)
    splitter = _choose_splitter(cv, len(np.unique(codes)))
    with warnings.catch_warnings():
        # Batches are offered to every splitter; one that does not use groups may say so to no one.
        warnings.filterwarnings("ignore", message="The groups parameter is ignored")
        folds = list(splitter.split(np.zeros(n_rows), None, codes))
    rows = Parallel(n_jobs=n_jobs)(
        delayed(_evaluate)(clone(estimator), _take(X, train), _take(X, test))
        for train, test in folds
    )
    return pd.DataFrame([(fold, *row) for fold, row in enumerate(rows)], columns=list(FOLD_COLUMNS))


def _evaluate(estimator: Any, train: Any, test: Any) -> tuple[float, ...]:
    estimator.fit(train)
    fitter = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    lower, upper = fitter.b_interval_
    return fitter.b_, lower, upper, estimator.score(test), len(train), len(test)


def _check_estimator(estimator: Any) -> None:
    last = estimator.steps[-1][1] if isinstance(estimator, Pipeline) else estimator
    needed = ("fit", "score_samples", "inverse_transform")
    if isinstance(last, type) or not all(hasattr(last, name) for name in needed):
        raise TypeError(
            "estimator must be a GRSDTailFitter or a Pipeline that ends in one, got "
            f"{estimator!r}; add GRSDTailFitter() as the last step."
        )


def _find_groups(X: Any, n_rows: int) -> Any:
    if is_wide_frame(X) and "batch" in X.index.names:
        return X.index.get_level_values("batch")
    if isinstance(X, pd.DataFrame | np.ndarray):
        return range(n_rows)
    # Tuples (model, inputs, targets) have their position for a batch.
    return [getattr(item, "batch", position) for position, item in enumerate(X)]


def _choose_splitter(cv: Any, n_groups: int) -> Any:
    if cv is None:
        return LeaveOneGroupOut() if n_groups <= MAX_LEFT_OUT else GroupKFold(DEFAULT_FOLDS)
    if isinstance(cv, Integral):
        return GroupKFold(n_splits=check_integer("cv", cv, low=2))
    return check_cv(cv)


def _take(X: Any, rows: np.ndarray) -> Any:
    if isinstance(X, pd.DataFrame):
        return X.iloc[rows]
    if isinstance(X, np.ndarray):
        return X[rows]
    return [X[row] for row in rows]
