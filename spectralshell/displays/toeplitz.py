"""Shell couplings beside their Toeplitz part, the residual by window, and the diagonal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays._axes import (
    LAMBDA_LABEL,
    draw_legend,
    log_limits,
    require_pyplot,
    set_log_ticks,
    set_log_view,
)
from spectralshell.parameter_checks import check_option
from spectralshell.shells import toeplitz_part, toeplitz_residual
from spectralshell.shells.partition import edges_from_names

_PANELS = ("coupling", "toeplitz", "windows", "diagonal")
_WINDOWS = ("lambda_lo", "lambda_hi", "centrality", "residual", "lower", "upper")
_SHELLS = ("lambda_mean", "coupling", "coupling_lower", "coupling_upper", "signed_mean")
_DIAGONAL = ("slope", "slope_lower", "slope_upper", "r2", "scale_free")
_COUPLING_LABEL = r"shell coupling $K_{\alpha\beta}$"
_RESIDUAL_LABEL = r"Toeplitz residual $\|K - T(K)\|_F \;/\; \|K\|_F$"
_DIAGONAL_LABEL = "diagonal coupling"

_OBSERVED, _SIGNED = "#1f1f1f", "#b5367a"
_NULLS = {
    "permutation": ("#31688e", "entries of $V$ permuted"),
    "random": ("#d08c3f", "random directions"),
}
_MASKED = "0.92"
_MARKER_SIZE = 5.0
_BAR_ROOM = 3.0  # how far above the highest value a bar may pull the view


class ToeplitzDisplay:
    """Heat maps of K and T(K), the residual against the window, and the diagonal against λ.

    Build it with :meth:`from_estimator` or :meth:`from_frame`, then call :meth:`plot`.

    Parameters
    ----------
    coupling : DataFrame of shape (n_shells, n_shells)
        K_αβ with shells as names, NaN where masked, as ``ToeplitzDiagnostic.coupling_``.
    windows : DataFrame or None, default=None
        One row per window, as ``windows_``.
    shells : DataFrame or None, default=None
        One row per shell, as ``shells_``.
    diagonal : DataFrame or None, default=None
        Fitted slopes, as ``diagonal_``.
    p_value : float or None, default=None
        Of the residual under permutations, for the title.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The heat map of the coupling, or the panel that was drawn on given axes.
    axes_ : dict of str to matplotlib Axes
        The panels drawn.
    figure_ : matplotlib Figure
    meshes_ : list of matplotlib QuadMesh
        Of K and of T(K).
    colorbar_ : matplotlib Colorbar or None
        Of the heat maps.
    legend_ : matplotlib Legend or None

    Examples
    --------
    >>> import pandas as pd
    >>> from matplotlib.figure import Figure
    >>> from spectralshell.displays import ToeplitzDisplay
    >>> names = ["shell[1.0,2.0)", "shell[2.0,4.0)"]
    >>> coupling = pd.DataFrame([[1.0, 0.5], [0.5, 3.0]], index=names, columns=names)
    >>> display = ToeplitzDisplay.from_frame(coupling).plot(Figure().subplots())
    >>> display.frame()["toeplitz"].tolist()
    [2.0, 0.5, 0.5, 2.0]
    """

    def __init__(
        self,
        *,
        coupling: pd.DataFrame,
        windows: pd.DataFrame | None = None,
        shells: pd.DataFrame | None = None,
        diagonal: pd.DataFrame | None = None,
        p_value: float | None = None,
    ) -> None:
        self.coupling = coupling
        self.windows = windows
        self.shells = shells
        self.diagonal = diagonal
        self.p_value = p_value

    @classmethod
    def from_estimator(cls, estimator: Any) -> ToeplitzDisplay:
        """Take the frames from a fitted diagnostic.

        Parameters
        ----------
        estimator : ToeplitzDiagnostic, or Pipeline that ends in one
            Fitted.

        Returns
        -------
        ToeplitzDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError
            If the estimator is not a fitted diagnostic.
        """
        diagnostic = getattr(estimator, "steps", [("", estimator)])[-1][1]
        if not hasattr(diagnostic, "coupling_"):
            raise TypeError(
                "estimator must be a fitted ToeplitzDiagnostic, or a Pipeline that ends in one, "
                f"got {type(estimator).__name__} without coupling_; call fit first, or use "
                "from_frame."
            )
        return cls.from_frame(
            diagnostic.coupling_,
            windows=diagnostic.windows_,
            shells=diagnostic.shells_,
            diagonal=diagnostic.diagonal_,
            p_value=diagnostic.p_value_,
        )

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        *,
        windows: pd.DataFrame | None = None,
        shells: pd.DataFrame | None = None,
        diagonal: pd.DataFrame | None = None,
        p_value: float | None = None,
    ) -> ToeplitzDisplay:
        """Take the coupling from a frame, and what belongs to it from others.

        Parameters
        ----------
        frame : DataFrame
            Square, with shells as index and columns.
        windows, shells, diagonal : DataFrame or None, default=None
            As ``windows_``, ``shells_`` and ``diagonal_`` of a diagnostic.
        p_value : float or None, default=None
            Of the residual.

        Returns
        -------
        ToeplitzDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError, ValueError
            If a frame is of another kind.
        """
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(
                f"frame must be a pandas DataFrame of shell couplings, got type "
                f"{type(frame).__name__}; pass coupling_."
            )
        if list(frame.index) != list(frame.columns):
            raise ValueError(
                "frame must have the same shells as index and columns, got shape "
                f"{frame.shape}; pass coupling_."
            )
        edges_from_names(frame.columns)
        for name, given, columns in (
            ("windows", windows, _WINDOWS),
            ("shells", shells, _SHELLS),
            ("diagonal", diagonal, _DIAGONAL),
        ):
            _check_columns(name, given, columns)
        return cls(
            coupling=frame, windows=windows, shells=shells, diagonal=diagonal, p_value=p_value
        )

    def frame(self) -> pd.DataFrame:
        """Return the numbers of the heat maps.

        Returns
        -------
        DataFrame
            One row per pair of shells that is not masked: ``shell, other, lambda_mid,
            other_lambda_mid, offset`` (α − β), ``coupling, toeplitz``.
        """
        edges = edges_from_names(self.coupling.columns)
        middle = np.sqrt(edges[1:]) * np.sqrt(edges[:-1])
        matrix = self.coupling.to_numpy(dtype=float)
        row, column = np.nonzero(~np.isnan(matrix))
        names = np.asarray(self.coupling.columns, dtype=object)
        return pd.DataFrame(
            {
                "shell": names[row],
                "other": names[column],
                "lambda_mid": middle[row],
                "other_lambda_mid": middle[column],
                "offset": row - column,
                "coupling": matrix[row, column],
                "toeplitz": toeplitz_part(matrix)[row, column],
            }
        )

    def plot(self, ax: Any = None, *, panel: str = "coupling") -> ToeplitzDisplay:
        """Draw all panels on a figure of their own, or one on given axes.

        Masked shells are grey. Bars are intervals over batches, bands the middle 90 % of a null;
        where ⟨V_uu⟩ changes sign, negative ones are hollow.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw one panel; None makes a figure with all.
        panel : {"coupling", "toeplitz", "windows", "diagonal"}, default="coupling"
            Which panel ``ax`` gets.

        Returns
        -------
        ToeplitzDisplay
            Itself, with ``ax_``, ``axes_`` and ``figure_``.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If there is no such panel, or its frame was not given.
        """
        check_option("panel", panel, _PANELS)
        plt = require_pyplot("ToeplitzDisplay.plot")
        own = ax is None
        if own:
            self.axes_ = _make_panels(plt)
            for name in _PANELS:
                if not self._has(name):
                    self.axes_.pop(name).remove()
        elif not self._has(panel):
            raise ValueError(
                f"panel={panel!r} needs the frame {self._needed(panel)}, which was not given; "
                "build the display with from_estimator."
            )
        else:
            self.axes_ = {panel: ax}
        self.ax_ = next(iter(self.axes_.values()))
        self.figure_ = self.ax_.figure
        self._draw_heat_maps()
        handles = self._draw_lines()
        self.legend_ = draw_legend(self.ax_, handles, place="below" if own else "inside")
        return self

    def _needed(self, panel: str) -> str | None:
        return {"windows": "windows", "diagonal": "shells"}.get(panel)

    def _has(self, panel: str) -> bool:
        needed = self._needed(panel)
        return needed is None or getattr(self, needed) is not None

    def _draw_heat_maps(self) -> None:
        matrix = self.coupling.to_numpy(dtype=float)
        edges = edges_from_names(self.coupling.columns)
        shown = _usable_span(matrix)
        matrix, edges = matrix[shown, shown], edges[shown.start : shown.stop + 1]
        part = np.where(np.isnan(matrix), np.nan, toeplitz_part(matrix))
        norm = _coupling_norm(matrix)
        titles = {"coupling": r"coupling $K$", "toeplitz": self._residual_title(matrix)}
        values = {"coupling": matrix, "toeplitz": part}
        drawn = [name for name in values if name in self.axes_]
        self.meshes_ = [
            _draw_heat_map(self.axes_[name], values[name], edges, norm, titles[name])
            for name in drawn
        ]
        axes = [self.axes_[name] for name in drawn]
        self.colorbar_ = _draw_coupling_bar(self.meshes_[0], axes) if drawn else None

    def _draw_lines(self) -> list[Any]:
        handles: list[Any] = []
        if "windows" in self.axes_ and self.windows is not None:
            handles += _draw_windows(self.axes_["windows"], self.windows)
        if "diagonal" in self.axes_ and self.shells is not None:
            ax = self.axes_["diagonal"]
            handles += _draw_diagonal(ax, self.shells, self.diagonal)
        return handles

    def _residual_title(self, matrix: np.ndarray) -> str:
        title = r"Toeplitz part $T(K)$"
        if not np.isnan(matrix).all():
            title += f", residual {toeplitz_residual(matrix):.2f}"
        if self.p_value is not None and np.isfinite(self.p_value):
            title += f", p = {self.p_value:.2g}"
        return title


def _usable_span(matrix: np.ndarray) -> slice:
    """Return the shells from the first to the last that is not masked; all if all are."""
    known = np.flatnonzero(~np.isnan(matrix).all(axis=0))
    return slice(int(known[0]), int(known[-1]) + 1) if known.size else slice(0, len(matrix))


def _check_columns(name: str, frame: Any, columns: tuple[str, ...]) -> None:
    if frame is None:
        return
    if not isinstance(frame, pd.DataFrame) or not set(columns) <= set(frame.columns):
        raise ValueError(
            f"{name} must be None or a DataFrame with the columns {', '.join(columns)}; pass "
            f"{name}_ of a fitted ToeplitzDiagnostic."
        )


def _make_panels(plt: Any) -> dict[str, Any]:
    """Make a figure with four panels; return them by name."""
    _, axes = plt.subplots(2, 2, figsize=(10.0, 8.6), layout="constrained")
    return dict(zip(_PANELS, axes.ravel(), strict=True))


def _draw_heat_map(
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
        set_log_view(ax, which, (edges[0], edges[-1]), keep=False)
    ax.set_aspect("equal")
    ax.minorticks_off()
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel(LAMBDA_LABEL)
    ax.set_ylabel(LAMBDA_LABEL)
    if title:
        ax.set_title(title, fontsize="medium")
    return mesh


def _coupling_norm(coupling: np.ndarray) -> Any:
    """Return a logarithmic colour norm over the positive couplings."""
    from matplotlib.colors import LogNorm

    positive = coupling[np.isfinite(coupling) & (coupling > 0.0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    # One value still needs a range of colours.
    return LogNorm(low, high if high > low else 10.0 * low)


def _draw_coupling_bar(mesh: Any, axes: list[Any]) -> Any:
    """Add the colour bar of the heat maps and return it."""
    bar = axes[0].figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label(_COUPLING_LABEL)
    bar.outline.set_visible(False)
    set_log_ticks(bar.ax.yaxis, mesh.norm.vmin, mesh.norm.vmax)
    return bar


def _draw_windows(ax: Any, windows: pd.DataFrame) -> list[Any]:
    """Draw the residual of each window against its middle, over the bands of both nulls.

    Returns the handles of a legend.
    """
    from matplotlib.lines import Line2D

    windows = windows.sort_values("lambda_lo")
    middle = np.sqrt(windows[["lambda_lo", "lambda_hi"]].to_numpy(dtype=float)).prod(axis=1)
    set_log_view(ax, "x", log_limits(middle), keep=False)
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
    ax.set_ylabel(_RESIDUAL_LABEL)
    ax.grid(axis="y", color="0.93")
    ax.set_axisbelow(True)
    return handles


def _draw_diagonal(ax: Any, shells: pd.DataFrame, diagonal: pd.DataFrame | None) -> list[Any]:
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
    set_log_view(ax, "x", log_limits(rates), keep=False)
    # Intervals of shells that few batches have may span decades: they leave the view instead.
    seen = np.minimum(bands, _BAR_ROOM * np.nanmax(sizes, initial=0.0))
    set_log_view(ax, "y", log_limits(sizes, bands=seen), keep=False)
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
    ax.set_xlabel(LAMBDA_LABEL)
    ax.set_ylabel(_DIAGONAL_LABEL)
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
