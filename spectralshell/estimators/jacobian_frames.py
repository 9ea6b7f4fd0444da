"""Frames of the blocks of a Jacobian: one row per snapshot, per pair of blocks, per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spectralshell.estimators.jacobian_measurement import BlockMeasure
from spectralshell.estimators.jacobian_statistics import (
    distances,
    explained_shares,
    fit_decay,
    normalized_coherence,
    null_frame,
)
from spectralshell.shells import toeplitz_residual
from spectralshell.shells.frames import label_index

Floats = NDArray[np.float64]

FEATURES = (
    "jacobian_norm",
    "jacobian_rate",
    "coherence_sum",
    "normalized_sum",
    "coherence_within_band",
    "coherence_within_band_p_value",
    "decay_rate",
    "decay_power",
    "change_within_band",
    "change_within_band_p_value",
    "toeplitz_residual",
    "toeplitz_residual_p_value",
)
"""Columns of the frame with one row per snapshot."""

_SUPREMA = ("jacobian_norm", "jacobian_rate", "coherence_sum", "normalized_sum")


@dataclass(frozen=True)
class NullSettings:
    """How statistics that depend on the order of the blocks are compared with random orders.

    Parameters
    ----------
    band : int
        Distance of blocks that counts as near.
    n_null : int
        Random orders.
    seed : int
        Of the orders.
    """

    band: int
    n_null: int
    seed: int


def scalar_frame(measures: Sequence[BlockMeasure], settings: NullSettings) -> pd.DataFrame:
    """Return one row of scalars per snapshot.

    Parameters
    ----------
    measures : sequence of BlockMeasure
    settings : NullSettings

    Returns
    -------
    DataFrame of float64
        Index levels ``tau``, ``batch`` and, where some snapshot has one, ``name``; columns
        :data:`FEATURES`. A row depends on its own snapshot alone.
    """
    rows = [_scalars(measure, settings) for measure in measures]
    return pd.DataFrame(
        rows, index=label_index(measures), columns=pd.Index(FEATURES), dtype=np.float64
    )


def coherence_frame(measures: Sequence[BlockMeasure]) -> pd.DataFrame:
    """Return one row per snapshot and ordered pair of blocks.

    Parameters
    ----------
    measures : sequence of BlockMeasure

    Returns
    -------
    DataFrame
        ``tau, batch, [name], block, other, depth, other_depth, distance, coherence, normalized,
        uncertainty, influence``. ``influence`` is ‖D_lm‖_F / ‖dM_l‖_F, how much of the rate of the
        kernel of ``block`` the motion of ``other`` makes; it is not symmetric, and the parts may
        cancel.
    """
    blocks = [_pairs(measure) for measure in measures]
    return _labelled(measures, blocks)


def block_frame(measures: Sequence[BlockMeasure], band: int) -> pd.DataFrame:
    """Return one row per snapshot and block.

    Parameters
    ----------
    measures : sequence of BlockMeasure
    band : int

    Returns
    -------
    DataFrame
        ``tau, batch, [name], block, depth, n_parameters, norm, trace_share, coherence_sum, change,
        explained, status``: ‖J_l‖, tr M_l / tr M, Σ_m ‖J_l* J_m‖, ‖dM_l/dt‖_F, and the share of it
        that comes from blocks within the band.
    """
    return _labelled(measures, [_blocks(measure, band) for measure in measures])


def null_frames(measures: Sequence[BlockMeasure], settings: NullSettings) -> pd.DataFrame:
    """Return one row per snapshot and statistic that depends on the order of the blocks.

    Parameters
    ----------
    measures : sequence of BlockMeasure
    settings : NullSettings

    Returns
    -------
    DataFrame
        ``tau, batch, [name]`` and the columns of
        :func:`~spectralshell.estimators.jacobian_statistics.null_frame`.
    """
    return _labelled(measures, [_null(measure, settings) for measure in measures])


def window_frame(measures: Sequence[BlockMeasure], window_blocks: int) -> pd.DataFrame:
    """Return the Toeplitz residual of consecutive blocks, against their depth.

    Parameters
    ----------
    measures : sequence of BlockMeasure
    window_blocks : int
        Blocks of a window; where there are fewer, it holds all.

    Returns
    -------
    DataFrame
        ``tau, batch, [name], first, last`` (positions of the blocks), ``middle`` (depth of the
        window's middle, 0 at the input and 1 at the output) and ``toeplitz_residual``.
    """
    return _labelled(measures, [_windows(measure, window_blocks) for measure in measures])


def trajectory_frame(measures: Sequence[BlockMeasure]) -> pd.DataFrame:
    """Return the norms of every snapshot with its status.

    Parameters
    ----------
    measures : sequence of BlockMeasure

    Returns
    -------
    DataFrame
        ``tau, batch, [name], jacobian_norm`` (1/√τ), ``jacobian_rate`` (the same per τ),
        ``coherence_sum`` (1/τ), ``normalized_sum, direction, direction_norm, status``.
    """
    rows = [
        {
            **_norms(measure),
            "direction": measure.direction,
            "direction_norm": measure.direction_norm,
            "status": measure.status,
        }
        for measure in measures
    ]
    return _labelled(measures, [pd.DataFrame([row]) for row in rows])


def suprema_frame(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the largest norms along each trajectory, one row per batch (and name).

    Parameters
    ----------
    trajectory : DataFrame
        As from :func:`trajectory_frame`.

    Returns
    -------
    DataFrame
        ``batch, [name], n_snapshots``, the suprema over τ of ``jacobian_norm, jacobian_rate,
        coherence_sum, normalized_sum``, and ``tau_of_norm, tau_of_rate``, where the first two are
        reached.
    """
    keys = [key for key in ("batch", "name") if key in trajectory]
    rows = []
    for labels, group in trajectory.groupby(keys, sort=False):
        row: dict[str, Any] = dict(zip(keys, labels, strict=True))
        row["n_snapshots"] = len(group)
        row |= {name: float(group[name].max()) for name in _SUPREMA}
        taus = group["tau"].to_numpy()
        row["tau_of_norm"] = float(taus[group["jacobian_norm"].argmax()])
        row["tau_of_rate"] = float(taus[group["jacobian_rate"].argmax()])
        rows.append(row)
    return pd.DataFrame(rows)


def profile_frame(measures: Sequence[BlockMeasure]) -> pd.DataFrame:
    """Return coherence by distance over all snapshots.

    Parameters
    ----------
    measures : sequence of BlockMeasure
        With the same number of blocks.

    Returns
    -------
    DataFrame
        ``distance, normalized`` (mean over pairs and snapshots), ``normalized_max`` (the envelope),
        ``coherence_max`` (the envelope of ‖J_l* J_m‖, whose sum condition 2 wants bounded) and
        ``n_pairs``.
    """
    apart = distances(len(measures[0].blocks))
    normalized = np.stack([normalized_coherence(m.coherence, m.norms) for m in measures])
    raw = np.stack([measure.coherence for measure in measures])
    rows = []
    for distance in range(len(apart)):
        at = apart == distance
        pairs = int(np.triu(at).sum()) * len(measures)
        rows.append(
            (distance, normalized[:, at].mean(), normalized[:, at].max(), raw[:, at].max(), pairs)
        )
    columns = ["distance", "normalized", "normalized_max", "coherence_max", "n_pairs"]
    return pd.DataFrame(rows, columns=columns)


def _scalars(measure: BlockMeasure, settings: NullSettings) -> dict[str, float]:
    normalized = normalized_coherence(measure.coherence, measure.norms)
    decay = fit_decay(normalized)
    row = {**_norms(measure), "decay_rate": decay.rate, "decay_power": decay.power}
    for _, found in _null(measure, settings).iterrows():
        row[found["statistic"]] = found["observed"]
        row[f"{found['statistic']}_p_value"] = found["p_value"]
    return row


def _norms(measure: BlockMeasure) -> dict[str, float]:
    normalized = normalized_coherence(measure.coherence, measure.norms)
    return {
        "jacobian_norm": measure.jacobian_norm,
        "jacobian_rate": measure.jacobian_rate,
        "coherence_sum": float(measure.coherence.sum(axis=1).max()),
        "normalized_sum": float(normalized.sum(axis=1).max()),
    }


def _null(measure: BlockMeasure, settings: NullSettings) -> pd.DataFrame:
    normalized = normalized_coherence(measure.coherence, measure.norms)
    return null_frame(
        normalized,
        measure.gram,
        band=settings.band,
        n_null=settings.n_null,
        seed=settings.seed,
    )


def _pairs(measure: BlockMeasure) -> pd.DataFrame:
    n = len(measure.blocks)
    rows, columns = np.divmod(np.arange(n * n), n)
    parts = np.sqrt(np.maximum(np.einsum("lmm->lm", measure.gram), 0.0))
    change = _changes(measure)[:, None]
    influence = np.divide(parts, change, out=np.zeros_like(parts), where=change > 0.0)
    names = np.array(measure.blocks, dtype=object)
    return pd.DataFrame(
        {
            "block": names[rows],
            "other": names[columns],
            "depth": rows,
            "other_depth": columns,
            "distance": np.abs(rows - columns),
            "coherence": measure.coherence.ravel(),
            "normalized": normalized_coherence(measure.coherence, measure.norms).ravel(),
            "uncertainty": measure.uncertainty.ravel(),
            "influence": influence.ravel(),
        }
    )


def _blocks(measure: BlockMeasure, band: int) -> pd.DataFrame:
    total = measure.traces.sum()
    change = _changes(measure)
    zero, frozen = measure.norms == 0.0, change == 0.0
    return pd.DataFrame(
        {
            "block": np.array(measure.blocks, dtype=object),
            "depth": np.arange(len(measure.blocks)),
            "n_parameters": measure.block_sizes,
            "norm": measure.norms,
            "trace_share": measure.traces / total if total > 0.0 else np.zeros_like(change),
            "coherence_sum": measure.coherence.sum(axis=1),
            "change": change,
            "explained": explained_shares(measure.gram, band),
            "status": np.where(zero, "zero kernel", np.where(frozen, "frozen kernel", "ok")),
        }
    )


def _windows(measure: BlockMeasure, window_blocks: int) -> pd.DataFrame:
    normalized = normalized_coherence(measure.coherence, measure.norms)
    n = len(normalized)
    width = min(window_blocks, n)
    rows = []
    for first in range(n - width + 1):
        window = slice(first, first + width)
        middle = (first + (width - 1) / 2) / (n - 1) if n > 1 else 0.5
        residual = toeplitz_residual(normalized[window, window])
        rows.append((first, first + width - 1, middle, residual))
    return pd.DataFrame(rows, columns=["first", "last", "middle", "toeplitz_residual"])


def _changes(measure: BlockMeasure) -> Floats:
    squares = np.maximum(measure.gram.sum(axis=(1, 2)), 0.0)
    return np.asarray(np.sqrt(squares))


def _labelled(measures: Sequence[BlockMeasure], frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Put the labels of snapshots before the columns of their frames."""
    lengths = [len(frame) for frame in frames]
    labels = label_index(measures).repeat(lengths).to_frame(index=False)
    return pd.concat([labels, pd.concat(frames, ignore_index=True)], axis=1)


__all__ = [
    "FEATURES",
    "NullSettings",
    "block_frame",
    "coherence_frame",
    "null_frames",
    "profile_frame",
    "scalar_frame",
    "suprema_frame",
    "trajectory_frame",
    "window_frame",
]
