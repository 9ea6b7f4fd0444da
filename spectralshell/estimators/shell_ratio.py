"""Choosing the shell ratio q from a grid search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


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
