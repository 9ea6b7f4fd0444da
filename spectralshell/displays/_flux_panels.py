"""The panels of fluxes: signed flux, its parts at one time, velocity on logarithmic axes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays import _axes, _marks

FLUX_LABEL = r"flux down $J_\downarrow$  (energy / $\tau$)"
VELOCITY_LABEL = r"velocity $|v| = |J_\downarrow|/\varepsilon$  (1/$\tau^2$)"
DRIFT_COLOUR, ROTATION_COLOUR = "#4477aa", "#ee9944"
_LINE_STYLES = ("-", "--", ":", "-.")
_LINEAR_PART = 1e-3  # of the largest flux: below it the signed axis is linear
_FAR_FROM_ONE = 1e3
_PALE = 0.35
_POINT: dict[str, Any] = {"linestyle": "none", "markersize": 4.5}
_DECAY_LOOK: dict[str, Any] = {"color": "0.45", "linestyle": (0, (1, 1.5)), "linewidth": 1.1}


def curves_of(drawn: pd.DataFrame) -> Iterator[tuple[float, Any, Any, pd.DataFrame]]:
    """Yield τ, line style, name (None if all have one) and rows of every curve."""
    names = list(dict.fromkeys(drawn["name"])) if "name" in drawn else [None]
    for i, name in enumerate(names):
        rows = drawn if name is None else drawn[drawn["name"] == name]
        for tau in sorted(set(rows["tau"])):
            label = name if len(names) > 1 else None
            yield tau, _LINE_STYLES[i % 4], label, rows[rows["tau"] == tau]


def draw_fluxes(ax: Any, drawn: pd.DataFrame, scale: _axes.TauScale) -> list[Any]:
    """Draw the flux through every edge, with its sign; return the lines."""
    set_edge_view(ax, drawn)
    _set_signed_view(ax, drawn[["flux_down", "lower", "upper"]].to_numpy(dtype=float))
    ax.axhline(0.0, color="0.3", linewidth=0.9, zorder=1)
    lines = []
    for tau, dash, _, curve in curves_of(drawn):
        colour, marker = scale.colour(tau), scale.marker(tau)
        if curve["lower"].notna().any():
            ends = curve["lower"], curve["upper"]
            ax.fill_between(curve["edge"], *ends, color=colour, alpha=0.15, linewidth=0)
        (line,) = ax.plot(
            curve["edge"],
            curve["flux_down"],
            color=colour,
            linestyle=dash,
            linewidth=1.4,
            marker=marker,
            markersize=4.5,
            markevery=curve["resolved"].to_numpy(dtype=bool),
        )
        lines.append(line)
        pale = curve[~curve["resolved"].to_numpy(dtype=bool)]
        shape = "o" if marker == "." else marker
        ax.plot(
            pale["edge"], pale["flux_down"], **_POINT, color=pale_of(colour), marker=shape, zorder=3
        )
    _name_directions(ax)
    ax.set_ylabel(FLUX_LABEL)
    _set_title(ax, "flux through the edges")
    return lines


def draw_parts(ax: Any, curve: pd.DataFrame, label: str) -> list[Any]:
    """Draw drift and rotation as bars at every edge, and their sum; return the handles."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    set_edge_view(ax, curve)
    edges = curve["edge"].to_numpy(dtype=float)
    # Two bars beside each other in ln λ, with a gap to those of the next edge.
    bounds = edges[:, None] * _ratio(edges) ** np.array([-0.38, 0.0, 0.38])
    parts = (("drift", DRIFT_COLOUR, 0), ("rotation", ROTATION_COLOUR, 1))
    for part, colour, side in parts:
        left, right = bounds[:, side], bounds[:, side + 1]
        ax.bar(
            left, curve[part].to_numpy(), width=right - left, align="edge", color=colour, zorder=2
        )
    ax.plot(
        edges,
        curve["flux_down"],
        linestyle="none",
        marker="D",
        markersize=4.0,
        color="0.1",
        zorder=3,
    )
    ax.axhline(0.0, color="0.3", linewidth=0.9, zorder=2.5)
    ax.margins(y=0.12)
    ax.set_ylabel(FLUX_LABEL)
    _set_title(ax, label)
    handles: list[Any] = [
        Patch(color=DRIFT_COLOUR, label="drift of eigenvalues"),
        Patch(color=ROTATION_COLOUR, label="rotation of modes"),
    ]
    return [*handles, Line2D([], [], linestyle="none", marker="D", color="0.1", label="sum")]


