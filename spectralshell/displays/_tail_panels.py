"""The panels of a tail fit: densities and fit, residuals, alternatives, legend."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays import _axes, _marks
from spectralshell.displays._frames import split_curves

DENSITIES = ["density", "density_lower", "density_upper"]
RESIDUALS = ["residual", "residual_lower", "residual_upper"]
_MARKER_SIZE = 4.5
_WINDOW_LOOK = {"facecolor": "0.95", "edgecolor": "0.75", "linewidth": 0.8, "zorder": 0}


def make_panels(plt: Any, with_alternatives: bool) -> tuple[list[Any], Any]:
    """Make a figure; return its panels (fit, residuals, alternatives) and the legend's panel."""
    figure = plt.figure(figsize=(9.8, 5.8), layout="constrained")
    grid = figure.add_gridspec(
        2, 2, width_ratios=[2.0 if with_alternatives else 2.8, 1], height_ratios=[2.1, 1]
    )
    fit = figure.add_subplot(grid[0, 0])
    residuals = figure.add_subplot(grid[1, 0], sharex=fit)
    fit.tick_params(labelbottom=False)
    legend = figure.add_subplot(grid[0, 1])
    legend.set_axis_off()
    if not with_alternatives:
        return [fit, residuals], legend
    return [fit, residuals, figure.add_subplot(grid[1, 1])], legend


def fill_legend_panel(ax: Any, handles: list[Any], with_alternatives: bool) -> Any:
    """Draw the legend in its own panel.

    At the right over the alternatives, whose names leave room to its left; else at the left.
    """
    side = "right" if with_alternatives else "left"
    return ax.legend(handles=handles, loc=f"upper {side}", fontsize="small", borderaxespad=0.0)


def draw_fit(
    ax: Any, drawn: pd.DataFrame, scale: _axes.TauScale, window: tuple[float, float] | None
) -> list[Any]:
    """Draw densities with batch ranges and fitted curves; return the legend's handles.

    Data outside the window are hollow. The fit is solid inside the window and dotted outside, where
    it extrapolates.
    """
    from matplotlib.lines import Line2D

    _axes.set_log_view(
        ax,
        "x",
        _axes.log_limits(drawn[["lambda_lo", "lambda_hi"]].to_numpy()),
        keep=False,
    )
    bands = drawn[DENSITIES[1:]].to_numpy()
    limits = _axes.log_limits(drawn["density"].to_numpy(), bands=bands)
    _axes.set_log_view(ax, "y", limits, keep=False)
    handles = [] if scale.uses_colorbar else _tau_handles(drawn, scale)
    any_invisible = False
    for tau, _, curve in split_curves(drawn):
        colour, marker = scale.colour(tau), scale.marker(tau)
        values = curve[["lambda_mid"]].assign(value=curve["density"])
        any_invisible |= _marks.draw_invisible(ax, values, colour)
        _draw_points(ax, curve, DENSITIES, colour, marker)
        fit = curve["fit"].where(curve["fit"] > 0)
        ax.plot(curve["lambda_mid"], fit, color=colour, linestyle=":", linewidth=1.0)
        inside = fit.where(curve["in_window"])
        ax.plot(curve["lambda_mid"], inside, color=colour, linewidth=1.6)
    handles.append(_data_handle(drawn))
    if not drawn["in_window"].all():
        handles.append(_marks.handle("o", "data outside the window"))
    if (drawn["fit"] > 0).any():
        handles.append(
            Line2D([], [], color="0.3", linewidth=1.6, label="fit (dotted: extrapolated)")
        )
    if any_invisible:
        handles.append(_marks.handle("v", "zero, or below the view"))
    handles += _draw_window(ax, window)
    has_labels = ax.xaxis.get_major_ticks(1)[0].label1.get_visible()
    ax.set_xlabel(_axes.LAMBDA_LABEL if has_labels else "")
    ax.set_ylabel(_axes.DENSITY_LABEL)
    return handles


