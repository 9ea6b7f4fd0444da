"""Flux of energy between shells against eigenvalue: its parts, and the drift velocity."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays._axes import (
    LAMBDA_LABEL,
    LINE_STYLES,
    MARKER_SIZE,
    TauScale,
    batch_range_handle,
    draw_legend,
    format_number,
    format_power,
    hollow_handle,
    log_limits,
    require_pyplot,
    set_log_view,
    shade_below_floor,
)
from spectralshell.displays._frames import resolution_floor_of
from spectralshell.parameter_checks import check_option

_QUANTITIES = ("flux", "velocity", "parts")
_NEEDED = ("tau", "batch", "edge", "flux_down", "density", "resolved")
_PARTS = ("drift", "rotation")
_FLUX_LABEL = r"flux down $J_\downarrow$  (energy / $\tau$)"
_VELOCITY_LABEL = r"velocity $|v| = |J_\downarrow|/\varepsilon$  (1/$\tau^2$)"
_DRIFT_COLOUR, _ROTATION_COLOUR = "#4477aa", "#ee9944"
_LINEAR_PART = 1e-3  # of the largest flux: below it the signed axis is linear
_FAR_FROM_ONE = 1e3
_PALE = 0.35
_POINT: dict[str, Any] = {"linestyle": "none", "markersize": MARKER_SIZE}
_DECAY_LOOK: dict[str, Any] = {"color": "0.45", "linestyle": (0, (1, 1.5)), "linewidth": 1.1}


class ShellFluxDisplay:
    """Flux through the shell edges and drift velocity against λ, one curve per τ.

    Build it with :meth:`from_estimator` or :meth:`from_frame`, then call :meth:`plot`.

    Parameters
    ----------
    fluxes : DataFrame
        One row per (snapshot, edge): at least ``tau, batch, edge, flux_down, density, resolved``;
        λ in 1/τ, fluxes in energy per τ. ``drift``, ``rotation`` and ``name`` are used where they
        are there.
    velocity_fit : DataFrame or None, default=None
        Power laws of the velocity, as in ``ShellFluxEstimator.velocity_fit_``.
    resolution_floor : float or None, default=None
        λ below which the measurement cannot tell shells apart; that region is shaded.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The panel of fluxes, or the one that was given.
    axes_ : list of matplotlib Axes
        All panels drawn: flux, velocity, and parts where they are known.
    figure_ : matplotlib Figure
    lines_ : list of matplotlib Line2D
        One per curve of the flux, by τ.
    legend_ : matplotlib Legend or None
    colorbar_ : matplotlib Colorbar or None
        There when more than six τ are drawn.

    Examples
    --------
    >>> import pandas as pd
    >>> from matplotlib.figure import Figure
    >>> from spectralshell.displays import ShellFluxDisplay
    >>> fluxes = pd.DataFrame({
    ...     "tau": 0.0, "batch": 0, "edge": [1.0, 2.0], "flux_down": [0.5, -0.25],
    ...     "density": [0.25, 0.25], "resolved": True})
    >>> display = ShellFluxDisplay.from_frame(fluxes).plot(Figure().subplots())
    >>> display.frame()["velocity"].tolist()  # energy falls through the first edge
    [-2.0, 1.0]
    """

    def __init__(
        self,
        *,
        fluxes: pd.DataFrame,
        velocity_fit: pd.DataFrame | None = None,
        resolution_floor: float | None = None,
    ) -> None:
        self.fluxes = fluxes
        self.velocity_fit = velocity_fit
        self.resolution_floor = resolution_floor

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any = None) -> ShellFluxDisplay:
        """Take the fluxes from a fitted estimator.

        Parameters
        ----------
        estimator : ShellFluxEstimator or Pipeline
            Fitted. A pipeline is searched for the step with fluxes.
        X : list of Snapshot or None, default=None
            Other snapshots to measure at the fitted edges (costs their products); None draws the
            training snapshots, with their power law.

        Returns
        -------
        ShellFluxDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError
            If there is no fitted flux estimator.
        """
        steps = [step for _, step in getattr(estimator, "steps", [("", estimator)])]
        measured = next((step for step in steps if hasattr(step, "n_shells_")), None)
        if measured is None or not hasattr(measured, "flux_frame"):
            raise TypeError(
                "estimator must be a fitted ShellFluxEstimator, or a Pipeline with one, got "
                f"{type(estimator).__name__} without fluxes_; call fit first, or use from_frame."
            )
        floor = measured.resolution_floor_
        if X is not None:
            return cls.from_frame(measured.flux_frame(X), resolution_floor=floor)
        fit = measured.velocity_fit_
        return cls.from_frame(measured.fluxes_, velocity_fit=fit, resolution_floor=floor)

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        *,
        velocity_fit: pd.DataFrame | None = None,
        resolution_floor: float | None = None,
    ) -> ShellFluxDisplay:
        """Take the fluxes from a frame.

        Parameters
        ----------
        frame : DataFrame
            ``fluxes_`` or ``flux_frame(X)``.
        velocity_fit : DataFrame or None, default=None
            ``velocity_fit_``.
        resolution_floor : float or None, default=None
            Default: the one in ``frame.attrs``, if any.

        Returns
        -------
        ShellFluxDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError, ValueError
            If ``frame`` is not a frame of fluxes.
        """
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(
                "frame must be a pandas DataFrame of fluxes, got type "
                f"{type(frame).__name__}; pass fluxes_ or flux_frame(X)."
            )
        missing = [column for column in _NEEDED if column not in frame]
        if missing or frame.empty:
            raise ValueError(
                f"frame must have rows and the columns {', '.join(_NEEDED)}, got {len(frame)} rows "
                f"without {', '.join(missing) or 'any'}; pass fluxes_ or flux_frame(X)."
            )
        if resolution_floor is None:
            resolution_floor = resolution_floor_of(frame)
        return cls(fluxes=frame, velocity_fit=velocity_fit, resolution_floor=resolution_floor)

    def frame(self) -> pd.DataFrame:
        """Return the numbers that :meth:`plot` draws.

        Returns
        -------
        DataFrame
            One row per curve and edge: ``tau, [name], edge, flux_down, lower, upper, drift,
            rotation, density, velocity, n_batches, resolved``. Means over batches; ``lower`` and
            ``upper`` are the range over batches, NaN with one; ``velocity`` is minus the mean flux
            over the mean density, NaN where no batch has a mode near the edge.
        """
        table = self.fluxes.copy()
        keys = ["tau", *(["name"] if "name" in table else []), "edge"]
        for part in _PARTS:
            if part not in table:
                table[part] = np.nan
        table["known"] = table["n_near"] > 0 if "n_near" in table else table["density"] > 0
        groups = table.groupby(keys, sort=True)
        means = groups[["flux_down", *_PARTS, "density"]].mean()
        n_batches = groups.size()
        means.insert(1, "lower", groups["flux_down"].min().where(n_batches > 1))
        means.insert(2, "upper", groups["flux_down"].max().where(n_batches > 1))
        velocity = -means["flux_down"] / means["density"].where(means["density"] > 0)
        means["velocity"] = velocity.where(groups["known"].any())
        means["n_batches"] = n_batches
        means["resolved"] = groups["resolved"].all()
        return means.reset_index()

    def plot(
        self, ax: Any = None, *, quantity: str = "flux", tau: float | None = None
    ) -> ShellFluxDisplay:
        """Draw fluxes, velocities and the parts of the flux.

        The flux is positive where energy goes to smaller λ; its axis is linear near zero and
        logarithmic beyond. Edges that are not resolved have pale markers. Velocities are
        filled where energy drifts down and hollow where it drifts up, beside the velocity 2λ² at
        which drift is as fast as decay.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw one quantity; None makes a figure with all panels.
        quantity : {"flux", "velocity", "parts"}, default="flux"
            What to draw on ``ax``.
        tau : float or None, default=None
            The time whose parts are drawn; None takes the one with the largest flux.

        Returns
        -------
        ShellFluxDisplay
            Itself, with ``ax_`` and ``figure_``.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If ``quantity`` is not one of those listed, ``tau`` is not measured, or the parts of
            the flux are asked for and not known.
        """
        check_option("quantity", quantity, _QUANTITIES)
        drawn = self.frame()
        parts = self._parts(drawn, tau)
        if ax is not None and quantity == "parts" and parts is None:
            raise ValueError(
                "quantity='parts' needs drift and rotation, which the matrix-free solver does not "
                "give; measure with solver='exact'."
            )
        plt = require_pyplot("ShellFluxDisplay.plot")
        scale = TauScale(drawn["tau"])
        chosen = [quantity]
        own = ax is None
        if own:
            chosen = ["flux", "velocity"] + (["parts"] if parts is not None else [])
            figure, panels = plt.subplots(
                1, len(chosen), figsize=(4.6 * len(chosen), 4.9), layout="constrained"
            )
            self.axes_ = list(panels)
        else:
            figure, self.axes_ = ax.figure, [ax]
        self.ax_, self.figure_ = self.axes_[0], figure
        self.lines_: list[Any] = []
        handles = self._tau_handles(drawn, scale)
        for name, panel in zip(chosen, self.axes_, strict=True):
            handles += self._draw(name, panel, drawn, scale, parts)
            shade_below_floor(panel, self.resolution_floor, None)
            panel.set_xlabel(LAMBDA_LABEL)
        if not drawn["resolved"].all() and chosen != ["parts"]:
            handles.append(_unresolved_handle())
        self.colorbar_ = scale.draw_colorbar(self.axes_) if scale.uses_colorbar else None
        self.legend_ = self._draw_legend(handles, own)
        return self

    def _draw(
        self,
        name: str,
        panel: Any,
        drawn: pd.DataFrame,
        scale: TauScale,
        parts: pd.DataFrame | None,
    ) -> list[Any]:
        if name == "flux":
            self.lines_ = _draw_fluxes(panel, drawn, scale)
            many = (drawn["n_batches"] > 1).any()
            return [batch_range_handle(drawn["n_batches"])] if many else []
        if name == "velocity":
            return _draw_velocities(panel, drawn, scale, self.velocity_fit)
        if parts is None:
            return []
        label = "parts of the flux at " + scale.label(float(parts["tau"].iloc[0]))
        return _draw_parts(panel, parts, label)

    def _parts(self, drawn: pd.DataFrame, tau: float | None) -> pd.DataFrame | None:
        taus = sorted(set(drawn["tau"]))
        if tau is None:
            tau = float(drawn["tau"].to_numpy()[drawn["flux_down"].abs().to_numpy().argmax()])
        elif tau not in taus:
            raise ValueError(f"tau must be one of the times measured, {taus}, got {tau!r}.")
        at_time = drawn[drawn["tau"] == tau]
        if "name" in at_time:
            at_time = at_time[at_time["name"] == at_time["name"].iloc[0]]
        return None if at_time[list(_PARTS)].isna().to_numpy().any() else at_time

    def _tau_handles(self, drawn: pd.DataFrame, scale: TauScale) -> list[Any]:
        from matplotlib.lines import Line2D

        found: dict[Any, Any] = {}
        for tau, dash, name, _ in _curves_of(drawn):
            if not scale.uses_colorbar:
                colour, marker = scale.colour(tau), scale.marker(tau)
                line = Line2D([], [], color=colour, marker=marker, markersize=MARKER_SIZE)
                line.set_label(scale.label(tau))
                found.setdefault(tau, line)
            if name is not None:
                style = Line2D([], [], color="0.3", linestyle=dash, label=str(name))
                found.setdefault(("name", name), style)
        return list(found.values())

    def _draw_legend(self, handles: list[Any], own: bool) -> Any:
        if not own:
            return draw_legend(self.ax_, handles, place="inside")
        return self.figure_.legend(
            handles=handles, loc="outside lower center", ncols=5, fontsize="small"
        )


def _curves_of(drawn: pd.DataFrame) -> Iterator[tuple[float, Any, Any, pd.DataFrame]]:
    """Yield τ, line style, name (None if all have one) and rows of every curve."""
    names = list(dict.fromkeys(drawn["name"])) if "name" in drawn else [None]
    for i, name in enumerate(names):
        rows = drawn if name is None else drawn[drawn["name"] == name]
        for tau in sorted(set(rows["tau"])):
            label = name if len(names) > 1 else None
            yield tau, LINE_STYLES[i % len(LINE_STYLES)], label, rows[rows["tau"] == tau]


def _draw_fluxes(ax: Any, drawn: pd.DataFrame, scale: TauScale) -> list[Any]:
    """Draw the flux through every edge, with its sign; return the lines."""
    _set_edge_view(ax, drawn)
    _set_signed_view(ax, drawn[["flux_down", "lower", "upper"]].to_numpy(dtype=float))
    ax.axhline(0.0, color="0.3", linewidth=0.9, zorder=1)
    lines = []
    for tau, dash, _, curve in _curves_of(drawn):
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
            markersize=MARKER_SIZE,
            markevery=curve["resolved"].to_numpy(dtype=bool),
        )
        lines.append(line)
        dim = curve[~curve["resolved"].to_numpy(dtype=bool)]
        look = {"color": _pale_of(colour), "marker": "o" if marker == "." else marker}
        ax.plot(dim["edge"], dim["flux_down"], zorder=3, **look, **_POINT)
    _name_directions(ax)
    ax.set_ylabel(_FLUX_LABEL)
    _set_title(ax, "flux through the edges")
    return lines


def _draw_parts(ax: Any, curve: pd.DataFrame, label: str) -> list[Any]:
    """Draw drift and rotation as bars at every edge, and their sum; return the handles."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    _set_edge_view(ax, curve)
    edges = curve["edge"].to_numpy(dtype=float)
    # Two bars beside each other in ln λ, with a gap to those of the next edge.
    bounds = edges[:, None] * _ratio(edges) ** np.array([-0.38, 0.0, 0.38])
    parts = (("drift", _DRIFT_COLOUR, 0), ("rotation", _ROTATION_COLOUR, 1))
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
    ax.set_ylabel(_FLUX_LABEL)
    _set_title(ax, label)
    handles: list[Any] = [
        Patch(color=_DRIFT_COLOUR, label="drift of eigenvalues"),
        Patch(color=_ROTATION_COLOUR, label="rotation of modes"),
    ]
    return [*handles, Line2D([], [], linestyle="none", marker="D", color="0.1", label="sum")]


