"""Shell energies against eigenvalue, one curve per training time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays._axes import (
    DENSITY_LABEL,
    LAMBDA_LABEL,
    MARKER_SIZE,
    TauScale,
    batch_range_handle,
    draw_invisible,
    draw_legend,
    format_number,
    hollow_handle,
    log_limits,
    require_pyplot,
    set_log_view,
    shade_below_floor,
)
from spectralshell.displays._frames import (
    curve_keys,
    line_styles,
    resolution_floor_of,
    share_outside,
    shell_curves,
    split_curves,
    tidy_energies,
)
from spectralshell.parameter_checks import check_option
from spectralshell.shells.carriers import NAME, measured_rows

_LABELS = {
    "energy": r"shell energy $E_\alpha$  (units of the loss)",
    "density": DENSITY_LABEL,
}
_BANDS = ("auto", "batches", "bounds", "none")
_FLOOR_ROOM = 10.0  # a floor further below the first shell would leave decades of the axis empty
_FRONTIER_COLUMNS = ("tau", "frontier")


class ShellEnergyDisplay:
    """Shell energies, or their density, against λ: one curve per τ with its band.

    Build it with :meth:`from_estimator` or :meth:`from_frame`, then call :meth:`plot`.

    Parameters
    ----------
    shells : DataFrame
        Tidy shell frame, one row per (snapshot, shell): at least ``tau, batch, shell, lambda_lo,
        lambda_hi, energy``; λ in 1/τ, energies in units of the loss. Bounds, ``resolved`` and
        ``name`` are used where they are there.
    frontiers : DataFrame or None, default=None
        ``tau, [name], frontier`` and, where known, ``frontier_lower, frontier_upper`` (1/τ), as in
        ``GRSDTailFitter.frame_``. NaN frontiers are not drawn.
    resolution_floor : float or None, default=None
        λ below which the measurement cannot tell shells apart; that region is shaded.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Where the curves are.
    figure_ : matplotlib Figure
    lines_ : list of matplotlib Line2D or StepPatch
        One per curve, by τ.
    bands_ : list of matplotlib collections
        One per curve with a band.
    frontier_lines_ : list of matplotlib Line2D
        Those in view.
    legend_ : matplotlib Legend or None
    colorbar_ : matplotlib Colorbar or None
        There when more than six τ are drawn.

    Examples
    --------
    >>> import pandas as pd
    >>> from matplotlib.figure import Figure
    >>> from spectralshell.displays import ShellEnergyDisplay
    >>> shells = pd.DataFrame({
    ...     "tau": 0.0, "batch": 0, "shell": ["shell[1.0,2.0)", "shell[2.0,4.0)"],
    ...     "lambda_lo": [1.0, 2.0], "lambda_hi": [2.0, 4.0], "energy": [0.5, 0.25]})
    >>> display = ShellEnergyDisplay.from_frame(shells)
    >>> display = display.plot(Figure().subplots(), quantity="density")
    >>> display.frame("density")["value"].tolist()
    [0.5, 0.125]
    """

    def __init__(
        self,
        *,
        shells: pd.DataFrame,
        frontiers: pd.DataFrame | None = None,
        resolution_floor: float | None = None,
    ) -> None:
        self.shells = shells
        self.frontiers = frontiers
        self.resolution_floor = resolution_floor

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any = None, *, fitter: Any = None
    ) -> ShellEnergyDisplay:
        """Take the curves from a fitted estimator.

        Parameters
        ----------
        estimator : ShellEnergyEstimator or Pipeline
            Fitted. A pipeline is searched for the step with shells and for the tail fitter, whose
            frontiers are then marked.
        X : list of Snapshot or None, default=None
            Other snapshots to measure at the fitted edges (costs their products); None draws the
            training snapshots.
        fitter : GRSDTailFitter or None, default=None
            Fitted; supplies frontiers. Default: the one in the pipeline, if any.

        Returns
        -------
        ShellEnergyDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError
            If there is no fitted shell estimator.
        """
        steps = [step for _, step in getattr(estimator, "steps", [("", estimator)])]
        position = next((i for i, step in enumerate(steps) if hasattr(step, "shells_")), None)
        if position is None:
            raise TypeError(
                "estimator must be a fitted ShellEnergyEstimator, or a Pipeline with one, got "
                f"{type(estimator).__name__} without shells_; call fit first, or use from_frame."
            )
        measured = steps[position]
        if fitter is None:
            fitter = next((step for step in steps[position + 1 :] if _has_frontiers(step)), None)
        if X is None:
            shells = measured.shells_
        else:
            for step in steps[:position]:
                X = step.transform(X)
            shells = measured.shell_frame(X)
        return cls.from_frame(
            shells,
            fitter=fitter,
            resolution_floor=getattr(measured, "resolution_floor_", None),
        )

    @classmethod
    def from_frame(
        cls, frame: pd.DataFrame, *, fitter: Any = None, resolution_floor: float | None = None
    ) -> ShellEnergyDisplay:
        """Take the curves from a tidy or a wide shell frame.

        Parameters
        ----------
        frame : DataFrame
            ``shells_``, ``shell_frame(X)`` or ``transform(X)``, of pandas or of what Arrow reads; a
            wide frame has no certified bounds.
        fitter : GRSDTailFitter, DataFrame or None, default=None
            Where the frontiers come from: a fitted tail fitter or a frame like its ``frame_``.
            Where both have names, those of other names are left out.
        resolution_floor : float or None, default=None
            Default: the frame's, if it has one; the highest of its rows.

        Returns
        -------
        ShellEnergyDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError, ValueError
            If ``frame`` is not a shell frame, or ``fitter`` has no frontiers.
        """
        shells = tidy_energies(measured_rows(frame))
        if resolution_floor is None:
            resolution_floor = resolution_floor_of(shells)
        frontiers = _of_names(_frontiers_of(fitter), shells)
        return cls(shells=shells, frontiers=frontiers, resolution_floor=resolution_floor)

    def frame(self, quantity: str = "energy", *, band: str = "auto") -> pd.DataFrame:
        """Return the numbers that :meth:`plot` draws with the same arguments.

        Parameters
        ----------
        quantity : {"energy", "density"}, default="energy"
        band : {"auto", "batches", "bounds", "none"}, default="auto"

        Returns
        -------
        DataFrame
            One row per curve and shell: ``tau, [name], lambda_lo, lambda_hi, lambda_mid, value,
            lower, upper, n_batches, resolved`` and, with a fitter, ``frontier, frontier_lower,
            frontier_upper`` of the row's τ and name. ``lower`` and ``upper`` are NaN without a
            band.
        """
        curves, band = self._curves(quantity, band)
        if self.frontiers is None:
            return curves
        columns = ["frontier", "frontier_lower", "frontier_upper"]
        keys = [key for key in curve_keys(curves) if key in self.frontiers]
        known = self.frontiers.reindex(columns=[*keys, *columns]).drop_duplicates(keys)
        return curves.merge(known, on=keys, how="left")

    def _curves(self, quantity: str, band: str) -> tuple[pd.DataFrame, str]:
        check_option("quantity", quantity, tuple(_LABELS))
        check_option("band", band, _BANDS)
        curves = shell_curves(self.shells, quantity)
        if band == "auto":
            many = (curves["n_batches"] > 1).any()
            bounded = curves["bound_lower"].notna().any()
            band = "batches" if many else "bounds" if bounded else "none"
        source = {"batches": "batch", "bounds": "bound"}.get(band)
        lower: Any = np.nan
        upper: Any = np.nan
        if source is not None:
            lower, upper = curves[f"{source}_lower"], curves[f"{source}_upper"]
        position = list(curves.columns).index("value") + 1
        curves.insert(position, "lower", lower)
        curves.insert(position + 1, "upper", upper)
        unused = ["batch_lower", "batch_upper", "bound_lower", "bound_upper"]
        return curves.drop(columns=unused), band

    def plot(
        self,
        ax: Any = None,
        *,
        quantity: str = "energy",
        band: str = "auto",
        style: str = "line",
    ) -> ShellEnergyDisplay:
        """Draw the curves on logarithmic axes.

        Shells below the resolution floor have hollow markers; shells without a visible value (zero,
        or rounding) are triangles at the lower edge.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure. Limits of used axes are widened, not replaced.
        quantity : {"energy", "density"}, default="energy"
            E_α, or E_α per unit λ: only the density's slope is b.
        band : {"auto", "batches", "bounds", "none"}, default="auto"
            Range over batches, certified bounds (mean over batches), or no band. ``"auto"`` takes
            batches where there are several, else bounds where there are any.
        style : {"line", "step"}, default="line"
            Markers at the geometric middle of each shell, or steps over the whole shell.

        Returns
        -------
        ShellEnergyDisplay
            Itself, with ``ax_`` and ``figure_``.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If an option is not one of those listed.
        """
        check_option("style", style, ("line", "step"))
        curves, band = self._curves(quantity, band)
        plt = require_pyplot("ShellEnergyDisplay.plot")
        own = ax is None
        if own:
            _, ax = plt.subplots(figsize=(7.8, 4.6), layout="constrained")
        self.ax_, self.figure_ = ax, ax.figure
        used = not own and ax.has_data()

        ends = np.concatenate(
            [curves["lambda_lo"], curves["lambda_hi"], [self._floor_in_view(curves)]]
        )
        set_log_view(ax, "x", log_limits(ends), keep=used)
        bands = curves[["lower", "upper"]].to_numpy(dtype=float)
        limits = log_limits(curves["value"].to_numpy(), bands=bands)
        set_log_view(ax, "y", limits, keep=used)

        scale = TauScale(curves["tau"])
        handles = self._draw_curves(curves, scale, style)
        handles += self._band_handle(curves, band)
        handles += self._draw_frontiers(scale)
        handles += self._draw_floor()
        self.colorbar_ = scale.draw_colorbar([ax]) if scale.uses_colorbar else None
        ax.set_xlabel(LAMBDA_LABEL)
        ax.set_ylabel(_LABELS[quantity])
        place = "inside" if not own else "below" if scale.uses_colorbar else "right"
        self.legend_ = draw_legend(ax, handles, place=place)
        return self

    def _floor_in_view(self, curves: pd.DataFrame) -> float:
        """Return the resolution floor where it is near the first shell, else NaN."""
        floor = self.resolution_floor or np.nan
        return floor if floor * _FLOOR_ROOM >= curves["lambda_lo"].min() else np.nan

    def _draw_curves(self, curves: pd.DataFrame, scale: TauScale, style: str) -> list[Any]:
        """Draw every curve with its band; return the legend's handles."""
        from matplotlib.lines import Line2D

        self.lines_, self.bands_ = [], []
        handles, any_invisible = [], False
        dashes = line_styles(curves)
        for tau, name, curve in split_curves(curves):
            look: dict[str, Any] = {"color": scale.colour(tau), "linestyle": dashes.get(name, "-")}
            label = scale.label(tau) + (f", {name}" if dashes else "")
            self.bands_ += _draw_band(self.ax_, curve, look["color"], style)
            draw = _draw_steps if style == "step" else _draw_line
            marker = scale.marker(tau)
            self.lines_.append(draw(self.ax_, curve, look, marker, label))
            any_invisible |= draw_invisible(self.ax_, curve, look["color"])
            if not scale.uses_colorbar:
                shown = marker if style == "line" else None
                handle = Line2D([], [], marker=shown, markersize=MARKER_SIZE, label=label, **look)
                handles.append(handle)
        if scale.uses_colorbar:
            handles += [
                Line2D([], [], color="0.3", linestyle=dash, label=str(name))
                for name, dash in dashes.items()
            ]
        in_view = curves["value"] > self.ax_.get_ylim()[0]
        if style == "line" and (in_view & ~curves["resolved"]).any():
            handles.append(hollow_handle("o", "not resolved"))
        if any_invisible:
            handles.append(hollow_handle("v", "zero, or below the view"))
        return handles

    def _band_handle(self, curves: pd.DataFrame, band: str) -> list[Any]:
        from matplotlib.patches import Patch

        if not self.bands_:
            return []
        if band == "batches":
            return [batch_range_handle(curves["n_batches"])]
        return [Patch(color="0.5", alpha=0.3, linewidth=0, label="certified bounds")]

    def _draw_frontiers(self, scale: TauScale) -> list[Any]:
        """Mark the frontiers in view: dashed verticals, their intervals along the upper edge."""
        from matplotlib.lines import Line2D

        self.frontier_lines_ = []
        if self.frontiers is None:
            return []
        left, right = self.ax_.get_xlim()
        known = self.frontiers.reindex(
            columns=["tau", "frontier", "frontier_lower", "frontier_upper"]
        ).sort_values("tau")
        known = known[known["tau"].isin(scale.taus) & known["frontier"].between(left, right)]
        label = r"frontier $\lambda^*$"
        for i, (tau, frontier, lower, upper) in enumerate(known.to_numpy(dtype=float)):
            look = {"color": scale.colour(tau), "linewidth": 1.0}
            line = self.ax_.axvline(frontier, linestyle=(0, (4, 3)), zorder=1, **look)
            self.frontier_lines_.append(line)
            if lower > 0 and not scale.uses_colorbar:
                ends = np.clip([lower, upper], left, right)
                label = r"frontier $\lambda^*$, bar: interval"
                height = 0.985 - 0.02 * i
                self.ax_.plot(
                    ends,
                    [height, height],
                    transform=self.ax_.get_xaxis_transform(),
                    scalex=False,
                    scaley=False,
                    **{**look, "linewidth": 2.5},
                )
        if not self.frontier_lines_:
            return []
        return [Line2D([], [], color="0.3", linestyle=(0, (4, 3)), linewidth=1.0, label=label)]

    def _draw_floor(self) -> list[Any]:
        from matplotlib.lines import Line2D

        share = share_outside(self.shells)
        label = "below resolution floor"
        if share.size:
            low, high = 100 * share.min(), 100 * share.max()
            span = f"{low:.2g}" if high - low < 0.5 else f"{low:.2g}–{high:.2g}"
            label += f"\n({span} % of energy in no shell)"
        floor = self.resolution_floor
        patch = shade_below_floor(self.ax_, floor, label)
        if patch is not None:
            return [patch]
        if not floor or not np.isfinite(floor):
            return []
        return [
            Line2D([], [], linestyle="none", label=f"{label},\n{format_number(floor)}, is off view")
        ]