def draw_residuals(
    ax: Any, drawn: pd.DataFrame, scale: _axes.TauScale, window: tuple[float, float] | None
) -> None:
    """Draw ln(data / fit) in the window, with the range over batches."""
    ends = drawn[["lambda_lo", "lambda_hi"]].to_numpy()
    _axes.set_log_view(ax, "x", _axes.log_limits(ends), keep=False)
    for tau, _, curve in split_curves(drawn):
        _draw_points(ax, curve, RESIDUALS, scale.colour(tau), scale.marker(tau))
    ax.axhline(0.0, color="0.3", linewidth=1.0, zorder=1)
    values = drawn[RESIDUALS].to_numpy()
    values = values[np.isfinite(values)]
    if not values.size:
        ax.text(0.5, 0.6, "no residuals", transform=ax.transAxes, ha="center", fontsize="small")
    reach = 1.15 * np.abs(values).max(initial=0.0)
    reach = reach if reach > 1e-9 else 0.1
    ax.set_ylim(-reach, reach)
    _draw_window(ax, window)
    ax.set_xlabel(_axes.LAMBDA_LABEL)
    ax.set_ylabel(r"$\ln$(data / fit)")


def draw_alternatives(ax: Any, alternatives: pd.DataFrame) -> None:
    """Draw the AIC of each model above the smallest as bars, best first.

    Models of rank 1 are not told apart from the best and have its colour.

    Parameters
    ----------
    ax : matplotlib Axes
    alternatives : DataFrame
        ``delta_aic, slope, rank`` by model.
    """
    ranked = alternatives["delta_aic"].sort_values()
    places = np.arange(len(ranked))
    lengths = ranked.fillna(0.0).to_numpy()
    colours = ["#31688e" if rank == 1 else "0.7" for rank in alternatives["rank"][ranked.index]]
    ax.barh(places, lengths, color=colours, height=0.55)
    ax.plot(ranked, places, "o", color="0.25", markersize=_MARKER_SIZE, clip_on=False)
    reach = max(lengths.max() * 2.6, 1.0)  # room for the text after the longest bar
    slopes = alternatives["slope"].reindex(ranked.index)
    for place, value, slope in zip(places, ranked, slopes, strict=True):
        text = "no fit" if np.isnan(value) else f"{value:.1f}"
        if np.isfinite(slope) and np.isfinite(value):
            text += f" ($b$ = {slope:.2f})"
        ax.annotate(
            text,
            (0.0 if np.isnan(value) else value, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    ax.set_yticks(places, [fill(str(name), 18) for name in ranked.index], fontsize="small")
    ax.set_ylim(len(ranked) - 0.4, -0.6)
    ax.set_xlim(0.0, reach)
    ax.set_xlabel("AIC above the best")


def _draw_points(
    ax: Any, curve: pd.DataFrame, columns: list[str], colour: Any, marker: str
) -> None:
    """Draw values with bars for the range over batches; hollow outside the window."""
    value, lower, upper = columns
    shown = curve[np.isfinite(curve[value])]
    if ax.get_yscale() == "log":
        shown = shown[shown[value] > 0]
    many = shown[shown["n_batches"] > 1]
    bottom = ax.get_ylim()[0] if ax.get_yscale() == "log" else -np.inf
    low = many[lower].fillna(many[value]).clip(lower=bottom)
    ax.vlines(many["lambda_mid"], low, many[upper], color=colour, linewidth=1.0, alpha=0.7)
    for inside in (True, False):
        part = shown[shown["in_window"] == inside]
        ax.plot(
            part["lambda_mid"],
            part[value],
            linestyle="none",
            marker="o" if marker == "." else marker,
            markersize=_MARKER_SIZE if marker != "." else 3.0,
            color=colour,
            markerfacecolor=colour if inside else "white",
        )


def _draw_window(ax: Any, window: tuple[float, float] | None) -> list[Any]:
    if window is None or not np.isfinite(window).all():
        return []
    label = f"window: $\\lambda$ {_axes.format_number(window[0])}–{_axes.format_number(window[1])}"
    left, right = ax.get_xlim()
    return [ax.axvspan(max(window[0], left), min(window[1], right), label=label, **_WINDOW_LOOK)]


def _tau_handles(drawn: pd.DataFrame, scale: _axes.TauScale) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [],
            [],
            color=scale.colour(tau),
            marker=scale.marker(tau),
            markersize=_MARKER_SIZE,
            label=scale.label(tau),
        )
        for tau in scale.taus
    ]


def _data_handle(drawn: pd.DataFrame) -> Any:
    from matplotlib.lines import Line2D

    counts = sorted(set(drawn["n_batches"]))
    text = "data"
    if counts and counts[-1] > 1:
        text = f"data, range over {_axes.write_counts(counts)} batches"
    return Line2D(
        [], [], color="0.3", marker="o", linestyle="none", markersize=_MARKER_SIZE, label=text
    )
