"""What is read off the couplings of one cell: a network, a time and a residual, all its batches.

Shell couplings and statistics are those of `ToeplitzDiagnostic`, averaged over the batches before a
statistic is taken of them; intervals are the jackknife over batches. Every statistic is taken of
the gradient flow, of the random directions, and of the gradient flow with the normalised entries
of V permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from spectralshell.estimators.toeplitz_shells import SnapshotShells, place_coupling_shells
from spectralshell.estimators.toeplitz_statistics import ShellSummary
from spectralshell.shells import (
    ShellPartition,
    SoftShells,
    permutation_p_value,
    shell_balance,
    toeplitz_residual,
)
from spectralshell.shells.coupling import CouplingRule
from spectralshell.shells.toeplitz_matrix import ShellWindow, most_central, sliding_windows
from studies.residual.measuring import Coupled

Floats = NDArray[np.float64]

Q = 2.0
WINDOW_SHELLS = 6
N_PERMUTATIONS = 99
SCALED, RAW = CouplingRule(), CouplingRule("raw")
"""Couplings of V / √(λ_u λ_v), the default, and of V itself."""

FROM_COUPLINGS = (
    "toeplitz", "toeplitz_centre", "toeplitz_edge", "edge_minus_centre", "toeplitz_raw",
    "ratio", "slope", "r2", "signed_slope", "signed_r2",
)  # fmt: skip
FROM_FLUX = ("near_share", "far_share", "transfer")
STATISTICS = (*FROM_COUPLINGS, *FROM_FLUX)


@dataclass(frozen=True, eq=False)
class Pair:
    """The same couplings normalised and raw: of one batch, of several, or of a stack of draws."""

    scaled: ShellSummary
    raw: ShellSummary

    @classmethod
    def mean(cls, some: Sequence[Pair]) -> Pair:
        """Return the mean over batches."""
        return cls(
            ShellSummary.mean([one.scaled for one in some]),
            ShellSummary.mean([one.raw for one in some]),
        )

    def windows(self) -> list[ShellWindow]:
        """Return the windows from the upper spectral edge to the lower one."""
        return sliding_windows(np.isfinite(self.scaled.log_lambda), WINDOW_SHELLS)

    def statistics(self) -> dict[str, Any]:
        """Return `FROM_COUPLINGS` and the shares of the flux: a number, or one for each draw."""
        scaled, raw = self.scaled.statistics(), self.raw.statistics()
        windows = self.windows()
        centre = _within(self.scaled.coupling, windows[most_central(windows)])
        edge = _within(self.scaled.coupling, windows[0])
        return {
            "toeplitz": scaled["toeplitz_residual"],
            "toeplitz_centre": centre,
            "toeplitz_edge": edge,
            "edge_minus_centre": edge - centre,
            "toeplitz_raw": raw["toeplitz_residual"],
            "ratio": scaled["intra_inter_ratio"],
            # Of the root mean square: a kernel that moves in proportion to itself has slope 1.
            "slope": raw["coupling_slope"] / 2,
            "r2": raw["coupling_r2"],
            "signed_slope": raw["signed_slope"],
            "signed_r2": raw["signed_r2"],
            "near_share": scaled["adjacent_share"],
            "far_share": 1.0 - scaled["adjacent_share"],
        }


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
        values under the nulls, with the p-values of small and of large ones; ``"shells"``: λ and
        diagonal; ``"coupling"``: K; ``"windows"``: residual by window, with the nulls.
    """
    measured = [batch.mode_couplings(label) for label, batch in enumerate(batches)]
    partition = place_coupling_shells(measured, q=Q, lambda_0=1.0).partition
    scaled = [SnapshotShells(one, partition, SCALED, seed) for one in measured]
    raw = [SnapshotShells(one, partition, RAW, seed) for one in measured]
    both = list(zip(scaled, raw, strict=True))
    flow = [Pair(s.observed, r.observed) for s, r in both]
    random = Pair.mean([Pair(s.random, r.random) for s, r in both])
    permuted = Pair.mean([_permuted(one) for one in scaled])
    nulls = random.statistics(), permuted.statistics()
    found = {}
    for name in (*FROM_COUPLINGS, "near_share", "far_share"):

        def statistic(some: Sequence[Pair], name: str = name) -> float:
            return float(Pair.mean(some).statistics()[name])

        drawn = nulls[1][name] if name in FROM_COUPLINGS else None
        found[name] = _entry(jackknife(statistic, flow), nulls[0][name], drawn)
    transfers = [_transfer(batch, batch.flow, partition) for batch in batches]
    others = np.mean([[_transfer(b, V, partition) for V in b.random] for b in batches], axis=0)
    found["transfer"] = _entry(jackknife(np.mean, transfers), others, None)
    mean = Pair.mean(flow)
    return {
        "statistics": found,
        "shells": _shell_rows(mean.raw),
        "coupling": mean.scaled.coupling.tolist(),
        "windows": _window_rows(mean, random, permuted, partition),
        "n_shells": int(np.isfinite(mean.scaled.log_lambda).sum()),
        "n_modes": int(min(one.resolved.sum() for one in measured)),
        "lambda_max": float(np.mean([one.lambda_max for one in measured])),
    }


