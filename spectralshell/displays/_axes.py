"""Parts of a plot that displays share: lazy matplotlib, colours for τ, log axes, marks, legends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

LAMBDA_LABEL = r"eigenvalue $\lambda$  (1/$\tau$)"
DENSITY_LABEL = r"energy density $\varepsilon$  (loss $\times$ $\tau$)"
LINE_STYLES = ("-", "--", ":", "-.")
MARKER_SIZE = 4.5
MAX_LEGEND_TAUS = 6
_MARKERS = "os^Dv>"
_DEEPEST_VIEW = 1e-10  # values this far below the largest one are rounding, not signal
_MAX_MINOR_TICKS = 100
_BAND_ROOM = 10.0  # how far below the lowest value a band may pull the view


def require_pyplot(caller: str) -> Any:
    """Return ``matplotlib.pyplot``; where it is missing, an error says how to install it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib, which cannot be imported; install it with "
            'pip install "spectralshell[plot]".'
        ) from error
    return plt


def format_number(value: float, digits: int = 3) -> str:
    """Return a short label: plain digits from 0.001 to 99999, powers of ten elsewhere."""
    value = float(value)
    if value == 0.0 or 1e-3 <= abs(value) < 1e5:
        if abs(value) >= 10**digits:
            return f"{value:.0f}"
        return np.format_float_positional(
            value, precision=digits, unique=True, fractional=False, trim="-"
        )
    return format_power(value, digits)


