"""What all transformers of lists of snapshots have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from sklearn.base import TransformerMixin

from spectralshell.snapshots import as_snapshots


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


__all__ = ["SnapshotTransformerMixin"]