def _draw_velocities(
    ax: Any, drawn: pd.DataFrame, scale: TauScale, fits: pd.DataFrame | None
) -> list[Any]:
    """Draw |v| at every edge, filled where energy drifts down, hollow where up.

    Pale where it is not resolved, in which case it may not drift at all.
    """
    from matplotlib.lines import Line2D

    _set_edge_view(ax, drawn)
    sizes = np.abs(drawn["velocity"].to_numpy(dtype=float))
    set_log_view(ax, "y", log_limits(sizes), keep=False)
    up = False
    for tau, dash, _, curve in _curves_of(drawn):
        colour, marker = scale.colour(tau), scale.marker(tau)
        marker = "o" if marker == "." else marker
        size = curve["velocity"].abs().where(curve["velocity"] != 0.0)
        ax.plot(curve["edge"], size, color=colour, linestyle=dash, linewidth=0.7, alpha=0.45)
        for rising, known in product((False, True), (True, False)):
            moving = (curve["velocity"] > 0) if rising else (curve["velocity"] < 0)
            chosen = moving & (curve["resolved"] == known)
            shade = colour if known else _pale_of(colour)
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
    ax.set_ylabel(_VELOCITY_LABEL)
    _set_title(ax, "drift velocity")
    handles: list[Any] = [Line2D([], [], marker="o", color="0.3", label="drifts down", **_POINT)]
    if up:
        handles.append(hollow_handle("o", "drifts up"))
    if fits is not None and fits["b"].notna().any():
        handles.append(Line2D([], [], color="0.3", linewidth=1.6, label=_fit_label(fits)))
    return [*handles, Line2D([], [], label=r"as fast as decay, $2\lambda^2$", **_DECAY_LOOK)]


