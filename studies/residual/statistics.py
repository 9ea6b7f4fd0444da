"""What is read off the couplings of one cell: a network, a time and a residual, all its batches.

Shell couplings are averaged over the batches before a statistic is taken of them; intervals are
the jackknife over batches. Every statistic is taken of the gradient flow, of the random
directions, and of the gradient flow with the normalised entries of V permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from spectralshell.shells import (
    ShellPartition,
    SoftShells,
    intra_inter_ratio,
    permutation_p_value,
    permuted_couplings,
    shell_balance,
    shell_coupling,
    toeplitz_residual,
)
from spectralshell.shells.diagonal_scaling import fit_line, log_sizes
from spectralshell.shells.toeplitz_matrix import most_central, sliding_windows
from studies.residual.measuring import Coupled

Floats = NDArray[np.float64]

Q = 2.0
WINDOW_SHELLS = 6
MIN_MODES = 3
N_PERMUTATIONS = 99

FROM_COUPLINGS = (
    "toeplitz", "toeplitz_centre", "toeplitz_edge", "edge_minus_centre", "toeplitz_raw",
    "ratio", "slope", "r2", "signed_slope", "signed_r2",
)  # fmt: skip
FROM_TRANSFER = ("near_share", "far_share", "transfer")
STATISTICS = (*FROM_COUPLINGS, *FROM_TRANSFER)


@dataclass(frozen=True, eq=False)
class Couplings:
    """Shell couplings of one batch along one direction, or of a stack of directions.

    Parameters
    ----------
    scaled, raw : ndarray of shape (..., n_shells, n_shells)
        Mean squares of V_uv / √(λ_u λ_v), and of V_uv.
    signed : ndarray of shape (..., n_shells)
        Mean of V_uu.
    """

    scaled: Floats
    raw: Floats
    signed: Floats


def analyse_cell(batches: Sequence[Coupled], *, seed: int = 0) -> dict[str, Any]:
    """Return all statistics of a cell, with intervals and nulls.

    Parameters
    ----------
    batches : sequence of Coupled
        At least one; intervals need two.
    seed : int, default=0
        Of the permutations.

    Returns
    -------
    dict
        ``"statistics"``: name → value, lower, upper, and under ``random`` and ``permuted`` the
        values under the nulls, with the p-value that small ones have; ``"shells"``: λ of the
        shells and K, ``"windows"``: residual by window, with the nulls' medians.
    """
    partition = ShellPartition.covering(
        max(batch.floor for batch in batches),
        max(float(batch.eigenvalues[-1]) for batch in batches),
        q=Q,
    )
    log_lambda = _log_lambda(batches, partition)
    flow = [_couplings(b, b.flow, partition) for b in batches]
    random = [_couplings(b, b.random, partition) for b in batches]
    permuted = [_permuted(b, partition, seed + i) for i, b in enumerate(batches)]
    transfers = [_transfers(b, b.flow, partition) for b in batches]
    random_transfers = [np.array([_transfers(b, V, partition) for V in b.random]) for b in batches]
    found = {}
    for position, name in enumerate(FROM_COUPLINGS):

        def take(some: Sequence[Couplings], position: int = position) -> Any:
            return _from_couplings(_mean(some), log_lambda)[position]

        found[name] = _entry(take, flow, take(random), take(permuted))
    for position, name in enumerate(FROM_TRANSFER):

        def mean(some: Sequence[Any], position: int = position) -> Any:
            return np.mean([np.asarray(one)[..., position] for one in some], axis=0)

        found[name] = _entry(mean, transfers, mean(random_transfers), None)
    return {
        "statistics": found,
        "shells": _shell_rows(_mean(flow), log_lambda),
        "coupling": _listed(_mean(flow).scaled),
        "windows": _window_rows(_mean(flow), _mean(random), _mean(permuted), partition),
        "n_shells": int(np.isfinite(log_lambda).sum()),
        "n_modes": int(min((b.eigenvalues >= b.floor).sum() for b in batches)),
        "lambda_max": float(np.mean([b.eigenvalues[-1] for b in batches])),
    }


def analyse_step(batch: Coupled) -> dict[str, float]:
    """Return the statistics of one batch along its gradient flow, without intervals and nulls."""
    partition = ShellPartition.covering(batch.floor, float(batch.eigenvalues[-1]), q=Q)
    flow = _couplings(batch, batch.flow, partition)
    values = _from_couplings(flow, _log_lambda([batch], partition))
    return {name: float(value) for name, value in zip(FROM_COUPLINGS, values, strict=True)}


def jackknife(
    statistic: Callable[[Sequence[Any]], float], items: Sequence[Any], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return a statistic and its jackknife interval, which is infinite for a single item."""
    value = float(statistic(items))
    n = len(items)
    if n < 2:
        return value, -np.inf, np.inf
    without = [float(statistic([*items[:i], *items[i + 1 :]])) for i in range(n)]
    error = np.sqrt((n - 1) / n * np.sum((np.array(without) - np.mean(without)) ** 2))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1) * error)
    return value, value - half, value + half


