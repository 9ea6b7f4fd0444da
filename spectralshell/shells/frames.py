"""Pandas frames of shell energies: a tidy one with bounds, a wide one to fit, and their files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Protocol, TypeVar

import numpy as np
import pandas as pd

from spectralshell.shells.carriers import FLOOR, LAMBDA_MAX
from spectralshell.shells.measure import SMALLEST_RATE, Floats, SpectralMeasure
from spectralshell.shells.partition import NULL, ShellPartition
from spectralshell.statuses import (
    ABOVE_LAST_EDGE,
    BELOW_FIRST_EDGE,
    BELOW_FLOOR,
    WIDE_BOUNDS,
    join_statuses,
    negative_rates,
)

UNRESOLVED = "unresolved"

_MIXED = "spectralshell_mixed_labels"


class Labelled(Protocol):
    """A measure of one snapshot, with the snapshot's labels."""

    @property
    def tau(self) -> float:
        """Effective training time."""

    @property
    def batch(self) -> int | str:
        """Label of the batch."""

    @property
    def name(self) -> str | None:
        """Label of the run or model."""


_M = TypeVar("_M", bound=Labelled)


def shell_frame(measures: Sequence[SpectralMeasure], partition: ShellPartition) -> pd.DataFrame:
    """Return the tidy frame: one row per snapshot and shell, with bounds and statuses.

    Parameters
    ----------
    measures : sequence of SpectralMeasure
        One per snapshot, with distinct (tau, batch, name).
    partition : ShellPartition

    Returns
    -------
    DataFrame
        Columns ``tau, batch, [name], shell, lambda_lo, lambda_hi, lambda_mid, energy,
        energy_lower, energy_upper, dissipation, density, amplitude_density, cumulative, n_ritz,
        resolved, status``; ``name`` only where some measure has one. Each snapshot begins with the
        row ``null`` (below the operator's noise, so indistinguishable from outside the range of
        M) and the row ``unresolved`` (from there to the first edge); together they are the column
        ``null`` of `energy_frame`. ``cumulative`` is the energy below ``lambda_hi``, and for the
        last shell everything. Rows of one snapshot do not depend on the others.

    Raises
    ------
    ValueError
        If there is no measure, or two have the same labels.

    Notes
    -----
    ``energy_lower`` and ``energy_upper`` are certified where the measure's bounds are. A shell is
    ``resolved`` if it begins at or above the measure's floor and its bounds are no further apart
    than its energy; ``unresolved`` never is, ``null`` is for counted measures. An empty shell of a
    Lanczos measure has an upper bound at rounding and is not resolved. ``status`` says why not,
    whether the last shell holds energy above its edge, how many nodes are negative, and what the
    measure itself reports.

    Examples
    --------
    >>> measure = SpectralMeasure([0.2, 3.0], [0.25, 0.5], total=0.75, lambda_max=3.0, floor=0.1,
    ...                           noise=1e-9)
    >>> frame = shell_frame([measure], ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=2))
    >>> frame[["shell", "energy", "status"]].values.tolist()
    [['null', 0.0, 'ok'], ['unresolved', 0.25, 'below the first edge'],
     ['shell[1.0,2.0)', 0.0, 'ok'], ['shell[2.0,4.0)', 0.5, 'ok']]
    """
    listed = _check_measures(measures)
    blocks = [_snapshot_columns(measure, partition) for measure in listed]
    columns = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    rows = partition.n_shells + 2
    labels: dict[str, Any] = {
        level: values.repeat(rows) for level, values in _label_columns(listed).items()
    }
    labels["shell"] = [NULL, UNRESOLVED, *partition.names] * len(listed)
    frame = pd.DataFrame(labels | columns)
    frame.attrs = _attributes(listed)
    return frame


def energy_frame(measures: Sequence[SpectralMeasure], partition: ShellPartition) -> pd.DataFrame:
    """Return the wide frame: one row per snapshot, one column per shell, values E_α.

    Parameters
    ----------
    measures : sequence of SpectralMeasure
        One per snapshot, with distinct (tau, batch, name).
    partition : ShellPartition

    Returns
    -------
    DataFrame of float64
        Index levels ``tau``, ``batch``, where some measure has one ``name`` (``""`` for those
        without), and each measure's own ``lambda_max`` and ``resolution_floor``, which so survive
        every file and every way to put frames together. Columns ``null`` and the names of the
        shells. Every row sums to ½‖e‖². ``attrs`` hold the largest ``resolution_floor`` and
        ``lambda_max`` among the measures.

    Raises
    ------
    ValueError
        If there is no measure, or two have the same labels.

    Examples
    --------
    >>> measure = SpectralMeasure([3.0], [0.5], total=0.5, lambda_max=3.0, floor=0.1, noise=1e-9)
    >>> frame = energy_frame([measure], ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=2))
    >>> frame.columns.tolist(), frame.to_numpy().tolist()
    (['null', 'shell[1.0,2.0)', 'shell[2.0,4.0)'], [[0.0, 0.0, 0.5]])
    """
    listed = _check_measures(measures)
    energies = np.stack([measure.energies(partition.edges) for measure in listed])
    columns = pd.Index([NULL, *partition.names])
    levels = label_index(listed).to_frame(index=False)
    levels[LAMBDA_MAX] = [float(measure.lambda_max) for measure in listed]
    levels[FLOOR] = [float(measure.floor) for measure in listed]
    frame = pd.DataFrame(energies, index=pd.MultiIndex.from_frame(levels), columns=columns)
    frame.attrs = _attributes(listed)
    return frame