def _draw_line(ax: Any, curve: pd.DataFrame, look: dict[str, Any], marker: str, label: str) -> Any:
    """Draw markers joined by lines, hollow where the shell is not resolved; return the line."""
    values = curve["value"].where(curve["value"] > 0).to_numpy()
    middles = curve["lambda_mid"].to_numpy()
    (line,) = ax.plot(
        middles, values, marker=marker, markersize=MARKER_SIZE, linewidth=1.4, label=label, **look
    )
    hollow = ~curve["resolved"].to_numpy(dtype=bool)
    if hollow.any():
        ax.plot(
            middles[hollow],
            values[hollow],
            marker="o" if marker == "." else marker,
            markersize=MARKER_SIZE,
            linestyle="none",
            color=look["color"],
            markerfacecolor="white",
        )
    return line


def _draw_steps(ax: Any, curve: pd.DataFrame, look: dict[str, Any], marker: str, label: str) -> Any:
    """Draw a step over every shell; return the patch."""
    values = curve["value"].where(curve["value"] > 0).to_numpy()
    return ax.stairs(values, _edges(curve), baseline=None, linewidth=1.4, label=label, **look)


def _draw_band(ax: Any, curve: pd.DataFrame, colour: Any, style: str) -> list[Any]:
    """Fill between ``lower`` and ``upper``; return the artist in a list, empty without a band.

    One shell has no width between middles, so its band is a thick bar.
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


def _edges(curve: pd.DataFrame) -> np.ndarray:
    return np.append(curve["lambda_lo"], curve["lambda_hi"].iloc[-1])


def _has_frontiers(step: Any) -> bool:
    frame = getattr(step, "frame_", None)
    return isinstance(frame, pd.DataFrame) and set(_FRONTIER_COLUMNS) <= set(frame.columns)


def _frontiers_of(fitter: Any) -> pd.DataFrame | None:
    """Return the frame with frontiers of a fitter, a pipeline that ends in one, or a frame."""
    if fitter is None:
        return None
    steps = [step for _, step in getattr(fitter, "steps", [("", fitter)])]
    frame = fitter if isinstance(fitter, pd.DataFrame) else getattr(steps[-1], "frame_", None)
    if frame is None or not set(_FRONTIER_COLUMNS) <= set(frame.columns):
        raise TypeError(
            "fitter must be a fitted GRSDTailFitter or a frame with columns tau and frontier, got "
            f"{type(fitter).__name__}; call fit first."
        )
    return frame


def _of_names(frontiers: pd.DataFrame | None, shells: pd.DataFrame) -> pd.DataFrame | None:
    """Return the frontiers of the runs that are drawn."""
    if frontiers is None or not {NAME} <= set(frontiers) & set(shells):
        return frontiers
    return frontiers[frontiers[NAME].astype(str).isin(set(shells[NAME].astype(str)))]
