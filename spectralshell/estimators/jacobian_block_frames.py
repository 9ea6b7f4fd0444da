"""Frames of the blocks of a Jacobian, and the statistics in them: sums, decay, bands, nulls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spectralshell.measurements.blocks import BlockMeasure
from spectralshell.shells import toeplitz_residual
from spectralshell.shells.frames import label_index
from spectralshell.statuses import (
    CHANGES_CANCEL,
    FROZEN_KERNEL,
    OK,
    ZERO_KERNEL,
    few_block_orders,
    few_random_orders,
)

Floats = NDArray[np.float64]

_NULL_INTERVAL = (5.0, 95.0)
"""Percentiles of a null that are reported."""

_LEVEL = 0.05

_CANCELLED = 1e-11
"""Part of the squares of changes by blocks that rounding may leave of their sum, in float32 too."""

_SCATTER = 1e-12
"""Deviation of coherences, at most 1, that is rounding."""

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
    """How statistics that depend on the order of the blocks are compared with random orders."""

    band: int  # distance of blocks that counts as near
    n_null: int  # random orders
    seed: int  # of the orders


def scalar_frame(measures: Sequence[BlockMeasure], settings: NullSettings) -> pd.DataFrame:
    """Return one row of scalars, `FEATURES`, per snapshot; it depends on no other snapshot."""
    rows = [_scalars(measure, settings) for measure in measures]
    return pd.DataFrame(
        rows, index=label_index(measures), columns=pd.Index(FEATURES), dtype=np.float64
    )


def coherence_frame(measures: Sequence[BlockMeasure]) -> pd.DataFrame:
    """Return one row per snapshot and ordered pair of blocks.

    ``influence``, ‖D_lm‖_F / ‖dM_l‖_F, is not symmetric, and parts of dM_l may cancel.
    """
    blocks = [_pairs(measure) for measure in measures]
    return _labelled(measures, blocks)


def block_frame(measures: Sequence[BlockMeasure], band: int) -> pd.DataFrame:
    """Return one row per snapshot and block: ‖J_l‖, tr M_l / tr M, Σ_m ‖J_l* J_m‖, ‖dM_l/dt‖_F.

    ``explained`` is the share of that change that comes from blocks within the band.
    """
    return _labelled(measures, [_blocks(measure, band) for measure in measures])


def null_frames(measures: Sequence[BlockMeasure], settings: NullSettings) -> pd.DataFrame:
    """Return the rows of `null_frame` for every snapshot."""
    return _labelled(measures, [_null(measure, settings) for measure in measures])


def window_frame(measures: Sequence[BlockMeasure], window_blocks: int) -> pd.DataFrame:
    """Return the Toeplitz residual of consecutive blocks, against the depth of their middle.

    It is 0 at the input and 1 at the output. With fewer than ``window_blocks`` one window has all.
    """
    return _labelled(measures, [_windows(measure, window_blocks) for measure in measures])


def trajectory_frame(measures: Sequence[BlockMeasure]) -> pd.DataFrame:
    """Return the norms of every snapshot with its status."""
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
    """Return the largest norms along each trajectory, and the τ where ‖J‖ and ‖dJ/dt‖ have them."""
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
    """Return coherence by distance over all snapshots, which have as many blocks.

    ``coherence_max`` is the envelope of ‖J_l* J_m‖, whose sum condition 2 wants bounded.
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
    # Of blocks that are orthogonal but for rounding there is no logarithm.
    known = measure.coherence > measure.uncertainty
    decay = fit_decay(np.where(known, normalized, 0.0))
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
    unknown = np.where(parts > 0.0, np.nan, 0.0)
    influence = np.divide(parts, change, out=unknown, where=change > 0.0)
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
    cancelled = frozen & measure.gram.any(axis=(1, 2))
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
            "status": np.select(
                [zero, cancelled, frozen], [ZERO_KERNEL, CHANGES_CANCEL, FROZEN_KERNEL], OK
            ),
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
    return np.asarray(np.sqrt(_whole(measure.gram)))