def analyse_step(batch: Coupled) -> dict[str, float]:
    """Return the statistics of one batch along its gradient flow, without intervals and nulls."""
    measured = batch.mode_couplings(0)
    partition = place_coupling_shells([measured], q=Q, lambda_0=1.0).partition
    scaled, raw = (SnapshotShells(measured, partition, rule, 0).observed for rule in (SCALED, RAW))
    return {name: float(value) for name, value in Pair(scaled, raw).statistics().items()}


def jackknife(
    statistic: Callable[[Sequence[Any]], Any], items: Sequence[Any], confidence: float = 0.95
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
    interval: tuple[float, float, float], random: Floats, permuted: Floats | None
) -> dict[str, Any]:
    value, lower, upper = interval
    entry = {"value": value, "lower": lower, "upper": upper, "random": np.ravel(random).tolist()}
    if permuted is not None:
        entry["permuted"] = np.quantile(permuted, [0.025, 0.5, 0.975]).tolist()
        entry["p_low"] = permutation_p_value(value, permuted)
        entry["p_high"] = permutation_p_value(-value, -np.asarray(permuted))
    return entry


def _permuted(scaled: SnapshotShells) -> Pair:
    """Couplings with the entries of V / √(λ_u λ_v) in random places.

    Raw ones are these times the λ of the shells: what the sizes of the modes alone would give.
    """
    drawn = scaled.permuted(N_PERMUTATIONS, with_flux=False)
    rates = np.exp(drawn.log_lambda)
    raw = ShellSummary(
        drawn.coupling * rates[:, None] * rates, drawn.signed_mean * rates, drawn.log_lambda,
        drawn.flux,
    )  # fmt: skip
    return Pair(drawn, raw)


def _transfer(batch: Coupled, V: Floats, partition: ShellPartition) -> float:
    """Return the energy that changes shells, ½ Σ |transfer_α|, relative to the dissipation.

    Exchange that cancels does not count: the reading that is kindest to a small transfer.
    """
    balance = shell_balance(
        batch.eigenvalues, batch.amplitudes, batch.error_rates, V, SoftShells(partition)
    )
    lost = float(np.abs(balance.dissipation).sum())
    return 0.5 * float(np.abs(balance.transfer).sum()) / lost


def _within(coupling: Floats, window: ShellWindow) -> Any:
    return toeplitz_residual(coupling[..., window.shells, window.shells])


def _shell_rows(raw: ShellSummary) -> list[dict[str, float]]:
    inner = np.sqrt(np.diagonal(raw.coupling))
    return [
        {"lambda": float(np.exp(x)), "rms": float(y), "signed": float(s)}
        for x, y, s in zip(raw.log_lambda, inner, raw.signed_mean, strict=True)
        if np.isfinite(x)
    ]


def _window_rows(
    flow: Pair, random: Pair, permuted: Pair, partition: ShellPartition
) -> list[dict[str, float]]:
    rows = []
    for position, window in enumerate(flow.windows()):
        low, middle, high = np.quantile(
            _within(permuted.scaled.coupling, window), [0.025, 0.5, 0.975]
        )
        rows.append(
            {
                "position": position,
                "centrality": window.centrality,
                "lambda_lo": float(partition.edges[window.first]),
                "lambda_hi": float(partition.edges[window.stop]),
                "toeplitz": _within(flow.scaled.coupling, window),
                "raw": _within(flow.raw.coupling, window),
                "random": float(np.median(_within(random.scaled.coupling, window))),
                "permuted_low": float(low),
                "permuted": float(middle),
                "permuted_high": float(high),
            }
        )
    return rows
