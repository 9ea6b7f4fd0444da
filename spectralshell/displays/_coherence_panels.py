"""The panels of the coherence of blocks: heat map, decay with distance, norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays import _axes

_LABELS = {
    "normalized": r"$\|J_l^* J_m\|\;/\;\|J_l\|\,\|J_m\|$",
    "coherence": r"$\|J_l^* J_m\|$  (1/$\tau$)",
    "influence": r"$\|D_{lm}\|_F\;/\;\|\dot{M}_l\|_F$",
}
_MOST_NAMES = 20
_LONGEST_NAME = 14
_MOST_BANDS = 3
_NORM_COLOUR, _RATE_COLOUR = "#31688e", "#b5367a"


def make_panels(plt: Any, with_norms: bool) -> list[Any]:
    """Make a figure; return its panels: heat map, decay and, if asked for, norms."""
    figure = plt.figure(figsize=(11.0, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1.0])
    heat = figure.add_subplot(grid[:, 0])
    decay = figure.add_subplot(grid[0, 1] if with_norms else grid[:, 1])
    return [heat, decay, figure.add_subplot(grid[1, 1])] if with_norms else [heat, decay]


def draw_heat_map(ax: Any, drawn: pd.DataFrame, quantity: str) -> tuple[Any, Any]:
    """Draw the matrix of all pairs, input at the top left; return the mesh and its colour bar.

    Symmetric quantities have the first τ below the diagonal and the last above it.
    """
    from matplotlib.colors import LogNorm, Normalize

    taus = np.unique(drawn["tau"])
    first, last = (_matrix(drawn[drawn["tau"] == tau]) for tau in (taus[0], taus[-1]))
    halves = quantity != "influence" and len(taus) > 1
    values = np.where(np.tri(len(last), k=-1, dtype=bool), first, last) if halves else last
    norm: Any = Normalize(0.0, 1.0 if quantity == "normalized" else float(values.max()) or 1.0)
    if quantity == "coherence" and (values > 0).any():
        positive = values[values > 0]
        norm = LogNorm(*_axes.log_limits(positive))
        values = np.where(values > 0, values, np.nan)
    gap = 0.6 if len(values) <= _MOST_NAMES else 0.0
    mesh = ax.pcolormesh(values, cmap="viridis", norm=norm, edgecolor="white", linewidth=gap)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    _name_blocks(ax, list(drawn["block"].drop_duplicates()))
    ax.set_ylabel(r"block $l$")
    ax.set_xlabel(r"block $m$, from input to output")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    _title_halves(ax, taus, halves)
    bar = ax.figure.colorbar(mesh, ax=ax, shrink=0.85, pad=0.02)
    bar.set_label(_LABELS[quantity])
    bar.outline.set_visible(False)
    return mesh, bar


def draw_decay(
    ax: Any, drawn: pd.DataFrame, scale: _axes.TauScale, quantity: str
) -> tuple[list[Any], list[Any]]:
    """Draw the mean over pairs at each distance, one line for each τ; return lines and handles."""
    from matplotlib.patches import Patch

    profile = drawn.groupby(["tau", "distance"])["value"].agg(["mean", "min", "max"]).reset_index()
    limits = _axes.log_limits(profile["mean"].to_numpy(), bands=profile[["min", "max"]].to_numpy())
    _axes.set_log_view(ax, "y", limits, keep=False)
    bottom = ax.get_ylim()[0]
    banded = scale.taus if len(scale.taus) <= _MOST_BANDS else scale.taus[[0, -1]]
    lines, handles = [], []
    for tau in scale.taus:
        rows = profile[profile["tau"] == tau]
        colour = scale.colour(tau)
        (line,) = ax.plot(
            rows["distance"],
            rows["mean"].where(rows["mean"] > 0),
            color=colour,
            marker=scale.marker(tau),
            markersize=4.5,
            linewidth=1.4,
            label=scale.label(tau),
        )
        lines.append(line)
        if not scale.uses_colorbar:
            handles.append(line)
        if tau in banded and len(rows) > 1:
            lower = rows["min"].clip(lower=bottom)
            ax.fill_between(rows["distance"], lower, rows["max"], color=colour, alpha=0.13, lw=0)
    text = "range over pairs"
    if len(banded) < len(scale.taus):
        text += "\n(first and last " + r"$\tau$)"
    handles.append(Patch(color="0.5", alpha=0.25, linewidth=0, label=text))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel(r"distance of blocks $|l - m|$")
    ax.set_ylabel(_LABELS[quantity])
    _remove_box(ax)
    return lines, handles


def draw_norms(ax: Any, norms: pd.DataFrame) -> None:
    """Draw ‖J‖ and, on an axis of its own, ‖dJ/dt‖ against τ: the mean and range over batches.

    Either axis is logarithmic unless it has to show zero.
    """
    taus = np.unique(norms["tau"])
    positive = taus[taus > 0]
    if positive.size > 1 and positive[-1] >= 10 * positive[0] and taus[0] >= 0:
        ax.set_xscale("symlog", linthresh=float(positive[0]), linscale=0.4)
        ax.xaxis.set_minor_locator(_no_ticks())
    other = ax.twinx()
    for panel, column, colour, marker, label in (
        (ax, "jacobian_norm", _NORM_COLOUR, "o", r"$\|J\|$  ($\tau^{-1/2}$)"),
        (other, "jacobian_rate", _RATE_COLOUR, "s", r"$\|\dot{J}\|$  ($\tau^{-3/2}$)"),
    ):
        rows = norms.groupby("tau")[column].agg(["mean", "min", "max"])
        panel.plot(rows.index, rows["mean"], color=colour, marker=marker, ms=4.0, lw=1.4)
        if len(rows) > 1:
            panel.fill_between(rows.index, rows["min"], rows["max"], color=colour, alpha=0.15, lw=0)
        panel.set_ylabel(label, color=colour)
        panel.tick_params(axis="y", colors=colour)
        if (rows["min"] > 0).all():
            _axes.set_log_view(panel, "y", _axes.log_limits(rows.to_numpy()), keep=False)
        else:
            panel.set_ylim(0.0, 1.12 * float(rows["max"].max()) or 1.0)
    ax.set_xlabel(r"effective training time $\tau$")
    for spine in (ax.spines["top"], other.spines["top"]):
        spine.set_visible(False)


def _matrix(rows: pd.DataFrame) -> np.ndarray:
    table = rows.pivot_table(index="depth", columns="other_depth", values="value")
    return np.asarray(table.to_numpy(dtype=float))


def _name_blocks(ax: Any, names: list[str]) -> None:
    every = -(-len(names) // _MOST_NAMES)
    places = np.arange(0, len(names), every)
    shown = [_shorten(str(names[place])) for place in places]
    upright = max(map(len, shown)) > 3
    ax.set_yticks(places + 0.5, shown, fontsize="small")
    ax.set_xticks(places + 0.5, shown, fontsize="small", rotation=90 if upright else 0)


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "…" + name[-_LONGEST_NAME + 1 :]


def _title_halves(ax: Any, taus: np.ndarray, halves: bool) -> None:
    labels = _axes.distinct_labels(taus.tolist())
    text = rf"$\tau$ = {labels[-1]}"
    if halves:
        text = rf"above the diagonal $\tau$ = {labels[-1]}, below $\tau$ = {labels[0]}"
    ax.set_title(text, fontsize="medium", loc="left")


def _remove_box(ax: Any) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
