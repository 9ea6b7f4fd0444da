"""Cross-validation of the tail slope, and the choice of the shell ratio q."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, check_cv
from sklearn.pipeline import Pipeline

from spectralshell.estimators.tail.reading import label_codes, open_table
from spectralshell.parameter_checks import check_integer
from spectralshell.shells.carriers import BATCH, as_frame

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
        A wide frame of shell energies (of pandas, or whatever Arrow reads), an array, or snapshots
        for a Pipeline.
    cv : int, cross-validator or iterable, optional
        By default one group is left out at a time, or five folds over groups where there are more
        than ten. An integer of at least 2 gives so many folds over groups.
    groups : sequence of shape (n_rows,), optional
        Hashable labels, tuples too. By default the batches of the snapshots or of the frame: the
        batches are the independent units, snapshots of one batch at several taus or under several
        names are not. Rows of an array are their own groups.
    n_jobs : int, optional
        Folds fitted in parallel.

    Returns
    -------
    DataFrame
        One row per fold: ``fold, b, b_lower, b_upper, score, n_train, n_test``. The interval is
        that of the fold's own fit, of several names their shared slope. A fit that could not be
        made gives NaN.

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
    >>> from spectralshell import GRSDTailFitter, cross_validate_exponent
    >>> from spectralshell.datasets import make_grsd_spectra
    >>> from spectralshell.shells import ShellPartition, energy_frame
    >>> measures = make_grsd_spectra(1.5, K=0, n_batches=4, random_state=0)
    >>> X = energy_frame(measures, ShellPartition.covering(1e-3, 0.9, q=2.0))
    >>> folds = cross_validate_exponent(GRSDTailFitter(), X)
    >>> len(folds), bool((abs(folds["b"] - 1.5) < 0.1).all())
    (4, True)
    """
    _check_estimator(estimator)
    X = as_frame(X)
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
    if isinstance(X, pd.DataFrame | np.ndarray):
        batches = open_table(X).label(BATCH)
        return range(n_rows) if batches is None else batches
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


def largest_q_within_one_se(cv_results: Mapping[str, Any]) -> int:
    """Index of the largest q whose mean score is within one standard error of the best.

    A ``refit=`` for :class:`sklearn.model_selection.GridSearchCV` over the shell ratio of a
    :class:`~spectralshell.ShellEnergyEstimator`. The score falls slowly on either side of its
    maximum, and the coarsest partition that the data cannot tell from the best one has the least
    noise per shell.

    Parameters
    ----------
    cv_results : mapping
        ``GridSearchCV.cv_results_`` with one parameter ``q`` or ``<step>__q``.

    Returns
    -------
    int
        An index into the candidates.

    Raises
    ------
    ValueError
        If no parameter, or more than one, is a q, if there is one split only, or if every score is
        NaN.

    Notes
    -----
    The standard error is the standard deviation over folds divided by √n_splits. Folds share
    training snapshots, so it is a rule of thumb (Breiman et al., Classification and Regression
    Trees, 1984, section 3.4.3), not a test.

    Examples
    --------
    >>> results = {
    ...     "param_q": [1.5, 2.0, 4.0],
    ...     "mean_test_score": [-1.00, -1.01, -1.50],
    ...     "split0_test_score": [-0.98, -0.99, -1.48],
    ...     "split1_test_score": [-1.02, -1.03, -1.52],
    ... }
    >>> largest_q_within_one_se(results)
    1
    """
    names = [key for key in cv_results if key == "param_q" or key.endswith("__q")]
    if len(names) != 1:
        raise ValueError(
            "cv_results must come from a grid over exactly one parameter q (or <step>__q), "
            f"got {names or 'none'}; search over q alone."
        )
    splits = [
        cv_results[key]
        for key in cv_results
        if key.startswith("split") and key.endswith("_test_score")
    ]
    mean = np.asarray(cv_results["mean_test_score"], dtype=float)
    if np.isnan(mean).all():
        raise ValueError(
            "every score is NaN; the held-out snapshots have no energy inside the window: "
            "widen window= or lower floor=."
        )
    if len(splits) < 2:
        raise ValueError(
            f"cv_results must come from at least two splits, got {len(splits)}: one has no "
            "standard error; pass another cv= to the search."
        )
    best = int(np.nanargmax(mean))
    standard_error = np.std([scores[best] for scores in splits], ddof=1) / np.sqrt(len(splits))
    q = np.asarray(cv_results[names[0]], dtype=float)
    good = np.flatnonzero(mean >= mean[best] - standard_error)
    return int(good[np.argmax(q[good])])