def _unresolved_handle() -> Any:
    """Return the handle of edges that are not resolved, in either panel."""
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", color=_pale_of("0.3"), label="not resolved", **_POINT)


def _pale_of(colour: Any) -> tuple[float, float, float]:
    """Return a colour mixed with white, as opaque as it is: lines end at a pale marker."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1.0 - _PALE * (1.0 - part) for part in to_rgb(colour))
    return red, green, blue


def _set_edge_view(ax: Any, drawn: pd.DataFrame) -> None:
    """Put λ on a logarithmic axis that holds every edge and the bars there."""
    edges = np.unique(drawn["edge"].to_numpy(dtype=float))
    room = _ratio(edges) ** 0.6
    set_log_view(ax, "x", (edges[0] / room, edges[-1] * room), keep=False)


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
    write = format_number if plain else _signed_power
    ax.set_yticks(shown, [write(tick) for tick in shown])
    ax.minorticks_off()


def _signed_power(value: float) -> str:
    if value == 0.0:
        return "0"
    text = format_power(abs(value))
    return text if value > 0 else f"$-{text[1:]}" if text.startswith("$") else f"-{text}"


def _name_directions(ax: Any) -> None:
    look = {"transform": ax.transAxes, "fontsize": "small", "color": "0.45", "ha": "left"}
    bottom, top = ax.get_ylim()
    if top > 0:
        ax.text(0.015, 0.97, r"$\downarrow$ to smaller $\lambda$", va="top", **look)
    if bottom < 0:
        ax.text(0.015, 0.03, r"$\uparrow$ to larger $\lambda$", va="bottom", **look)
