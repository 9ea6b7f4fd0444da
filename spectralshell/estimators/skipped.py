"""Snapshots that could not be measured: who was left out, and their rows in frames."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from spectralshell.measurements.cache import Failure
from spectralshell.snapshots import label_of
from spectralshell.statuses import skipped
from spectralshell.warning_categories import SnapshotWarning

ON_ERROR = ("raise", "skip")

_LABELS = ["tau", "batch", "name"]


@dataclass(frozen=True)
class Measured:
    """What measuring snapshots gave, in their order: a measure of each, or a failure."""

    results: Sequence[Any]

    @property
    def measures(self) -> list[Any]:
        """The measures that there are; where there is none, the first failure is raised."""
        found = [result for result in self.results if not isinstance(result, Failure)]
        if not found:
            raise self.failures[0].error
        return found

    @property
    def failures(self) -> list[Failure]:
        """The failures, in the order of the snapshots."""
        return [result for result in self.results if isinstance(result, Failure)]

    def kept(self, weights: np.ndarray) -> np.ndarray:
        """Return those of some numbers, one a snapshot, that belong to the measures."""
        failed = [isinstance(result, Failure) for result in self.results]
        return weights[np.logical_not(failed)]

    def warn(self, stacklevel: int) -> None:
        """Warn once (SnapshotWarning) of all snapshots that were left out."""
        if self.failures:
            warnings.warn(
                f"{len(self.failures)} of {len(self.results)} snapshots were skipped: "
                + "; ".join(str(failure.error) for failure in self.failures),
                SnapshotWarning,
                stacklevel=stacklevel + 1,
            )

    def skipped(self) -> pd.DataFrame:
        """Return who was left out, and why: one row for each failure, ``tau`` to ``status``."""
        rows = pd.DataFrame(
            [(f.tau, f.batch, f.name or "") for f in self.failures], columns=_LABELS
        )
        rows["status"] = [skipped(_reason(failure)) for failure in self.failures]
        return rows if rows["name"].any() else rows.drop(columns="name")

    def with_rows(self, wide: pd.DataFrame) -> pd.DataFrame:
        """Return a frame of one row a measure with rows of NaN where there is none."""
        if not self.failures:
            return wide
        left_out = np.array([isinstance(result, Failure) for result in self.results])
        kept, missing = wide.index.to_frame(index=False), self.skipped().drop(columns="status")
        labels = pd.concat([kept, missing.reindex(columns=_all_labels(kept, missing))])
        if "name" in labels:
            labels = labels.fillna({"name": ""})[_all_labels(kept, missing)]
        order = np.argsort(np.concatenate([np.flatnonzero(~left_out), np.flatnonzero(left_out)]))
        frame = wide.reset_index(drop=True).reindex(range(len(order)))
        frame.index = pd.MultiIndex.from_frame(labels)
        found = frame.iloc[order]
        found.attrs = dict(wide.attrs)
        return found


def with_skipped(tidy: pd.DataFrame, left_out: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Return a tidy frame with the rows of `Measured.skipped`, which have ``values`` beside.

    What they have not is NaN, or False in a column that tells yes or no.
    """
    if left_out.empty:
        return tidy
    columns = _all_labels(tidy, left_out)
    rows = left_out.assign(**values).reindex(columns=columns)
    for column, dtype in tidy.dtypes.items():
        if pd.api.types.is_bool_dtype(dtype):
            rows[column] = False
    found = pd.concat([tidy.reindex(columns=columns).astype(object), rows.astype(object)])
    found = found.reset_index(drop=True).infer_objects()
    found.attrs = dict(tidy.attrs)
    return found.fillna({"name": ""}) if "name" in found else found


def _all_labels(frame: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """Return the columns of a frame, with ``name`` in its place where only the rows have it."""
    columns = [str(column) for column in frame]
    if "name" in rows and "name" not in columns:
        columns.insert(columns.index("batch") + 1, "name")
    return columns


def _reason(failure: Failure) -> str:
    """Return the first clause of an error, without the snapshot that it begins with."""
    text = str(failure.error) or type(failure.error).__name__
    label = label_of(failure.tau, failure.batch, failure.name)
    return text.splitlines()[0].removeprefix(f"{label}: ").split("; ")[0]
