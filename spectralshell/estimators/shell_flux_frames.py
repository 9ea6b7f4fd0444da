"""Frames of fluxes: one row per (snapshot, edge), (snapshot, shell), snapshot, and distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from spectralshell.dynamics.lazy import lazy_loss
from spectralshell.estimators.shell_flux_measurement import FluxMeasurement
from spectralshell.shells import EdgeBalance, ShellBalance, SoftShells, SpectralMeasure
from spectralshell.shells.frames import label_index
from spectralshell.shells.measure import join_statuses

FLUX = "flux_down"
_NO_MODE = "no mode near the edge"
_NO_ENERGY = "no energy in the shell"


@dataclass(frozen=True, eq=False)
class BalancedSnapshot:
    """A measurement with its balance in given shells.

    Parameters
    ----------
    measurement : FluxMeasurement
        Independent of the shells.
    balance : EdgeBalance
        In the shells.
    faults : ndarray of str, shape (n_edges,)
        What keeps the flux through an edge from being resolved, ``"ok"`` if nothing.
    """

    measurement: FluxMeasurement
    balance: EdgeBalance
    faults: np.ndarray

    @property
    def resolved(self) -> np.ndarray:
        """Edges whose flux is resolved, bool of shape (n_edges,)."""
        return np.asarray(self.faults == "ok", dtype=bool)

    @property
    def measure(self) -> SpectralMeasure:
        """Where the error's energy is."""
        return self.measurement.measure

    @property
    def tau(self) -> float:
        """Effective training time."""
        return self.measure.tau

    @property
    def run(self) -> tuple[Any, Any]:
        """What the snapshots of one trajectory share: batch and name."""
        return self.measure.batch, self.measure.name


def balance_all(
    measurements: Sequence[FluxMeasurement], shells: SoftShells
) -> list[BalancedSnapshot]:
    """Return the balance of every measurement in the shells."""
    return [BalancedSnapshot(m, *m.balance(shells)) for m in measurements]


def flux_name(edge: float) -> str:
    """Return the column name of the flux through an edge, with a float that reads back exactly.

    Examples
    --------
    >>> flux_name(0.5)
    'flux_down[0.5]'
    """
    return f"{FLUX}[{float(edge)!r}]"


def wide_fluxes(snapshots: Sequence[BalancedSnapshot], shells: SoftShells) -> pd.DataFrame:
    """Return one row per snapshot and one column per edge, values ``flux_down``."""
    measures = [s.measure for s in snapshots]
    frame = pd.DataFrame(
        np.stack([s.balance.flux_down for s in snapshots]),
        index=label_index(measures),
        columns=pd.Index([flux_name(edge) for edge in shells.edges]),
    )
    frame.attrs = {
        "resolution_floor": max(m.floor for m in measures),
        "lambda_max": max(m.lambda_max for m in measures),
    }
    return frame


def edge_frame(snapshots: Sequence[BalancedSnapshot], shells: SoftShells) -> pd.DataFrame:
    """Return the tidy frame of fluxes, one row per (snapshot, edge)."""
    edges = shells.edges
    return _stacked(snapshots, [_edge_columns(s, edges) for s in snapshots], edges.size)


def shell_balance_frame(snapshots: Sequence[BalancedSnapshot], shells: SoftShells) -> pd.DataFrame:
    """Return the balance of every soft shell, one row per (snapshot, shell), null first."""
    first = _first_of_runs(snapshots)
    blocks = [_shell_columns(s, first[s.run], shells) for s in snapshots]
    return _stacked(snapshots, blocks, len(shells.names))


def summary_frame(snapshots: Sequence[BalancedSnapshot]) -> pd.DataFrame:
    """Return what holds for a snapshot as a whole, one row each."""
    first, before = _first_of_runs(snapshots), _before_each(snapshots)
    blocks = []
    for s in snapshots:
        parts = s.balance if isinstance(s.balance, ShellBalance) else None
        earlier = before.get(id(s))
        block: dict[str, Any] = {
            "energy": s.measure.total,
            "energy_rate": s.measurement.total_rate,
            "lazy_energy": _lazy_total(first[s.run], s.tau),
            "lazy_energy_step": np.nan if earlier is None else _lazy_total(earlier, s.tau),
            "null_exchange": s.balance.null_exchange,
            "null_share": np.nan if parts is None else parts.null_share,
            "defect": np.nan if parts is None else parts.defect,
            "n_resolved": int(s.resolved.sum()),
            "direction": s.measurement.direction,
            "direction_norm": s.measurement.direction_norm,
            "solver": s.measure.solver,
            "n_matvecs": s.measurement.n_matvecs,
            "resolution_floor": s.measure.floor,
            "lambda_max": s.measure.lambda_max,
            "dynamics_exact": s.measure.dynamics_exact,
            "status": s.measure.status,
        }
        blocks.append({key: np.array([value]) for key, value in block.items()})
    return _stacked(snapshots, blocks, 1)


