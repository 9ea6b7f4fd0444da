"""The marks of one curve over shells: line, steps, band, shells out of view."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

_MARKER_SIZE = 4.5


def draw_line(ax: Any, curve: pd.DataFrame, look: dict[str, Any], marker: str, label: str) -> Any:
    """Draw markers joined by lines, hollow where the shell is not resolved; return the line."""
    values = curve["value"].where(curve["value"] > 0).to_numpy()
    middles = curve["lambda_mid"].to_numpy()
    (line,) = ax.plot(
        middles, values, marker=marker, markersize=_MARKER_SIZE, linewidth=1.4, label=label, **look
    )
    hollow = ~curve["resolved"].to_numpy(dtype=bool)
    if hollow.any():
        ax.plot(
            middles[hollow],
            values[hollow],
            marker="o" if marker == "." else marker,
            markersize=_MARKER_SIZE,
            linestyle="none",
            color=look["color"],
            markerfacecolor="white",
        )
    return line


def draw_steps(ax: Any, curve: pd.DataFrame, look: dict[str, Any], marker: str, label: str) -> Any:
    """Draw a step over every shell; return the patch."""
    values = curve["value"].where(curve["value"] > 0).to_numpy()
    return ax.stairs(values, _edges(curve), baseline=None, linewidth=1.4, label=label, **look)


def draw_band(ax: Any, curve: pd.DataFrame, colour: Any, style: str) -> list[Any]:
    """Fill between ``lower`` and ``upper``; return the artist in a list, empty without a band.

    A band that reaches zero is drawn to the lower edge of the view. One shell has no width
    between middles, so its band is a thick bar.
    """
    if not (curve["upper"] > 0).any():
        return []
    bottom = ax.get_ylim()[0]
    there = curve["upper"] > 0
    lower, upper = (
        curve[end].where(there).clip(lower=bottom).to_numpy() for end in ("lower", "upper")
    )
    look = {"color": colour, "alpha": 0.2, "linewidth": 0}
    if style == "step":
        ends = (np.append(end, end[-1]) for end in (lower, upper))
        return [ax.fill_between(_edges(curve), *ends, step="post", **look)]
    if len(curve) == 1:
        return [ax.vlines(curve["lambda_mid"], lower, upper, color=colour, alpha=0.3, linewidth=6)]
    return [ax.fill_between(curve["lambda_mid"], lower, upper, **look)]


def draw_invisible(ax: Any, curve: pd.DataFrame, colour: Any) -> bool:
    """Mark shells whose value is below the view, zero among them, at its lower edge.

    Returns whether there was any.
    """
    low = curve[curve["value"] < ax.get_ylim()[0]]
    if low.empty:
        return False
    ax.plot(
        low["lambda_mid"],
        np.full(len(low), 0.015),
        transform=ax.get_xaxis_transform(),
        scaley=False,
        linestyle="none",
        marker="v",
        markersize=4,
        markerfacecolor="none",
        color=colour,
    )
    return True


def handle(marker: str, label: str) -> Any:
    """Return a legend handle: a hollow grey marker."""
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        linestyle="none",
        marker=marker,
        markersize=_MARKER_SIZE,
        color="0.3",
        markerfacecolor="white",
        label=label,
    )


def _edges(curve: pd.DataFrame) -> np.ndarray:
    return np.append(curve["lambda_lo"], curve["lambda_hi"].iloc[-1])
