"""The tail fit against its data, with residuals and the alternatives."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays._axes import (
    DENSITY_LABEL,
    LAMBDA_LABEL,
    MARKER_SIZE,
    TauScale,
    draw_invisible,
    draw_legend,
    format_number,
    hollow_handle,
    log_limits,
    require_pyplot,
    set_log_view,
    write_counts,
)
from spectralshell.displays._frames import (
    curve_keys,
    line_styles,
    shell_curves,
    split_curves,
    tidy_energies,
)
from spectralshell.parameter_checks import check_window
from spectralshell.shells.carriers import (
    BATCH,
    FLOOR,
    LAMBDA_MAX,
    NAME,
    TAU,
    measured_rows,
    open_table,
)

_VALUES = ["value", "batch_lower", "batch_upper"]
_DENSITIES = ["density", "density_lower", "density_upper"]
_RESIDUALS = ["residual", "residual_lower", "residual_upper"]
_WINDOW_LOOK = {"facecolor": "0.95", "edgecolor": "0.75", "linewidth": 0.8, "zorder": 0}
_TITLE_WIDTH = 78


class TailFitDisplay:
    """Densities with their spread over batches, the fitted tail, residuals and alternatives.

    Build it with :meth:`from_estimator` or :meth:`from_frame`, then call :meth:`plot`.

    Parameters
    ----------
    tail : DataFrame
        One row per τ and shell: ``tau, [name], lambda_lo, lambda_hi, lambda_mid`` (1/τ),
        ``density, density_lower, density_upper`` (energy per unit λ: mean and range over
        batches), ``n_batches``, ``fit`` (the fitted density, mean over the shell) and
        ``in_window``.
    b : float
        The fitted slope; NaN where there is none.
    b_interval : tuple of float, default=(nan, nan)
    confidence : float, default=0.95
        Level of ``b_interval``.
    window : tuple of float or None, default=None
        (λ_lo, λ_hi) of the fit.
    comparison : DataFrame or None, default=None
        One row per model: ``model`` (its name), ``aic`` and, where known, ``slope`` and ``rank``,
        as in ``GRSDTailFitter.comparison_``. Models of rank 1 share a colour; without ranks only
        the smallest AIC stands out.
    status : str, default="ok"
        The fit's status, written over the plot unless it is ``"ok"``.
    b_by_name : DataFrame or None, default=None
        ``name, b, lower, upper`` as in ``GRSDTailFitter.b_by_name_``; several are written over the
        plot.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
        Those drawn: fit, residuals, alternatives.
    ax_ : matplotlib Axes
        The first of them.
    figure_ : matplotlib Figure
    legend_ : matplotlib Legend or None
    colorbar_ : matplotlib Colorbar or None
        There when more than six τ are drawn.

    Examples
    --------
    >>> import pandas as pd
    >>> from matplotlib.figure import Figure
    >>> from spectralshell.displays import TailFitDisplay
    >>> index = pd.MultiIndex.from_tuples([(0.0, 0), (0.0, 1)], names=["tau", "batch"])
    >>> names = ["null", "shell[1.0,2.0)", "shell[2.0,4.0)"]
    >>> energies = pd.DataFrame([[0, 1.0, 0.5], [0, 3.0, 1.5]], index=index, columns=names)
    >>> fitted = pd.DataFrame([[0, 2.0, 1.0], [0, 2.0, 1.0]], index=index, columns=names)
    >>> display = TailFitDisplay.from_frame(energies, fitted, b=2.0, window=(1.0, 4.0))
    >>> display.frame()["residual"].tolist()
    [0.0, 0.0]
    >>> display.plot(Figure().subplots(2)).axes_.size
    2
    """

    def __init__(
        self,
        *,
        tail: pd.DataFrame,
        b: float,
        b_interval: tuple[float, float] = (np.nan, np.nan),
        confidence: float = 0.95,
        window: tuple[float, float] | None = None,
        comparison: pd.DataFrame | None = None,
        status: str = "ok",
        b_by_name: pd.DataFrame | None = None,
    ) -> None:
        self.tail = tail
        self.b = b
        self.b_interval = b_interval
        self.confidence = confidence
        self.window = window
        self.comparison = comparison
        self.status = status
        self.b_by_name = b_by_name

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any) -> TailFitDisplay:
        """Take the fit from a fitted tail fitter and the data from X.

        Energies are averaged over batches before the fitter reads amplitude and cutoff off them, at
        its own b.

        Parameters
        ----------
        estimator : GRSDTailFitter or Pipeline that ends in one
            Fitted.
        X : DataFrame or whatever the pipeline accepts
            The wide shell frame; for a pipeline its own input, which is measured (a snapshot that
            remembers its measures costs nothing).

        Returns
        -------
        TailFitDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError
            If the estimator is not a fitted tail fitter, or X no shell frame.
        """
        steps = [step for _, step in getattr(estimator, "steps", [("", estimator)])]
        fitter = steps[-1]
        if not hasattr(fitter, "b_") or not hasattr(fitter, "inverse_transform"):
            raise TypeError(
                "estimator must be a fitted GRSDTailFitter, or a Pipeline that ends in one, got "
                f"{type(estimator).__name__} without b_; call fit first, or use from_frame."
            )
        for step in steps[:-1]:
            X = step.transform(X)
        X = measured_rows(X)
        tidy_energies(X, name="X")
        return cls.from_frame(
            X,
            fitter.inverse_transform(fitter.transform(_mean_over_batches(X))),
            b=fitter.b_,
            b_interval=fitter.b_interval_,
            confidence=fitter.confidence,
            window=fitter.window_,
            comparison=fitter.comparison_,
            status=fitter.status_,
            b_by_name=getattr(fitter, "b_by_name_", None),
        )

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        fitted: pd.DataFrame,
        *,
        b: float,
        b_interval: tuple[float, float] = (np.nan, np.nan),
        confidence: float = 0.95,
        window: tuple[float, float] | None = None,
        comparison: pd.DataFrame | None = None,
        status: str = "ok",
        b_by_name: pd.DataFrame | None = None,
    ) -> TailFitDisplay:
        """Take data and fit from two shell frames with the same shells and τ.

        Parameters
        ----------
        frame, fitted : DataFrame
            Measured and fitted energies, each tidy or wide; both are averaged over batches.
        b, b_interval, confidence, window, comparison, status, b_by_name
            As for the class; without a window every shell counts.

        Returns
        -------
        TailFitDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError, ValueError
            If a frame is no shell frame, or their τ and shells differ.
        """
        data = shell_curves(tidy_energies(frame), "density")
        fit = shell_curves(tidy_energies(fitted, name="fitted"), "density")
        keys = [*curve_keys(data), "lambda_lo", "lambda_hi"]
        if not set(keys) <= set(fit.columns) or len(fit) != len(data):
            raise ValueError(
                f"fitted must have the τ and shells of frame, got {len(fit)} rows of shells for "
                f"{len(data)}; pass inverse_transform(transform(frame))."
            )
        fit = fit[[*keys, "value"]].rename(columns={"value": "fit"})
        tail = data.merge(fit, on=keys, how="left", validate="one_to_one")
        tail = tail.rename(columns=dict(zip(_VALUES, _DENSITIES, strict=True)))
        ends = _window_ends(window)
        tail["in_window"] = (tail["lambda_hi"] > ends[0]) & (tail["lambda_lo"] < ends[1])
        return cls(
            tail=tail.drop(columns=["bound_lower", "bound_upper", "resolved"]),
            b=float(b),
            b_interval=(float(b_interval[0]), float(b_interval[1])),
            confidence=float(confidence),
            window=None if window is None else ends,
            comparison=comparison,
            status=str(status),
            b_by_name=b_by_name,
        )

    def frame(self) -> pd.DataFrame:
        """Return the numbers that :meth:`plot` draws.

        Returns
        -------
        DataFrame
            ``tail`` with ``residual`` = ln(density / fit) and ``residual_lower,
            residual_upper`` over batches; residuals are NaN outside the window and where the
            density or the fit is not positive.
        """
        drawn = self.tail.copy()
        log_fit = _log(drawn["fit"]).where(drawn["in_window"])
        for column, density in zip(_RESIDUALS, _DENSITIES, strict=True):
            drawn[column] = _log(drawn[density]) - log_fit
        return drawn

    def plot(self, ax: Any = None) -> TailFitDisplay:
        """Draw the fit, its residuals and the alternatives.

        Parameters
        ----------
        ax : matplotlib Axes, sequence of up to three Axes, or None, default=None
            Where to draw: the fit, then the residuals, then the alternatives; one Axes gets the
            fit only. None makes a figure with all there is to draw.

        Returns
        -------
        TailFitDisplay
            Itself, with ``axes_``, ``ax_`` and ``figure_``.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If there are more than three axes, or none.
        """
        plt = require_pyplot("TailFitDisplay.plot")
        legend_ax = None
        alternatives = self._alternatives()
        if ax is None:
            axes, legend_ax = _make_panels(plt, alternatives is not None)
        else:
            axes = list(np.ravel(ax))
            if not 1 <= len(axes) <= 3:
                raise ValueError(
                    f"ax must be one to three Axes (fit, residuals, alternatives), got {len(axes)}."
                )
        if alternatives is None:
            axes = axes[:2]
        self.axes_ = np.array(axes, dtype=object)
        self.ax_, self.figure_ = axes[0], axes[0].figure

        drawn = self.frame()
        scale = TauScale(drawn["tau"])
        handles = _draw_fit(axes[0], drawn, scale, self.window)
        axes[0].set_title(self._title(), fontsize="medium", loc="left")
        if len(axes) > 1:
            _draw_residuals(axes[1], drawn, scale, self.window)
            axes[1].set_xlim(axes[0].get_xlim())
        if alternatives is not None and len(axes) > 2:
            _draw_alternatives(axes[2], alternatives)
        self.colorbar_ = scale.draw_colorbar(axes[:2]) if scale.uses_colorbar else None
        if legend_ax is not None:
            self.legend_ = _fill_legend_panel(legend_ax, handles, len(axes) > 2)
        else:
            self.legend_ = draw_legend(axes[0], handles, place="inside")
        return self

    def _alternatives(self) -> pd.DataFrame | None:
        """Return ``delta_aic, slope, rank`` by model; None where no AIC is known."""
        if self.comparison is None or self.comparison["aic"].isna().all():
            return None
        table = self.comparison.set_index("model")
        if "rank" not in table:
            table = table.assign(rank=table["aic"].rank(method="min"))
        table = table.reindex(columns=["aic", "slope", "rank"]).astype(float)
        return table.assign(delta_aic=table["aic"] - table["aic"].min())

    def _title(self) -> str:
        lower, upper = self.b_interval
        if not np.isfinite(self.b):
            text = "no tail slope"
        elif np.isnan([lower, upper]).any():
            text = f"tail slope $b$ = {self.b:.3f}, no interval"
        else:
            percent = format_number(100 * self.confidence)
            text = f"tail slope $b$ = {self.b:.3f}, {percent} % interval [{lower:.3f}, {upper:.3f}]"
        if self.b_by_name is not None and len(self.b_by_name) > 1:
            text += "\n" + fill(
                ", ".join(map(_write_slope, self.b_by_name.itertuples())), _TITLE_WIDTH
            )
        if self.status != "ok":
            text += "\n" + fill(self.status, _TITLE_WIDTH)
        return text


def _mean_over_batches(X: Any) -> pd.DataFrame:
    """Return the mean of each curve as one batch, at the highest floor and lowest λ_max."""
    table = open_table(X)
    frame = table.by_label()
    keys = [key for key in (TAU, NAME) if key in table.labels]
    mean = frame.groupby(level=keys, dropna=False).mean()
    levels = mean.index.to_frame(index=False).assign(**{BATCH: 0})
    labels = pd.DataFrame(table.labels)
    for label, worst in {LAMBDA_MAX: "min", FLOOR: "max"}.items():
        if label in labels:
            levels[label] = labels.groupby(keys, dropna=False)[label].agg(worst).to_numpy()
    mean.index = pd.MultiIndex.from_frame(levels)
    mean.attrs = dict(table.energies.attrs)
    return mean


def _write_slope(row: Any) -> str:
    if not np.isfinite(row.b):
        return f"{row.name}: none"
    return f"{row.name}: {row.b:.3f} [{row.lower:.3f}, {row.upper:.3f}]"


def _window_ends(window: Any) -> tuple[float, float]:
    """Return the ends of a window; all of λ for None, and nothing for a window of NaN."""
    if window is None:
        return -np.inf, np.inf
    if np.isnan(np.asarray(window, dtype=float)).any():
        return np.nan, np.nan
    low, high = window
    check_window("window", (low, high))
    return float(low), float(high)


def _log(values: pd.Series) -> pd.Series:
    return pd.Series(np.log(values.where(values > 0)), index=values.index)


def _make_panels(plt: Any, with_alternatives: bool) -> tuple[list[Any], Any]:
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


def _fill_legend_panel(ax: Any, handles: list[Any], with_alternatives: bool) -> Any:
    """Draw the legend in its own panel.

    At the right over the alternatives, whose names leave room to its left; else at the left.
    """
    side = "right" if with_alternatives else "left"
    return ax.legend(handles=handles, loc=f"upper {side}", fontsize="small", borderaxespad=0.0)


def _draw_fit(
    ax: Any, drawn: pd.DataFrame, scale: TauScale, window: tuple[float, float] | None
) -> list[Any]:
    """Draw densities with batch ranges and fitted curves; return the legend's handles.

    Outside the window data are hollow and the fit, which extrapolates there, is dotted.
    """
    from matplotlib.lines import Line2D

    set_log_view(
        ax,
        "x",
        log_limits(drawn[["lambda_lo", "lambda_hi"]].to_numpy()),
        keep=False,
    )
    bands = drawn[_DENSITIES[1:]].to_numpy()
    limits = log_limits(drawn["density"].to_numpy(), bands=bands)
    set_log_view(ax, "y", limits, keep=False)
    handles = [] if scale.uses_colorbar else _tau_handles(scale)
    dashes = line_styles(drawn)
    handles += [
        Line2D([], [], color="0.3", linestyle=dash, label=str(name))
        for name, dash in dashes.items()
    ]
    any_invisible = False
    for tau, name, curve in split_curves(drawn):
        colour, marker = scale.colour(tau), scale.marker(tau)
        values = curve[["lambda_mid"]].assign(value=curve["density"])
        any_invisible |= draw_invisible(ax, values, colour)
        _draw_points(ax, curve, _DENSITIES, colour, marker)
        fit = curve["fit"].where(curve["fit"] > 0)
        ax.plot(curve["lambda_mid"], fit, color=colour, linestyle=":", linewidth=1.0)
        inside = fit.where(curve["in_window"])
        dash = dashes.get(name, "-")
        ax.plot(curve["lambda_mid"], inside, color=colour, linewidth=1.6, linestyle=dash)
    handles.append(_data_handle(drawn))
    if not drawn["in_window"].all():
        handles.append(hollow_handle("o", "data outside the window"))
    if (drawn["fit"] > 0).any():
        handles.append(
            Line2D([], [], color="0.3", linewidth=1.6, label="fit (dotted: extrapolated)")
        )
    if any_invisible:
        handles.append(hollow_handle("v", "zero, or below the view"))
    handles += _draw_window(ax, window)
    has_labels = ax.xaxis.get_major_ticks(1)[0].label1.get_visible()
    ax.set_xlabel(LAMBDA_LABEL if has_labels else "")
    ax.set_ylabel(DENSITY_LABEL)
    return handles


def _draw_residuals(
    ax: Any, drawn: pd.DataFrame, scale: TauScale, window: tuple[float, float] | None
) -> None:
    """Draw ln(data / fit) in the window, with the range over batches."""
    ends = drawn[["lambda_lo", "lambda_hi"]].to_numpy()
    set_log_view(ax, "x", log_limits(ends), keep=False)
    for tau, _, curve in split_curves(drawn):
        _draw_points(ax, curve, _RESIDUALS, scale.colour(tau), scale.marker(tau))
    ax.axhline(0.0, color="0.3", linewidth=1.0, zorder=1)
    values = drawn[_RESIDUALS].to_numpy()
    values = values[np.isfinite(values)]
    if not values.size:
        ax.text(0.5, 0.6, "no residuals", transform=ax.transAxes, ha="center", fontsize="small")
    reach = 1.15 * np.abs(values).max(initial=0.0)
    reach = reach if reach > 1e-9 else 0.1
    ax.set_ylim(-reach, reach)
    _draw_window(ax, window)
    ax.set_xlabel(LAMBDA_LABEL)
    ax.set_ylabel(r"$\ln$(data / fit)")


def _draw_alternatives(ax: Any, alternatives: pd.DataFrame) -> None:
    """Draw the AIC of each model above the smallest as bars, best first.

    Models of rank 1 are not told apart from the best and have its colour.
    """
    ranked = alternatives["delta_aic"].sort_values()
    places = np.arange(len(ranked))
    lengths = ranked.fillna(0.0).to_numpy()
    colours = ["#31688e" if rank == 1 else "0.7" for rank in alternatives["rank"][ranked.index]]
    ax.barh(places, lengths, color=colours, height=0.55)
    ax.plot(ranked, places, "o", color="0.25", markersize=MARKER_SIZE, clip_on=False)
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
            markersize=MARKER_SIZE if marker != "." else 3.0,
            color=colour,
            markerfacecolor=colour if inside else "white",
        )


def _draw_window(ax: Any, window: tuple[float, float] | None) -> list[Any]:
    if window is None or not np.isfinite(window).all():
        return []
    label = f"window: $\\lambda$ {format_number(window[0])}–{format_number(window[1])}"
    left, right = ax.get_xlim()
    return [ax.axvspan(max(window[0], left), min(window[1], right), label=label, **_WINDOW_LOOK)]


def _tau_handles(scale: TauScale) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [],
            [],
            color=scale.colour(tau),
            marker=scale.marker(tau),
            markersize=MARKER_SIZE,
            label=scale.label(tau),
        )
        for tau in scale.taus
    ]


def _data_handle(drawn: pd.DataFrame) -> Any:
    from matplotlib.lines import Line2D

    counts = sorted(set(drawn["n_batches"]))
    text = "data"
    if counts and counts[-1] > 1:
        text = f"data, range over {write_counts(counts)} batches"
    return Line2D(
        [], [], color="0.3", marker="o", linestyle="none", markersize=MARKER_SIZE, label=text
    )
