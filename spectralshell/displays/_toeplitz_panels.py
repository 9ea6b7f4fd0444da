"""The panels of a Toeplitz diagnosis: heat maps, residual by window, diagonal couplings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays import _axes

COUPLING_LABEL = r"shell coupling $K_{\alpha\beta}$"
RESIDUAL_LABEL = r"Toeplitz residual $\|K - T(K)\|_F \;/\; \|K\|_F$"
DIAGONAL_LABEL = "diagonal coupling"

_OBSERVED, _SIGNED = "#1f1f1f", "#b5367a"
_NULLS = {
    "permutation": ("#31688e", "entries of $V$ permuted"),
    "random": ("#d08c3f", "random directions"),
}
_MASKED = "0.92"
_MARKER_SIZE = 5.0
_BAR_ROOM = 3.0  # how far above the highest value a bar may pull the view


def make_panels(plt: Any) -> dict[str, Any]:
    """Make a figure with four panels; return them by name."""
    _, axes = plt.subplots(2, 2, figsize=(10.0, 8.6), layout="constrained")
    names = ("coupling", "toeplitz", "windows", "diagonal")
    return dict(zip(names, axes.ravel(), strict=True))


def draw_heat_map(
    ax: Any, matrix: np.ndarray, edges: np.ndarray, norm: Any, title: str | None
) -> Any:
    """Draw a matrix over λ × λ, masked shells grey; return the mesh."""
    from matplotlib import colormaps

    cmap = colormaps["viridis"].with_extremes(bad=_MASKED)
    values = np.where(matrix > 0.0, matrix, np.nan)
    mesh = ax.pcolormesh(
        edges,
        edges,
        np.ma.masked_invalid(values),
        cmap=cmap,
        norm=norm,
        edgecolor="white",
        linewidth=0.6,
    )
    ax.set_facecolor(_MASKED)
    for which in ("x", "y"):
        _axes.set_log_view(ax, which, (edges[0], edges[-1]), keep=False)
    ax.set_aspect("equal")
    ax.minorticks_off()
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel(_axes.LAMBDA_LABEL)
    ax.set_ylabel(_axes.LAMBDA_LABEL)
    if title:
        ax.set_title(title, fontsize="medium")
    return mesh


def coupling_norm(coupling: np.ndarray) -> Any:
    """Return a logarithmic colour norm over the positive couplings."""
    from matplotlib.colors import LogNorm

    positive = coupling[np.isfinite(coupling) & (coupling > 0.0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    # One value still needs a range of colours.
    return LogNorm(low, high if high > low else 10.0 * low)


def draw_coupling_bar(mesh: Any, axes: list[Any]) -> Any:
    """Add the colour bar of the heat maps and return it."""
    bar = axes[0].figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label(COUPLING_LABEL)
    bar.outline.set_visible(False)
    _axes.set_log_ticks(bar.ax.yaxis, mesh.norm.vmin, mesh.norm.vmax)
    return bar


def draw_windows(ax: Any, windows: pd.DataFrame) -> list[Any]:
    """Draw the residual of each window against its middle, over the bands of both nulls.

    Returns the handles of a legend.
    """
    from matplotlib.lines import Line2D

    windows = windows.sort_values("lambda_lo")
    middle = np.sqrt(windows[["lambda_lo", "lambda_hi"]].to_numpy(dtype=float)).prod(axis=1)
    _axes.set_log_view(ax, "x", _axes.log_limits(middle), keep=False)
    handles = []
    for name, (colour, text) in _NULLS.items():
        lower, median, upper = (windows[f"{name}_{end}"] for end in ("lower", "median", "upper"))
        _draw_band(ax, middle, lower, upper, colour)
        ax.plot(middle, median, color=colour, linestyle=(0, (4, 3)), linewidth=1.2)
        handles.append(_band_handle(colour, f"{text}: median, 5–95 %"))
    residual = windows["residual"].to_numpy(dtype=float)
    _draw_points(ax, middle, residual, windows["lower"], windows["upper"], _OBSERVED, "o")
    ax.plot(middle, residual, color=_OBSERVED, linewidth=1.4)
    has_bars = windows["lower"].notna().any()
    label = "residual, 95 % over batches" if has_bars else "residual"
    handles.insert(0, Line2D([], [], color=_OBSERVED, marker="o", ms=_MARKER_SIZE, label=label))
    _mark_centre(ax, windows, middle)
    ax.set_ylim(0.0, _top(windows))
    ax.set_xlabel(r"middle of the window  $\lambda$  (1/$\tau$)")
    ax.set_ylabel(RESIDUAL_LABEL)
    ax.grid(axis="y", color="0.93")
    ax.set_axisbelow(True)
    return handles


def draw_diagonal(ax: Any, shells: pd.DataFrame, diagonal: pd.DataFrame | None) -> list[Any]:
    """Draw K_αα and the size of the signed mean against λ with their fits; return handles."""
    from matplotlib.lines import Line2D

    known = shells[shells["coupling"].notna()]
    rates = known["lambda_mean"].to_numpy(dtype=float)
    inner, signed = (known[name].to_numpy(dtype=float) for name in ("coupling", "signed_mean"))
    series = {
        "coupling": (inner, _OBSERVED, "o", r"$K_{\alpha\alpha}$"),
        "signed_mean": (signed, _SIGNED, "s", r"$|\langle V_{uu}\rangle|$"),
    }
    sizes = np.abs(np.concatenate([inner, signed]))
    bands = known[["coupling_lower", "coupling_upper"]].to_numpy(dtype=float)
    _axes.set_log_view(ax, "x", _axes.log_limits(rates), keep=False)
    # Intervals of shells that few batches have may span decades: they leave the view instead.
    seen = np.minimum(bands, _BAR_ROOM * np.nanmax(sizes, initial=0.0))
    _axes.set_log_view(ax, "y", _axes.log_limits(sizes, bands=seen), keep=False)
    handles = []
    for name, (values, colour, marker, text) in series.items():
        size = np.where(values != 0.0, np.abs(values), np.nan)
        bars = bands.T if name == "coupling" else np.full((2, values.size), np.nan)
        hollow = (values < 0.0) & (values > 0.0).any()
        _draw_points(ax, rates, size, bars[0], bars[1], colour, marker, hollow=hollow)
        label = text
        if diagonal is not None:
            fit = diagonal.loc[[name]].iloc[0]
            _draw_fit(ax, rates, size, fit["slope"], colour)
            label += f"  {_slope_text(fit)}"
        handles.append(
            Line2D([], [], color=colour, marker=marker, ms=_MARKER_SIZE, lw=1.2, label=label)
        )
    if (signed < 0.0).any() and (signed > 0.0).any():
        handles.append(_hollow_handle(r"$\langle V_{uu}\rangle < 0$"))
    ax.set_xlabel(_axes.LAMBDA_LABEL)
    ax.set_ylabel(DIAGONAL_LABEL)
    return handles


def _draw_points(
    ax: Any,
    x: np.ndarray,
    y: np.ndarray,
    lower: Any,
    upper: Any,
    colour: str,
    marker: str,
    *,
    hollow: Any = None,
) -> None:
    bars = np.array([lower, upper], dtype=float)
    there = np.isfinite(bars).all(axis=0) & np.isfinite(y)
    if there.any():
        ax.vlines(x[there], bars[0, there], bars[1, there], color=colour, linewidth=1.1, alpha=0.6)
    ax.plot(x, y, linestyle="none", marker=marker, markersize=_MARKER_SIZE, color=colour)
    if hollow is not None and np.any(hollow):
        ax.plot(
            x[hollow],
            y[hollow],
            linestyle="none",
            marker=marker,
            markersize=_MARKER_SIZE,
            color=colour,
            markerfacecolor="white",
        )


def _draw_band(ax: Any, x: np.ndarray, lower: pd.Series, upper: pd.Series, colour: str) -> None:
    if x.size == 1:  # no width between middles
        ax.vlines(x, lower, upper, color=colour, alpha=0.3, linewidth=8)
    else:
        ax.fill_between(x, lower, upper, color=colour, alpha=0.2, linewidth=0)


def _draw_fit(ax: Any, rates: np.ndarray, sizes: np.ndarray, slope: float, colour: str) -> None:
    there = np.isfinite(sizes) & np.isfinite(rates)
    if not there.any() or not np.isfinite(slope):
        return
    x, y = np.log(rates[there]), np.log(sizes[there])
    ends = np.array([x.min(), x.max()])
    line = y.mean() + slope * (ends - x.mean())
    ax.plot(np.exp(ends), np.exp(line), color=colour, linewidth=1.2, linestyle=(0, (4, 3)))


def _slope_text(fit: pd.Series) -> str:
    text = f"slope {fit['slope']:.2f}"
    if np.isfinite([fit["slope_lower"], fit["slope_upper"]]).all():
        text += f" [{fit['slope_lower']:.2f}, {fit['slope_upper']:.2f}]"
    return f"{text}, $R^2$ {fit['r2']:.2f}; scale-free {fit['scale_free']:g}"


def _mark_centre(ax: Any, windows: pd.DataFrame, middle: np.ndarray) -> None:
    if not middle.size:
        return
    centre = middle[int(np.argmax(windows["centrality"].to_numpy()))]
    ax.axvline(centre, color="0.75", linewidth=0.9, linestyle=":", zorder=0)
    ax.annotate(
        "centre of the spectrum",
        (centre, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, -3),
        textcoords="offset points",
        ha="left",
        va="top",
        fontsize="small",
        color="0.45",
    )


def _top(windows: pd.DataFrame) -> float:
    columns = ["residual", "upper", *[f"{name}_upper" for name in _NULLS]]
    values = windows[columns].to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    highest = float(values.max()) if values.size else 0.0
    return 1.15 * highest if highest > 0.0 else 1.0


def _band_handle(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=0.3, linewidth=0, label=label)


def _hollow_handle(label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        linestyle="none",
        marker="s",
        markersize=_MARKER_SIZE,
        color=_SIGNED,
        markerfacecolor="white",
        label=label,
    )
