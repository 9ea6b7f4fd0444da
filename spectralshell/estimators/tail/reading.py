"""Reading what a tail fit is given: shells from columns or edges, and the labels of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from spectralshell.parameter_checks import check_real
from spectralshell.shells.carriers import (
    BATCH,
    FLOOR,
    LAMBDA_MAX,
    NAME,
    TAU,
    ShellTable,
    as_frame,
    skipped_rows,
)
from spectralshell.shells.carriers import open_table as open_any_table
from spectralshell.snapshots import Snapshot

# Edges that agree to this relative precision are the same edge.
EDGE_TOLERANCE = 1e-9

MAX_DEFAULT_SHELLS = 1000

_TIDY = {"tau", "shell", "lambda_lo", "lambda_hi", "energy"}

_NUMBERED = re.compile(r"(.*?)(\d+)")

_REMEDIES = {
    TAU: "or tau=, one entry per row",
    BATCH: "or batch=, one entry per row",
    FLOOR: "or set floor= of the fitter (0 where every shell is resolved)",
}


@dataclass(frozen=True)
class ShellLayout:
    """What the columns of X are: shells between increasing positive edges, ``null`` before them."""

    edges: np.ndarray  # (n_shells + 1,)
    has_null: bool

    @property
    def widths(self) -> np.ndarray:
        """Shell widths."""
        return np.diff(self.edges)

    def shells_of(self, values: np.ndarray) -> np.ndarray:
        """Return the columns of ``values`` that are shells."""
        return values[:, 1:] if self.has_null else values

    def whole_shells(self, window: tuple[float, float]) -> np.ndarray:
        """Return which shells lie in the window, as booleans."""
        lower, upper = self.edges[:-1], self.edges[1:]
        return (lower >= window[0] * (1.0 - EDGE_TOLERANCE)) & (
            upper <= window[1] * (1.0 + EDGE_TOLERANCE)
        )

    def resolved_shells(self, floors: np.ndarray) -> np.ndarray:
        """Return which shells begin at or above each floor, shape (n_floors, n_shells)."""
        return self.edges[:-1] >= floors[:, None] * (1.0 - EDGE_TOLERANCE)

    def full_shells(self, largest: np.ndarray) -> np.ndarray:
        """Return which shells hold what they are named after, shape (n_largest, n_shells).

        The shell of λ_max is half empty; a λ_max above the last edge makes the last overfull.
        """
        upper = self.edges[1:]
        full = upper <= largest[:, None] * (1.0 + EDGE_TOLERANCE)
        full[:, -1] &= ~((upper[-1] * (1.0 + EDGE_TOLERANCE) < largest) & np.isfinite(largest))
        return full


@dataclass(frozen=True)
class RowLabels:
    """Labels of the rows of X."""

    taus: np.ndarray
    batches: np.ndarray  # codes of the independent units
    names: np.ndarray | None  # None where rows have none
    floors: np.ndarray  # resolution floors, absolute λ; 0 where none is known
    largest: np.ndarray  # largest eigenvalues; inf where none is known

    def take(self, rows: np.ndarray) -> RowLabels:
        """Return the labels of some rows."""
        names = None if self.names is None else self.names[rows]
        return RowLabels(
            self.taus[rows], self.batches[rows], names, self.floors[rows], self.largest[rows]
        )

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a row of each (name, tau), by increasing name and tau, and the curve of each row.

        Every curve has an amplitude and a cutoff of its own.
        """
        keys = pd.DataFrame({TAU: self.taus})
        if self.names is not None:
            keys.insert(0, NAME, self.names)
        which = keys.groupby(list(keys.columns), sort=True).ngroup().to_numpy()
        return np.unique(which, return_index=True)[1], which


def open_table(X: Any) -> ShellTable:
    """Take X apart; raise if it is what an earlier step takes, or has one row per shell."""
    if isinstance(X, (list, tuple)) and any(isinstance(item, Snapshot) for item in X):
        raise TypeError(
            "X holds snapshots, expected a frame of shell energies; put a ShellEnergyEstimator "
            "before this step, as in make_pipeline(ShellEnergyEstimator(), GRSDTailFitter())."
        )
    frame = as_frame(X)
    if isinstance(frame, pd.DataFrame) and set(frame.columns) >= _TIDY:
        raise ValueError(
            "X is a tidy frame with one row per shell, expected one row per snapshot; pass "
            "transform(X) of the ShellEnergyEstimator, not shells_."
        )
    if not isinstance(frame, pd.DataFrame):
        _refuse_no_numbers(frame)
    table = open_any_table(frame)
    if table.named:
        _refuse_gaps(table.energies)
    # Where X has no index, the labels are what tells rows of a result apart.
    return replace(table, energies=table.by_label()) if frame is not X and table.labels else table


def _refuse_no_numbers(X: Any) -> None:
    """Raise for text and objects, in words that name X; arrays are left to scikit-learn."""
    if sparse.issparse(X) or (isinstance(X, np.ndarray) and X.dtype.kind not in "OUS"):
        return
    try:
        np.asarray(X, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"X must hold energies, one row of numbers per snapshot: {error}") from error