def label_index(measures: Sequence[Labelled]) -> pd.MultiIndex:
    """Return the index of frames with a row per snapshot: ``tau, batch`` and any ``name``."""
    labels = _label_columns(_check_measures(measures))
    return pd.MultiIndex.from_arrays(list(labels.values()), names=list(labels))


def average_over_batches(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the mean energies over batches: energies are averaged, never their logarithms.

    Parameters
    ----------
    frame : DataFrame
        A wide frame of `energy_frame`, with an index level ``batch``.

    Returns
    -------
    DataFrame
        The same columns; the index is ``tau``, or ``tau`` and ``name``, in the order of first
        appearance. ``attrs`` hold the largest ``lambda_max`` and ``resolution_floor`` of the rows.

    Raises
    ------
    ValueError
        If the index has no level ``batch``, or no other level.

    Examples
    --------
    >>> index = pd.MultiIndex.from_tuples([(1.0, 0), (1.0, 1)], names=["tau", "batch"])
    >>> frame = pd.DataFrame({"null": [1.0, 3.0]}, index=index)
    >>> average_over_batches(frame)["null"].to_dict()
    {1.0: 2.0}
    """
    levels = list(frame.index.names)
    known = [level for level in (LAMBDA_MAX, FLOOR) if level in levels]
    kept = [level for level in levels if level not in ("batch", *known)]
    if "batch" not in levels or not kept:
        raise ValueError(
            f"frame must have the index levels tau and batch, got {levels!r}; pass the frame that "
            "energy_frame or ShellEnergyEstimator.transform gives."
        )
    averaged = frame.groupby(level=kept, sort=False, dropna=False).mean()
    largest = {level: float(frame.index.get_level_values(level).max()) for level in known}
    averaged.attrs = dict(frame.attrs) | largest
    return averaged


def write_frame(frame: pd.DataFrame, path: str | PathLike[str]) -> None:
    """Write a frame to a parquet file from which `read_frame` restores it exactly.

    Parameters
    ----------
    frame : DataFrame
        Any frame of this package. Batch labels may be integers, strings, or both.
    path : str or path-like
        File to write; an existing one is replaced.

    See Also
    --------
    read_frame : Also gives a doctest of the round trip.
    """
    named = [str(name) for name in frame.index.names if name is not None]
    levels = [name for name in named if _is_mixed(frame.index.get_level_values(name))]
    columns = [str(column) for column in frame.columns if _is_mixed(frame[column])]
    stored = _map_labels(frame, levels, columns, json.dumps)
    if levels or columns:  # parquet columns have one type, so mixed labels travel as JSON
        stored.attrs[_MIXED] = {"levels": levels, "columns": columns}
    stored.to_parquet(path, engine="pyarrow")


def read_frame(path: str | PathLike[str]) -> pd.DataFrame:
    """Read a frame that `write_frame` wrote, or any other parquet file.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    DataFrame
        With its index, dtypes, ``attrs`` and every float as they were.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a parquet file.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> measure = SpectralMeasure([3.0], [0.1], total=0.1, lambda_max=3.0, floor=0.1, noise=1e-9,
    ...                           batch="a")
    >>> frame = energy_frame([measure], ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "energies.parquet"
    ...     write_frame(frame, path)
    ...     back = read_frame(path)
    >>> back.equals(frame), back.attrs == frame.attrs
    (True, True)
    """
    try:
        frame = pd.read_parquet(path, engine="pyarrow")
    except ValueError as error:
        raise ValueError(
            f"path {str(path)!r} is not a parquet file that can be read ({error}); write it again."
        ) from error
    mixed = frame.attrs.pop(_MIXED, None)
    if mixed is None:
        return frame
    return _map_labels(frame, mixed["levels"], mixed["columns"], json.loads)


def _check_measures(measures: Sequence[_M]) -> list[_M]:
    listed = list(measures)
    if not listed:
        raise ValueError("measures is empty; pass at least one.")
    labels = Counter((measure.tau, measure.batch, measure.name) for measure in listed)
    repeated = [label for label, count in labels.items() if count > 1]
    if repeated:
        raise ValueError(
            f"measures hold the labels (tau, batch, name) = {repeated[0]!r} more than once; give "
            "every snapshot its own batch or name."
        )
    return listed


def _label_columns(measures: Sequence[Labelled]) -> dict[str, np.ndarray[Any, Any]]:
    batches = [measure.batch for measure in measures]
    numbers = all(isinstance(batch, int) for batch in batches)
    columns: dict[str, np.ndarray[Any, Any]] = {
        "tau": np.array([measure.tau for measure in measures], dtype=np.float64),
        "batch": np.array(batches, dtype=np.int64 if numbers else object),
    }
    if any(measure.name is not None for measure in measures):
        columns["name"] = np.array([measure.name or "" for measure in measures], dtype=object)
    return columns


def _attributes(measures: list[SpectralMeasure]) -> dict[Any, Any]:
    return {
        "resolution_floor": max(measure.floor for measure in measures),
        "lambda_max": max(measure.lambda_max for measure in measures),
    }


def _snapshot_columns(
    measure: SpectralMeasure, partition: ShellPartition
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the value columns of one snapshot, rows null, unresolved and the shells."""
    edges = partition.edges
    # The boundary between null and unresolved; at the first edge, unresolved is empty.
    split = min(max(measure.noise, SMALLEST_RATE), edges[0])
    limits = np.concatenate([[split], edges])
    lower, mid, upper = _cumulative_with_split(measure, split, edges)
    below = np.append(mid[:-1], measure.total)
    energy = measure.energies(limits) if measure.counted else np.diff(below, prepend=0.0)
    energy_lower = np.maximum(np.append(lower[:-1], measure.total) - np.append(0.0, upper[:-1]), 0)
    energy_upper = np.append(upper[:-1], measure.total) - np.append(0.0, lower[:-1])
    starts = np.append(0.0, limits[:-1])
    widths = limits - starts
    # Null holds λ = 0, and unresolved may have no width: there is no density then.
    has_density = (widths > 0.0) & (starts > 0.0)
    density = np.divide(energy, widths, out=np.full(energy.size, np.nan), where=has_density)
    resolved = (starts >= measure.floor) & (energy_upper - energy_lower <= energy)
    resolved[0], resolved[1] = measure.counted, False
    return {
        "lambda_lo": starts,
        "lambda_hi": limits,
        "lambda_mid": np.append([np.nan, np.sqrt(split) * np.sqrt(edges[0])], partition.midpoints),
        "energy": energy,
        "energy_lower": np.minimum(energy_lower, energy),
        "energy_upper": np.maximum(energy_upper, energy),
        "dissipation": measure.dissipation(limits),
        "density": density,
        "amplitude_density": np.sqrt(2.0 * density),
        "cumulative": below,
        "n_ritz": measure.counts(limits),
        "resolved": resolved,
        "status": np.array(_statuses(measure, starts, energy, energy_upper - energy_lower, limits)),
    }


def _cumulative_with_split(
    measure: SpectralMeasure, split: float, edges: Floats
) -> tuple[Floats, Floats, Floats]:
    # The split is clipped to the first edge, so that it changes nothing at the edges themselves.
    at_edges = measure.cumulative(edges)
    lower, mid, upper = (
        np.append(np.minimum(low, high[0]), high)
        for low, high in zip(measure.cumulative([split]), at_edges, strict=True)
    )
    return lower, mid, upper


def _statuses(
    measure: SpectralMeasure,
    starts: Floats,
    energy: Floats,
    spread: Floats,
    limits: Floats,
) -> list[str]:
    phrases: list[list[str]] = [[measure.status] for _ in starts]
    for row in range(2, len(phrases)):
        if starts[row] < measure.floor:
            phrases[row].append(BELOW_FLOOR)
        if spread[row] > energy[row]:
            phrases[row].append(WIDE_BOUNDS)
    if measure.total > 0.0 and _holds_overflow(measure, limits[-1:]):
        phrases[-1].append(ABOVE_LAST_EDGE)
    if energy[1] > 0.0:
        phrases[1].append(BELOW_FIRST_EDGE)
    if measure.n_negative:
        within = bool(-measure.nodes[0] <= measure.noise)
        exact = measure.solver == "exact"
        phrases[0].append(negative_rates(measure.n_negative, exact=exact, within_noise=within))
    return [join_statuses(parts) for parts in phrases]


def _holds_overflow(measure: SpectralMeasure, last_edge: Floats) -> bool:
    above = measure.weights[measure.nodes >= last_edge[0]].sum() > 0.0
    return bool(above or (not measure.counted and measure.cumulative(last_edge)[2] < measure.total))


def _is_mixed(labels: pd.Index[Any] | pd.Series[Any]) -> bool:
    return labels.dtype == object and len({type(label) for label in labels}) > 1


def _map_labels(
    frame: pd.DataFrame, levels: list[str], columns: list[str], function: Callable[[Any], Any]
) -> pd.DataFrame:
    mapped = frame.copy(deep=False)
    mapped.attrs = dict(frame.attrs)
    for column in columns:
        values = [function(value) for value in frame[column]]
        mapped[column] = pd.Series(values, index=frame.index, dtype=object)
    if levels:
        labels = frame.index.to_frame(index=False)
        for name in levels:
            labels[name] = pd.Series([function(value) for value in labels[name]], dtype=object)
        single = len(frame.index.names) == 1
        mapped.index = pd.Index(labels[levels[0]]) if single else pd.MultiIndex.from_frame(labels)
    return mapped