def distance_frame(snapshots: Sequence[BalancedSnapshot]) -> pd.DataFrame:
    """Return the share of transfer by shell distance, one row per (snapshot, distance).

    Distance 0 stands for the transfer that has the null shell at one end. Lanczos has none.
    """
    blocks = []
    size = len(snapshots[0].balance.energy) - 1
    for s in snapshots:
        parts = s.balance
        shares = (
            np.append(parts.null_share, parts.share_by_distance)
            if isinstance(parts, ShellBalance)
            else np.full(size, np.nan)
        )
        blocks.append({"distance": np.arange(size), "share": shares})
    return _stacked(snapshots, blocks, size)


def _edge_columns(snapshot: BalancedSnapshot, edges: np.ndarray) -> dict[str, np.ndarray]:
    balance = snapshot.balance
    parts = balance if isinstance(balance, ShellBalance) else None
    unknown = np.full(edges.shape, np.nan)
    return {
        "edge": edges,
        FLUX: balance.flux_down,
        "drift": unknown if parts is None else parts.drift,
        "rotation": unknown if parts is None else parts.rotation,
        "density": balance.density,
        "velocity": balance.velocity,
        "regime_index": np.abs(balance.velocity) / edges,
        "energy_below": balance.energy_below,
        "dissipation_below": balance.dissipation_below,
        "flux_to_dissipation": balance.flux_to_dissipation,
        "n_near": balance.n_near,
        "resolved": snapshot.resolved,
        "status": _edge_statuses(snapshot),
    }


def _edge_statuses(snapshot: BalancedSnapshot) -> np.ndarray:
    statuses = []
    for fault, n_near in zip(snapshot.faults, snapshot.balance.n_near, strict=True):
        empty = _NO_MODE if n_near == 0 else "ok"
        statuses.append(join_statuses([snapshot.measure.status, fault, empty]))
    return np.array(statuses, dtype=object)


def _shell_columns(
    snapshot: BalancedSnapshot, first: BalancedSnapshot, shells: SoftShells
) -> dict[str, np.ndarray]:
    balance, partition = snapshot.balance, shells.partition
    velocity = np.append(np.nan, balance.shell_velocity)
    middle = np.append(np.nan, partition.midpoints)
    names = list(shells.names)
    status = [snapshot.measure.status] * len(names)
    for row in np.flatnonzero(balance.energy == 0.0):
        status[row] = join_statuses([status[row], _NO_ENERGY])
    return {
        "shell": np.array(names, dtype=object),
        "lambda_lo": np.append(0.0, partition.edges[:-1]),
        "lambda_hi": partition.edges,
        "lambda_mid": middle,
        "energy_soft": balance.energy,
        "dissipation": balance.dissipation,
        "transfer": balance.transfer,
        "velocity": velocity,
        "regime_index": np.abs(velocity) / middle,
        "drift_to_decay": np.abs(velocity) / (2.0 * middle**2),
        "lazy_energy": _lazy_energies(first.measure, snapshot.tau, shells),
        "status": np.array(status, dtype=object),
    }


def _lazy_energies(measure: SpectralMeasure, tau: float, shells: SoftShells) -> np.ndarray:
    """Return the soft-shell energies at ``tau`` if the kernel had stayed as it was."""
    kept = np.exp(-2.0 * np.maximum(measure.nodes, 0.0) * (tau - measure.tau))
    energies = shells.weights(measure.nodes) @ (kept * measure.weights)
    energies[0] += measure.missing
    return energies


def _lazy_total(snapshot: BalancedSnapshot, tau: float) -> float:
    measure = snapshot.measure
    nodes = np.maximum(measure.nodes, 0.0)
    return float(lazy_loss(nodes, measure.weights, tau - measure.tau)) + measure.missing


def _first_of_runs(snapshots: Sequence[BalancedSnapshot]) -> dict[Any, BalancedSnapshot]:
    first: dict[Any, BalancedSnapshot] = {}
    for snapshot in snapshots:
        known = first.get(snapshot.run)
        if known is None or snapshot.tau < known.tau:
            first[snapshot.run] = snapshot
    return first


def _before_each(snapshots: Sequence[BalancedSnapshot]) -> dict[int, BalancedSnapshot]:
    return {id(end): start for start, end in consecutive(snapshots)}


def consecutive(
    snapshots: Sequence[BalancedSnapshot],
) -> list[tuple[BalancedSnapshot, BalancedSnapshot]]:
    """Return the pairs of successive snapshots of each run, by τ."""
    pairs: list[tuple[BalancedSnapshot, BalancedSnapshot]] = []
    for run in dict.fromkeys(s.run for s in snapshots):
        ordered = sorted((s for s in snapshots if s.run == run), key=lambda s: s.tau)
        pairs += pairwise(ordered)
    return pairs


def _stacked(
    snapshots: Sequence[BalancedSnapshot], blocks: list[dict[str, np.ndarray]], rows: int
) -> pd.DataFrame:
    labels = label_index([s.measure for s in snapshots]).repeat(rows)
    columns = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    return pd.DataFrame(columns, index=labels).reset_index()


__all__ = [
    "BalancedSnapshot",
    "balance_all",
    "consecutive",
    "distance_frame",
    "edge_frame",
    "flux_name",
    "shell_balance_frame",
    "summary_frame",
    "wide_fluxes",
]