def without_skipped(X: Any, **labels: Any) -> tuple[Any, dict[str, Any], np.ndarray | None]:
    """Return X and labels without the rows of skipped snapshots, and which those are, if any."""
    skipped = skipped_rows(X)
    if skipped is None:
        return X, labels, None
    measured = ~skipped

    def kept(values: Any) -> Any:
        # Labels of another length are refused later.
        fits = values is not None and np.ndim(values) > 0 and len(values) == len(skipped)
        return [v for v, known in zip(values, measured, strict=True) if known] if fits else values

    return as_frame(X)[measured], {key: kept(v) for key, v in labels.items()}, skipped


def _refuse_gaps(energies: pd.DataFrame) -> None:
    rows, columns = np.nonzero(energies.isna().to_numpy())
    if rows.size:
        raise ValueError(
            f"X holds NaN in column {energies.columns[columns[0]]!r}, row {rows[0]}: frames with "
            "other shells put together leave such gaps; transform all snapshots with one fitted "
            "ShellEnergyEstimator."
        )


def read_layout(table: ShellTable, n_columns: int, edges: Any) -> ShellLayout:
    """Read shells from a frame's columns, or from ``edges``, or take ratio 2 for an array.

    Edges must agree with a frame's columns.
    """
    if table.named:
        _check_agreement(edges, table.edges)
        return ShellLayout(table.edges, table.has_null)
    return ShellLayout(check_edges(edges, n_columns), False)


def refuse_foreign_names(table: ShellTable, edges: Any) -> None:
    """Raise where columns name no shells, unless edges do or their names only count them."""
    if table.named or edges is not None or not isinstance(table.energies, pd.DataFrame):
        return
    columns = list(table.energies.columns)
    matches = [_NUMBERED.fullmatch(str(column)) for column in columns]
    numbers = [int(match[2]) for match in matches if match]
    steps = {after - before for before, after in pairwise(numbers)} | {1}
    prefixes = {match[1] for match in matches if match}
    if len(numbers) < len(columns) or len(prefixes) > 1 or steps != {1}:
        foreign = next((c for c, match in zip(columns, matches, strict=True) if not match), None)
        raise ValueError(
            f"X has the column {columns[0] if foreign is None else foreign!r}, which names no "
            "shell; pass the frame of ShellEnergyEstimator.transform (columns null and "
            "shell[lo,hi)), or set edges= if the columns are consecutive shells."
        )


def _check_agreement(edges: Any, found: np.ndarray) -> None:
    if edges is None:
        return
    given = check_edges(edges, found.size - 1)
    if not np.allclose(given, found, rtol=EDGE_TOLERANCE, atol=0.0):
        raise ValueError(
            f"edges contradict the columns of X, whose shells run from {found[0]!r} to "
            f"{found[-1]!r}; leave edges out, since a frame's columns name its shells."
        )


def check_edges(edges: Any, n_columns: int) -> np.ndarray:
    """Return the edges of consecutive shells, or raise if they are not one more than columns."""
    if edges is None:
        if n_columns > MAX_DEFAULT_SHELLS:
            raise ValueError(
                f"X has {n_columns} columns, too many for consecutive shells of ratio 2; pass "
                "edges with one more entry than columns."
            )
        return 2.0 ** np.arange(n_columns + 1)
    try:
        array = np.asarray(edges, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"edges must be numbers, one more than X has columns: {error}.") from error
    if array.ndim != 1 or array.size != n_columns + 1:
        raise ValueError(
            f"edges must have one more entry than X has columns ({n_columns}), got shape "
            f"{array.shape}; pass the lower edge of every shell and the last upper edge."
        )
    if not np.isfinite(array).all() or array[0] <= 0 or (np.diff(array) <= 0).any():
        raise ValueError(
            "edges must be finite, positive and strictly increasing; sort the shells by their "
            "lower edge, columns of X alike."
        )
    return array


def read_labels(
    table: ShellTable,
    n_rows: int,
    *,
    tau: Any = None,
    batch: Any = None,
    name: Any = None,
    floor: Any = None,
) -> RowLabels:
    """Return the labels of rows: those given, else the table's; one of shells must have some."""
    tau = table.label(TAU) if tau is None else tau
    batch = table.label(BATCH) if batch is None else batch
    if table.named:
        _refuse_missing({TAU: tau, BATCH: batch}, table)
    taus = np.zeros(n_rows) if tau is None else check_taus(tau, n_rows)
    names = read_names(table, n_rows, name)
    floors = read_floors(table, n_rows, floor)
    if table.named and floors is None:
        _refuse_missing({FLOOR: None}, table)
    floors = np.zeros(n_rows) if floors is None else floors
    largest = read_largest(table, n_rows)
    if batch is None:
        keys = [taus] if names is None else [names, taus]
        codes = pd.Series(taus).groupby(keys).cumcount().to_numpy()
        return RowLabels(taus, independent_units(codes, names), names, floors, largest)
    codes = label_codes("batch", batch, n_rows)
    shown = [""] * n_rows if names is None else names
    repeated = pd.DataFrame({"tau": taus, "batch": codes, "name": shown}).duplicated()
    if repeated.any():
        row = int(np.flatnonzero(repeated)[0])
        raise ValueError(
            f"X has two rows with tau={taus[row]!r}, batch={list(batch)[row]!r} and "
            f"name={shown[row]!r}; give every row its own, or average repeated measurements first."
        )
    return RowLabels(taus, independent_units(codes, names), names, floors, largest)