def _entry(
    statistic: Callable[[Sequence[Any]], Any],
    flow: Sequence[Any],
    random: Floats,
    permuted: Floats | None,
) -> dict[str, Any]:
    value, lower, upper = jackknife(statistic, flow)
    entry = {"value": value, "lower": lower, "upper": upper, "random": _listed(random)}
    if permuted is not None:
        entry["permuted"] = np.nanquantile(permuted, [0.025, 0.5, 0.975]).tolist()
        entry["p_low"] = permutation_p_value(value, permuted)
        entry["p_high"] = permutation_p_value(-value, -np.asarray(permuted))
    return entry


def _couplings(batch: Coupled, V: Floats, partition: ShellPartition) -> Couplings:
    rates = batch.eigenvalues
    options: dict[str, Any] = {"min_modes": MIN_MODES, "mask": rates >= batch.floor}
    scaled = shell_coupling(V, rates, partition, normalization="sqrt", **options)
    raw = shell_coupling(V, rates, partition, normalization="raw", **options)
    drifts = np.diagonal(V, axis1=-2, axis2=-1)
    return Couplings(np.asarray(scaled), np.asarray(raw), _by_shell(batch, drifts, partition))


def _permuted(batch: Coupled, partition: ShellPartition, seed: int) -> Couplings:
    """Couplings with the entries of V / √(λλ) in random places.

    Raw couplings follow to the accuracy of a shell's λ: permuted entries no longer have one of
    their own.
    """
    scaled = permuted_couplings(
        batch.flow,
        batch.eigenvalues,
        partition,
        n_null=N_PERMUTATIONS,
        generator=np.random.default_rng(seed),
        min_modes=MIN_MODES,
        mask=batch.eigenvalues >= batch.floor,
    )
    rates = np.exp(_log_lambda([batch], partition))
    drifts = np.diagonal(batch.flow) / np.abs(batch.eigenvalues)
    known = np.flatnonzero(batch.eigenvalues >= batch.floor)
    generator = np.random.default_rng(seed + 1_000)
    moved = np.tile(drifts, (N_PERMUTATIONS, 1))
    moved[:, known] = generator.permuted(moved[:, known], axis=1)
    return Couplings(
        scaled,
        scaled * rates[:, None] * rates,
        _by_shell(batch, moved, partition) * rates,
    )


def _by_shell(batch: Coupled, values: Floats, partition: ShellPartition) -> Floats:
    """Return means over the modes of each shell, NaN where there are too few."""
    shells = partition.index(batch.eigenvalues)
    used = (shells >= 0) & (batch.eigenvalues >= batch.floor)
    member = (shells[used, None] == np.arange(partition.n_shells)).astype(float)
    counts = member.sum(axis=0)
    sums = values[..., used] @ member
    enough = counts >= MIN_MODES
    return np.where(enough, sums / np.where(enough, counts, 1.0), np.nan)