def format_power(value: float, digits: int = 3) -> str:
    """Return a label as a power of ten, with a mantissa where it is not one."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    power = f"10^{{{int(exponent)}}}"
    if mantissa == "1":
        return f"${power}$"
    return f"${mantissa}\\times{power}$"


def distinct_labels(values: Sequence[float]) -> list[str]:
    """Return labels with three digits, or as many as it takes to tell the values apart."""
    for digits in range(3, 17):
        labels = [format_number(value, digits) for value in values]
        if len(set(labels)) == len(set(values)):
            return labels
    return [repr(float(value)) for value in values]


class TauScale:
    """Colour, marker and label of every τ: in a legend for a few, on a colour bar for many.

    The bar is logarithmic when positive τ span a decade; τ = 0 is then grey, at its lower end.
    """

    def __init__(self, taus: Iterable[float]) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap, LogNorm, Normalize

        self.taus = np.unique(np.asarray(list(taus), dtype=float))
        # the last 15 % of viridis is too light to read on white
        shades = colormaps["viridis"](np.linspace(0.0, 0.85, 256))
        self._cmap = ListedColormap(shades).with_extremes(under="0.55")
        self._norm: Any = None
        self.uses_colorbar = len(self.taus) > MAX_LEGEND_TAUS
        positive = self.taus[self.taus > 0]
        self.is_log = bool(
            self.taus.size > 1
            and self.taus[0] >= 0
            and positive.size > 1
            and positive[-1] >= 10 * positive[0]
        )
        if self.is_log:
            self._norm = LogNorm(positive[0], positive[-1])
        elif self.taus.size:
            self._norm = Normalize(self.taus[0], self.taus[-1])

    def _rank(self, tau: float) -> int:
        return int(np.argmin(np.abs(self.taus - tau)))

    def colour(self, tau: float) -> Any:
        """Return the RGBA colour of one τ."""
        if not self.uses_colorbar:
            return self._cmap(self._rank(tau) / max(len(self.taus) - 1, 1))
        if self.is_log and tau <= 0:
            return self._cmap(-1.0)
        return self._cmap(float(self._norm(tau)))

    def marker(self, tau: float) -> str:
        """Return a marker: one per τ in a legend, dots under a colour bar."""
        return "." if self.uses_colorbar else _MARKERS[self._rank(tau)]

    def label(self, tau: float) -> str:
        """Return the legend text of one τ."""
        return rf"$\tau$ = {distinct_labels(self.taus.tolist())[self._rank(tau)]}"

    def draw_colorbar(self, axes: list[Any]) -> Any:
        """Add the colour bar beside ``axes`` and return it."""
        from matplotlib.cm import ScalarMappable

        grey_end = self.is_log and self.taus[0] == 0
        bar = axes[0].figure.colorbar(
            ScalarMappable(norm=self._norm, cmap=self._cmap),
            ax=axes,
            extend="min" if grey_end else "neither",
        )
        bar.set_label(r"effective training time $\tau$")
        if self.is_log:
            set_log_ticks(bar.ax.yaxis, *self._norm_limits())
        if grey_end:
            bar.ax.text(
                0.5, -0.06, r"$\tau$ = 0", transform=bar.ax.transAxes, ha="center", va="top"
            )
        return bar

    def _norm_limits(self) -> tuple[float, float]:
        return float(self._norm.vmin), float(self._norm.vmax)


def batch_range_handle(n_batches: Iterable[int]) -> Any:
    """Return the legend handle of bands that hold the range over batches."""
    from matplotlib.patches import Patch

    text = f"range over {write_counts(n_batches)} batches"
    return Patch(color="0.5", alpha=0.3, linewidth=0, label=text)


def write_counts(counts: Iterable[int]) -> str:
    """Return ``"3"`` or, where counts differ, ``"2–5"``."""
    different = sorted(set(counts))
    low, high = different[0], different[-1]
    return str(low) if low == high else f"{low}–{high}"


def set_log_ticks(axis: Any, low: float, high: float) -> None:
    """Put readable ticks on a logarithmic axis that shows ``low`` to ``high``.

    Minor ticks carry no text, which is what makes short log axes unreadable by default.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = np.log10(high / low)
    subs = (1.0,) if decades >= 3 else (1.0, 2.0, 5.0) if decades >= 0.5 else (1, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    write = format_number if low >= 5e-4 and high <= 5e4 else format_power
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    minor = np.arange(1.0, 10.0).tolist() if decades <= 6 else [1.0]
    axis.set_minor_locator(LogLocator(subs=minor, numticks=_MAX_MINOR_TICKS))
    axis.set_minor_formatter(NullFormatter())


def log_limits(values: np.ndarray, *, bands: np.ndarray | None = None) -> tuple[float, float]:
    """Return the view of a logarithmic axis that holds every positive value with a margin.

    Rounding stays out, a band that reaches zero stretches it by at most `_BAND_ROOM`.
    """
    values = _positive(values)
    if values.size == 0:
        return 0.1, 1.0
    low, high = values.min(), values.max()
    low = max(low, _DEEPEST_VIEW * high)
    if bands is not None and (bands := _positive(bands)).size:
        low = min(low, max(bands.min(), low / _BAND_ROOM))
        high = max(high, bands.max())
    margin = max((high / low) ** 0.05, 1.3)
    return float(low / margin), float(high * margin)


def set_log_view(ax: Any, which: str, limits: tuple[float, float], *, keep: bool) -> None:
    """Make one axis logarithmic with these limits, widened to the old ones if ``keep``."""
    axis = getattr(ax, f"{which}axis")
    get, set_limits = getattr(ax, f"get_{which}lim"), getattr(ax, f"set_{which}lim")
    low, high = limits
    if keep and axis.get_scale() == "log":
        low, high = min(low, get()[0]), max(high, get()[1])
    getattr(ax, f"set_{which}scale")("log")
    set_limits(low, high)
    set_log_ticks(axis, low, high)


def shade_below_floor(ax: Any, floor: float | None, label: str | None) -> Any:
    """Shade λ below the resolution floor; return the patch, or None where there is none."""
    left = ax.get_xlim()[0]
    if floor is None or not np.isfinite(floor) or floor <= left:
        return None
    right = min(floor, ax.get_xlim()[1])
    return ax.axvspan(
        left,
        right,
        facecolor="0.95",
        edgecolor="0.8",
        hatch="///",
        linewidth=0,
        zorder=0,
        label=label,
    )


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


def hollow_handle(marker: str, label: str) -> Any:
    """Return the legend handle of hollow grey markers."""
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        linestyle="none",
        marker=marker,
        markersize=MARKER_SIZE,
        color="0.3",
        markerfacecolor="white",
        label=label,
    )


def draw_legend(ax: Any, handles: Sequence[Any], *, place: str) -> Any:
    """Draw a legend where it covers no data and return it, None for no handles.

    Beside the axes ("right") or "below" a figure of our own; "inside" axes that are the user's.
    """
    if not handles:
        return None
    if place == "below":
        return ax.figure.legend(
            handles=list(handles),
            loc="outside lower center",
            ncols=min(len(handles), 2),
            fontsize="small",
        )
    where = (
        {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
        if place == "right"
        else {"loc": "best"}
    )
    return ax.legend(handles=list(handles), fontsize="small", **where)


def _positive(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float).ravel()
    return np.asarray(values[np.isfinite(values) & (values > 0)])