def independent_units(batches: np.ndarray, names: np.ndarray | None) -> np.ndarray:
    """Return codes of what is left out together: a batch at all taus, of all names it serves."""
    # A label means the same probe data where all names have the same labels, else it is a name's.
    if names is None:
        return batches
    if len(set(pd.Series(batches).groupby(names).agg(frozenset))) == 1:
        return batches
    return pd.DataFrame({NAME: names, BATCH: batches}).groupby([NAME, BATCH]).ngroup().to_numpy()


def read_names(table: ShellTable, n_rows: int, name: Any = None) -> np.ndarray | None:
    """Return the name of each row as text, None where no row has one."""
    name = table.label(NAME) if name is None else name
    if name is None:
        return None
    try:
        label_codes("name", name, n_rows)
    except ValueError as error:
        if table.label(NAME) is None:
            raise
        raise ValueError(
            f"{error} Readers of CSV take names such as NA and null for missing: "
            "read_csv(..., keep_default_na=False)."
        ) from error
    names = np.array([str(label) for label in name], dtype=object)
    return names if any(names) else None


def read_floors(table: ShellTable, n_rows: int, floor: Any = None) -> np.ndarray | None:
    """Return the resolution floor of each row, None where none is known."""
    if floor is not None:
        return np.full(n_rows, check_real("floor", floor, low=0.0))
    return table.label(FLOOR)


def read_largest(table: ShellTable, n_rows: int) -> np.ndarray:
    """Return the largest eigenvalue of each row, inf where none is known."""
    largest = table.label(LAMBDA_MAX)
    return np.full(n_rows, np.inf) if largest is None else largest


def _refuse_missing(labels: dict[str, Any], table: ShellTable) -> None:
    for label, values in labels.items():
        if values is None:
            raise ValueError(
                f"X names shells, but has no {label}, neither in its index {_levels(table)} nor "
                "among its columns; pass the frame of ShellEnergyEstimator.transform with its "
                "index (reset_index() carries it as columns; averages lose it, and so does polars "
                f"output of a pipeline), {_REMEDIES[label]}."
            )


def _levels(table: ShellTable) -> list[Any]:
    return list(table.energies.index.names)


def assumptions(
    table: ShellTable, *, tau: Any, batch: Any, floor: Any, edges: Any, window: Any
) -> list[str]:
    """Return what a fit takes for granted that neither X nor the arguments told."""
    told = {
        "tau 0": (tau, table.label(TAU)),
        "each row of a tau a batch": (batch, table.label(BATCH)),
        "no resolution floor": (floor, table.label(FLOOR)),
        "a full last shell": (window, table.label(LAMBDA_MAX)),
        "shells of ratio 2 from 1": (edges, table.named or None),
    }
    return [what for what, by in told.items() if all(value is None for value in by)]


def check_taus(tau: Any, n_rows: int) -> np.ndarray:
    """Return effective times as numbers, one per row, or raise."""
    try:
        taus = np.asarray(tau, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"tau must hold numbers, one for each row of X: {error}.") from error
    if taus.shape != (n_rows,):
        raise ValueError(
            f"tau must have one entry per row of X ({n_rows}), got shape {taus.shape}."
        )
    if not np.isfinite(taus).all():
        raise ValueError("tau holds NaN or infinity, expected finite effective times.")
    return taus


def label_codes(name: str, labels: Any, n_rows: int) -> np.ndarray:
    """Return an integer code for each hashable label; one that is missing is refused."""
    if getattr(labels, "ndim", 1) != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {np.shape(labels)}.")
    if isinstance(labels, str | bytes) or not isinstance(labels, Iterable):
        raise TypeError(
            f"{name} must be a sequence of labels, one per row of X, got {type(labels).__name__}."
        )
    labels = list(labels)
    if len(labels) != n_rows:
        raise ValueError(f"{name} must have one entry per row of X ({n_rows}), got {len(labels)}.")
    codes = pd.factorize(_as_objects(labels))[0]
    if (codes < 0).any():
        row = int(np.flatnonzero(codes < 0)[0])
        raise ValueError(
            f"{name} is missing ({labels[row]}) in row {row} of X; label every row, or drop it."
        )
    return codes


def _as_objects(labels: list[Any]) -> np.ndarray:
    # A list of tuples would become a two-dimensional array.
    objects = np.empty(len(labels), dtype=object)
    for position, label in enumerate(labels):
        objects[position] = label
    return objects