def _log_lambda(batches: Sequence[Coupled], partition: ShellPartition) -> Floats:
    logs = [
        _by_shell(b, np.log(np.maximum(b.eigenvalues, np.finfo(float).tiny)), partition)
        for b in batches
    ]
    return _known_mean(np.stack(logs))


def _mean(some: Sequence[Couplings]) -> Couplings:
    parts = ([getattr(one, name) for one in some] for name in ("scaled", "raw", "signed"))
    return Couplings(*(_known_mean(np.stack(part)) for part in parts))


def _known_mean(stack: Floats) -> Floats:
    known = np.isfinite(stack)
    counts = known.sum(axis=0)
    sums = np.where(known, stack, 0.0).sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _from_couplings(found: Couplings, log_lambda: Floats) -> tuple[Any, ...]:
    """Return the statistics `FROM_COUPLINGS`, one value for each matrix of a stack."""
    usable = np.isfinite(log_lambda)
    windows = sliding_windows(usable, WINDOW_SHELLS)
    centre = windows[most_central(windows)].shells
    edge = windows[0].shells
    at_centre = toeplitz_residual(found.scaled[..., centre, centre])
    at_edge = toeplitz_residual(found.scaled[..., edge, edge])
    # The root of the mean square: a kernel that moves in proportion to itself has slope 1.
    inner = np.sqrt(np.diagonal(found.raw, axis1=-2, axis2=-1))
    line, signed = (
        fit_line(log_lambda, log_sizes(inner)),
        fit_line(log_lambda, log_sizes(found.signed)),
    )
    return (
        toeplitz_residual(found.scaled),
        at_centre,
        at_edge,
        at_edge - at_centre,
        toeplitz_residual(found.raw),
        intra_inter_ratio(found.scaled),
        line.slope,
        line.r2,
        signed.slope,
        signed.r2,
    )


def _transfers(batch: Coupled, V: Floats, partition: ShellPartition) -> tuple[float, ...]:
    """Return the statistics `FROM_TRANSFER`: what the error energy does, not V alone."""
    balance = shell_balance(
        batch.eigenvalues, batch.amplitudes, batch.error_rates, V, SoftShells(partition)
    )
    shares = balance.share_by_distance
    between = float(np.abs(np.triu(balance.pair_flux, 1)).sum())
    lost = float(np.abs(balance.dissipation).sum())
    near, far = float(shares[:1].sum()), float(shares[1:].sum())
    total = near + far
    return near / total, far / total, between / lost


def _shell_rows(found: Couplings, log_lambda: Floats) -> list[dict[str, float]]:
    inner = np.sqrt(np.diagonal(found.raw))
    return [
        {"lambda": float(np.exp(x)), "rms": float(y), "signed": float(s)}
        for x, y, s in zip(log_lambda, inner, found.signed, strict=True)
        if np.isfinite(x)
    ]


def _window_rows(
    flow: Couplings, random: Couplings, permuted: Couplings, partition: ShellPartition
) -> list[dict[str, float]]:
    rows = []
    usable = np.isfinite(np.diagonal(flow.scaled))
    for position, window in enumerate(sliding_windows(usable, WINDOW_SHELLS)):
        part = (..., window.shells, window.shells)
        null = toeplitz_residual(permuted.scaled[part])
        edges = partition.edges
        rows.append(
            {
                "position": position,
                "centrality": window.centrality,
                "lambda_lo": float(edges[window.first]),
                "lambda_hi": float(edges[window.stop]),
                "toeplitz": float(toeplitz_residual(flow.scaled[part])),
                "raw": float(toeplitz_residual(flow.raw[part])),
                "random": float(np.median(toeplitz_residual(random.scaled[part]))),
                "permuted_low": float(np.quantile(null, 0.025)),
                "permuted": float(np.median(null)),
                "permuted_high": float(np.quantile(null, 0.975)),
            }
        )
    return rows


def _listed(values: Any) -> list[Any]:
    return np.asarray(values, dtype=float).tolist()