def draw_velocities(
    ax: Any, drawn: pd.DataFrame, scale: _axes.TauScale, fits: pd.DataFrame | None
) -> list[Any]:
    """Draw |v| at every edge, filled where energy drifts down, hollow where up.

    Pale where it is not resolved, in which case it may not drift at all.
    """
    from matplotlib.lines import Line2D

    set_edge_view(ax, drawn)
    sizes = np.abs(drawn["velocity"].to_numpy(dtype=float))
    _axes.set_log_view(ax, "y", _axes.log_limits(sizes), keep=False)
    up = False
    for tau, dash, _, curve in curves_of(drawn):
        colour, marker = scale.colour(tau), scale.marker(tau)
        marker = "o" if marker == "." else marker
        size = curve["velocity"].abs().where(curve["velocity"] != 0.0)
        ax.plot(curve["edge"], size, color=colour, linestyle=dash, linewidth=0.7, alpha=0.45)
        for rising, known in product((False, True), (True, False)):
            moving = (curve["velocity"] > 0) if rising else (curve["velocity"] < 0)
            chosen = moving & (curve["resolved"] == known)
            shade = colour if known else pale_of(colour)
            ax.plot(
                curve["edge"][chosen],
                size[chosen],
                color=shade,
                marker=marker,
                markerfacecolor="white" if rising else shade,
                zorder=3,
                **_POINT,
            )
            up = up or (rising and bool(chosen.any()))
        _draw_fit(ax, tau, curve, fits, colour)
    span = np.array(ax.get_xlim())
    ax.plot(span, 2.0 * span**2, scalex=False, scaley=False, zorder=1, **_DECAY_LOOK)
    ax.set_ylabel(VELOCITY_LABEL)
    _set_title(ax, "drift velocity")
    handles: list[Any] = [Line2D([], [], marker="o", color="0.3", label="drifts down", **_POINT)]
    if up:
        handles.append(_marks.handle("o", "drifts up"))
    if fits is not None and fits["b"].notna().any():
        handles.append(Line2D([], [], color="0.3", linewidth=1.6, label=_fit_label(fits)))
    return [*handles, Line2D([], [], label=r"as fast as decay, $2\lambda^2$", **_DECAY_LOOK)]


def unresolved_handle() -> Any:
    """Return the handle of edges that are not resolved, in either panel."""
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", color=pale_of("0.3"), label="not resolved", **_POINT)


def pale_of(colour: Any) -> tuple[float, float, float]:
    """Return a colour mixed with white, as opaque as it is: lines end at a pale marker."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1.0 - _PALE * (1.0 - part) for part in to_rgb(colour))
    return red, green, blue


def set_edge_view(ax: Any, drawn: pd.DataFrame) -> None:
    """Put λ on a logarithmic axis that holds every edge and the bars there."""
    edges = np.unique(drawn["edge"].to_numpy(dtype=float))
    room = _ratio(edges) ** 0.6
    _axes.set_log_view(ax, "x", (edges[0] / room, edges[-1] * room), keep=False)


def _ratio(edges: np.ndarray) -> float:
    return float(edges[1] / edges[0]) if edges.size > 1 else 2.0


def _set_title(ax: Any, text: str) -> None:
    ax.set_title(text, fontsize="medium", loc="left", color="0.25")


def _fit_label(fits: pd.DataFrame) -> str:
    pooled = fits[fits["scope"] == "all"].iloc[0]
    if not np.isfinite(pooled["b"]):
        return r"power law $c\,\lambda^b$"
    text = f"power law, b = {pooled['b']:.2f}"
    if np.isfinite(pooled["b_lower"]):
        text += f"\n[{pooled['b_lower']:.2f}, {pooled['b_upper']:.2f}] at all times"
    return text


def _draw_fit(
    ax: Any, tau: float, curve: pd.DataFrame, fits: pd.DataFrame | None, colour: Any
) -> None:
    if fits is None:
        return
    found = fits[(fits["scope"] == "tau") & (fits["tau"] == tau) & fits["amplitude"].notna()]
    known = curve["edge"][curve["velocity"].notna() & curve["resolved"]]
    if found.empty or known.empty:
        return
    ends = np.array([known.min(), known.max()])
    law = found.iloc[0]
    ax.plot(ends, law["amplitude"] * ends ** law["b"], color=colour, linewidth=1.6, zorder=2)


def _set_signed_view(ax: Any, values: np.ndarray) -> None:
    """Make y linear near zero and logarithmic far from it, with decades for ticks."""
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max(initial=0.0))
    if largest == 0.0:
        ax.set_ylim(-1.0, 1.0)
        return
    power = np.ceil(np.log10(largest))
    threshold = _LINEAR_PART * 10.0**power
    ax.set_yscale("symlog", linthresh=threshold, linscale=0.6)
    low, high = float(finite.min()), float(finite.max())
    ax.set_ylim(min(2.0 * low, -threshold), max(2.0 * high, threshold))
    decades = 10.0 ** np.arange(np.log10(threshold), power + 1)
    ticks = np.concatenate([-decades[::-1], [0.0], decades])
    bottom, top = ax.get_ylim()
    shown = ticks[(ticks >= bottom) & (ticks <= top)]
    plain = threshold >= 1.0 / _FAR_FROM_ONE and largest <= _FAR_FROM_ONE
    write = _axes.format_number if plain else _signed_power
    ax.set_yticks(shown, [write(tick) for tick in shown])
    ax.minorticks_off()


def _signed_power(value: float) -> str:
    if value == 0.0:
        return "0"
    text = _axes.format_power(abs(value))
    return text if value > 0 else f"$-{text[1:]}" if text.startswith("$") else f"-{text}"


def _name_directions(ax: Any) -> None:
    look = {"transform": ax.transAxes, "fontsize": "small", "color": "0.45", "ha": "left"}
    bottom, top = ax.get_ylim()
    if top > 0:
        ax.text(0.015, 0.97, r"$\downarrow$ to smaller $\lambda$", va="top", **look)
    if bottom < 0:
        ax.text(0.015, 0.03, r"$\uparrow$ to larger $\lambda$", va="bottom", **look)