def _whole(gram: Floats) -> Floats:
    """Return ‖Σ_m D_lm‖² for each block l, 0 where the parts cancel but for rounding."""
    squares = gram.sum(axis=(1, 2))
    return np.where(squares > _CANCELLED * np.abs(gram).sum(axis=(1, 2)), squares, 0.0)


def _labelled(measures: Sequence[BlockMeasure], frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Put the labels of snapshots before the columns of their frames."""
    lengths = [len(frame) for frame in frames]
    labels = label_index(measures).repeat(lengths).to_frame(index=False)
    return pd.concat([labels, pd.concat(frames, ignore_index=True)], axis=1)


@dataclass(frozen=True)
class Decay:
    """How fast coherence falls with the distance of blocks."""

    rate: float  # 1/ξ of c ∝ exp(−d/ξ), per block; NaN where fewer than two distances have pairs
    power: float  # p of c ∝ d^−p; in a chain without end, p > 1 is summable
    rate_r2: float  # of ln c
    power_r2: float


def distances(n: int) -> NDArray[np.int64]:
    """Return |l − m| for all pairs of n blocks."""
    position = np.arange(n)
    return np.abs(position[:, None] - position)


def normalized_coherence(coherence: Floats, norms: Floats) -> Floats:
    """Return ‖J_l* J_m‖ / (‖J_l‖ ‖J_m‖), exactly 1 for a block with itself; 0 where one is zero."""
    scale = np.outer(norms, norms)
    shares = np.divide(coherence, scale, out=np.zeros_like(scale), where=scale > 0.0)
    # √x · √x rounds to another number than x.
    np.fill_diagonal(shares, scale.diagonal() > 0.0)
    return np.asarray(np.minimum(shares, 1.0))


def within_band(matrix: Floats, band: int) -> float:
    """Return the share of the sum of a matrix at distances up to ``band``; NaN where it is zero."""
    total = float(matrix.sum())
    near = float(matrix[distances(len(matrix)) <= band].sum())
    return near / total if total > 0.0 else float("nan")


def fit_decay(normalized: Floats) -> Decay:
    """Fit an exponential and a power law to the coherence of all pairs of different blocks.

    Least squares in ln c, one point for each pair that has coherence.
    """
    rows, columns = np.triu_indices(len(normalized), 1)
    values, gaps = normalized[rows, columns], (columns - rows).astype(float)
    there = values > 0.0
    if len(np.unique(gaps[there])) < 2:
        return Decay(*[float("nan")] * 4)
    logs = np.log(values[there])
    rate, rate_r2 = _slope(gaps[there], logs)
    power, power_r2 = _slope(np.log(gaps[there]), logs)
    return Decay(-rate, -power, rate_r2, power_r2)


def explained_shares(gram: Floats, band: int, order: NDArray[np.int64] | None = None) -> Floats:
    """Return 1 − ‖Σ_{m outside} D_lm‖² / ‖Σ_m D_lm‖² for each block l; NaN where nothing changes.

    ``gram`` holds ⟨D_lm, D_lm'⟩, (L, L, L); inside is up to ``band`` from l, by depths ``order``.
    """
    outside, whole = _parts(gram, band, order)
    return np.asarray(
        1.0 - np.divide(outside, whole, out=np.full_like(whole, np.nan), where=whole > 0.0)
    )


def explained_share(gram: Floats, band: int, order: NDArray[np.int64] | None = None) -> float:
    """Return the share of all blocks together, each counted by its change; NaN without change."""
    outside, whole = _parts(gram, band, order)
    total = float(whole.sum())
    return 1.0 - float(outside.sum()) / total if total > 0.0 else float("nan")


def observed_statistics(
    normalized: Floats, gram: Floats, band: int, order: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """Return the statistics that depend on the order of the blocks, their depths ``order``."""
    place = np.arange(len(normalized)) if order is None else order
    back = np.argsort(place)
    moved = normalized[np.ix_(back, back)]
    return {
        "toeplitz_residual": float(toeplitz_residual(moved)),
        "coherence_within_band": within_band(moved, band),
        "change_within_band": explained_share(gram, band, order),
    }


def null_frame(
    normalized: Floats, gram: Floats, *, band: int, n_null: int, seed: int
) -> pd.DataFrame:
    """Compare the statistics that depend on depth with those of the blocks in random order.

    Small residuals and large shares are good; measures with as many blocks have the same orders.
    """
    n = len(normalized)
    observed = observed_statistics(normalized, gram, band)
    rng = np.random.default_rng(seed)
    draws = [observed_statistics(normalized, gram, band, rng.permutation(n)) for _ in range(n_null)]
    rows = []
    for name, value in observed.items():
        null = np.array([draw[name] for draw in draws])
        sign = -1.0 if name == "toeplitz_residual" else 1.0
        # Rounding must not tell an order from its mirror image.
        as_good = sign * null >= sign * value - 1e-12 * max(abs(value), 1.0)
        known = np.isfinite(value) and n_null > 0
        lower, median, upper = (
            np.percentile(null, [_NULL_INTERVAL[0], 50.0, _NULL_INTERVAL[1]])
            if known
            else (np.nan,) * 3
        )
        p_value = (1 + as_good.sum()) / (1 + n_null) if known else np.nan
        status = _null_status(n, n_null) if known else OK
        rows.append((name, value, median, lower, upper, p_value, status))
    columns = ["statistic", "observed", "null_median", "null_lower", "null_upper", "p_value"]
    return pd.DataFrame(rows, columns=[*columns, "status"])


def _null_status(n_blocks: int, n_null: int) -> str:
    # An order and its mirror image are alike, so about 2 of L! orders are as good as the best.
    lowest = 2.0 / factorial(n_blocks)
    if lowest > _LEVEL:
        return few_block_orders(min(lowest, 1.0), n_blocks)
    if 1.0 / (1 + n_null) > _LEVEL:
        return few_random_orders(1.0 / (1 + n_null))
    return OK


def profile_score(
    snapshots: Sequence[tuple[Floats, Floats]],
    weights: Floats,
    profile: Floats,
    n_pairs: Floats,
) -> float:
    """Return the R² of predicting coherence from distance rather than by a constant, at most 1.

    Snapshots are pairs of coherence and norms. 0 where the constant is exact, NaN without weight.
    """
    if not weights.sum() > 0.0:
        return float("nan")
    apart = distances(len(profile))
    different = np.triu(apart > 0)
    known = n_pairs[1:].sum()
    constant = 0.0
    if known > 0.0:
        # From the first distance on: the mean of equal numbers is that number, to the last bit.
        first = float(profile[1])
        constant = first + float((profile[1:] - first) @ n_pairs[1:] / known)
    predicted = profile[apart]
    by_distance = by_constant = rounding = 0.0
    for (coherence, norms), weight in zip(snapshots, weights, strict=True):
        found = normalized_coherence(coherence, norms)
        by_distance += weight * float(((found - predicted)[different] ** 2).sum())
        by_constant += weight * float(((found - constant)[different] ** 2).sum())
        rounding += weight * float(different.sum()) * _SCATTER**2
    return float(1.0 - by_distance / by_constant) if by_constant > rounding else 0.0


def _parts(gram: Floats, band: int, order: NDArray[np.int64] | None) -> tuple[Floats, Floats]:
    place = np.arange(len(gram)) if order is None else order
    far = (np.abs(place[:, None] - place) > band).astype(float)
    outside = np.einsum("lm,lmk,lk->l", far, gram, far)
    whole = _whole(gram)
    return np.where(whole > 0.0, np.maximum(outside, 0.0), 0.0), whole


def _slope(x: Floats, y: Floats) -> tuple[float, float]:
    centred, heights = x - x.mean(), y - y.mean()
    slope = float(centred @ heights / (centred @ centred))
    spread = float(heights @ heights)
    rest = heights - slope * centred
    return slope, 1.0 - float(rest @ rest) / spread if spread > 0.0 else 1.0
