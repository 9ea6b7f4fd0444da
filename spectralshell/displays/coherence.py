"""Coherence of the blocks of a Jacobian, its decay with distance, and norms along a trajectory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays._axes import (
    MARKER_SIZE,
    TauScale,
    distinct_labels,
    draw_legend,
    log_limits,
    require_pyplot,
    set_log_view,
)
from spectralshell.parameter_checks import check_option

_LABELS = {
    "normalized": r"$\|J_l^* J_m\|\;/\;\|J_l\|\,\|J_m\|$",
    "coherence": r"$\|J_l^* J_m\|$  (1/$\tau$)",
    "influence": r"$\|D_{lm}\|_F\;/\;\|\dot{M}_l\|_F$",
}
_QUANTITIES = tuple(_LABELS)
_PAIRS = ("tau", "batch", "block", "other", "depth", "other_depth", "distance", *_QUANTITIES)
_NORMS = ("tau", "jacobian_norm", "jacobian_rate")
_MOST_NAMES = 20
_LONGEST_NAME = 14
_MOST_BANDS = 3
_NORM_COLOUR, _RATE_COLOUR = "#31688e", "#b5367a"


class CoherenceDisplay:
    """Heat map of the coherence of blocks, its decay with their distance, and ‖J‖ and ‖dJ/dt‖.

    Build it with :meth:`from_estimator` or :meth:`from_frame`, then call :meth:`plot`.

    Parameters
    ----------
    pairs : DataFrame
        One row per snapshot and ordered pair of blocks, as ``coherence_`` of
        :class:`~spectralshell.JacobianBlockDiagnostic`, of one run.
    norms : DataFrame or None, default=None
        One row per snapshot: ``tau, jacobian_norm, jacobian_rate``; None leaves that panel out.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
        Those drawn: heat map, decay, norms.
    ax_ : matplotlib Axes
        The first of them.
    figure_ : matplotlib Figure
    image_ : matplotlib QuadMesh
    lines_ : list of matplotlib Line2D
        Decay, one per τ.
    legend_ : matplotlib Legend or None
    colorbar_ : matplotlib Colorbar
        Of the heat map.

    Examples
    --------
    >>> import pandas as pd
    >>> from matplotlib.figure import Figure
    >>> from spectralshell.displays import CoherenceDisplay
    >>> pairs = pd.DataFrame({
    ...     "tau": 0.0, "batch": 0, "block": ["a", "a", "b", "b"], "other": ["a", "b", "a", "b"],
    ...     "depth": [0, 0, 1, 1], "other_depth": [0, 1, 0, 1], "distance": [0, 1, 1, 0],
    ...     "coherence": [4.0, 1.0, 1.0, 1.0], "normalized": [1.0, 0.5, 0.5, 1.0],
    ...     "influence": [0.0, 1.0, 1.0, 0.0]})
    >>> display = CoherenceDisplay.from_frame(pairs).plot(Figure().subplots())
    >>> display.frame("normalized")["value"].tolist()
    [1.0, 0.5, 0.5, 1.0]
    """

    def __init__(self, *, pairs: pd.DataFrame, norms: pd.DataFrame | None = None) -> None:
        self.pairs = pairs
        self.norms = norms

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any = None, *, name: str | None = None
    ) -> CoherenceDisplay:
        """Take the frames from a fitted diagnostic.

        Parameters
        ----------
        estimator : JacobianBlockDiagnostic, or Pipeline that ends in one
            Fitted.
        X : list of Snapshot or None, default=None
            Other snapshots to measure; None draws the training snapshots.
        name : str or None, default=None
            Which run, where snapshots have names.

        Returns
        -------
        CoherenceDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError
            If the estimator is not a fitted diagnostic.
        ValueError
            If there are several runs and no ``name``.
        """
        steps = [step for _, step in getattr(estimator, "steps", [("", estimator)])]
        diagnostic = steps[-1]
        if not hasattr(diagnostic, "coherence_"):
            raise TypeError(
                "estimator must be a fitted JacobianBlockDiagnostic, or a Pipeline that ends in "
                f"one, got {type(estimator).__name__} without coherence_; call fit first, or use "
                "from_frame."
            )
        if X is None:
            return cls.from_frame(diagnostic.coherence_, diagnostic.trajectory_, name=name)
        for step in steps[:-1]:
            X = step.transform(X)
        X = list(X)
        norms = diagnostic.transform(X).reset_index()
        return cls.from_frame(diagnostic.coherence_frame(X), norms, name=name)

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        norms: pd.DataFrame | None = None,
        *,
        name: str | None = None,
    ) -> CoherenceDisplay:
        """Take the pairs from a frame, and the norms from another.

        Parameters
        ----------
        frame : DataFrame
            ``coherence_`` or ``coherence_frame(X)``.
        norms : DataFrame or None, default=None
            ``trajectory_``, or ``transform(X)``, whose index holds τ.
        name : str or None, default=None
            Which run, where there are several.

        Returns
        -------
        CoherenceDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError, ValueError
            If a frame lacks columns, or holds several runs and no ``name`` is given.
        """
        pairs = _rows_of_name(_with_columns("frame", frame, _PAIRS), name)
        if norms is not None:
            flat = norms if "tau" in norms else norms.reset_index()
            norms = _rows_of_name(_with_columns("norms", flat, _NORMS), name)
        return cls(pairs=pairs, norms=norms)

    def frame(self, quantity: str = "normalized") -> pd.DataFrame:
        """Return the numbers that :meth:`plot` draws in the heat map, for every τ.

        Parameters
        ----------
        quantity : {"normalized", "coherence", "influence"}, default="normalized"

        Returns
        -------
        DataFrame
            One row per τ and ordered pair of blocks, averaged over batches: ``tau, block, other,
            depth, other_depth, distance, value, n_batches``. The decay panel has their mean and
            range at each distance.
        """
        check_option("quantity", quantity, _QUANTITIES)
        keys = ["tau", "depth", "other_depth", "block", "other", "distance"]
        grouped = self.pairs.groupby(keys, sort=True)[quantity]
        mean = grouped.agg(value="mean", n_batches="size").reset_index()
        order = ["tau", "block", "other", "depth", "other_depth", "distance", "value", "n_batches"]
        return mean[order]

    def plot(self, ax: Any = None, *, quantity: str = "normalized") -> CoherenceDisplay:
        """Draw the panels.

        A symmetric quantity has the first τ below the diagonal of the heat map and the last above
        it; ``"influence"`` (how much of the change of a row's block the motion of the column's
        makes) has the last τ alone.

        Parameters
        ----------
        ax : matplotlib Axes, sequence of up to three Axes, or None, default=None
            Where to draw: heat map, decay, norms; one Axes gets the heat map only. None makes a
            figure with all there is to draw.
        quantity : {"normalized", "coherence", "influence"}, default="normalized"
            ‖J_l* J_m‖ / (‖J_l‖ ‖J_m‖), ‖J_l* J_m‖ itself, or ‖D_lm‖_F / ‖dM_l‖_F.

        Returns
        -------
        CoherenceDisplay
            Itself, with ``axes_``, ``ax_`` and ``figure_``.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        ValueError
            If ``quantity`` is unknown, or there are more than three axes, or none.
        """
        drawn = self.frame(quantity)
        plt = require_pyplot("CoherenceDisplay.plot")
        own = ax is None
        if own:
            axes = _make_panels(plt, self.norms is not None)
        else:
            axes = list(np.ravel(ax))
            if not 1 <= len(axes) <= 3:
                raise ValueError(
                    f"ax must be one to three Axes (heat map, decay, norms), got {len(axes)}."
                )
        if self.norms is None:
            axes = axes[:2]
        self.axes_ = np.array(axes, dtype=object)
        self.ax_, self.figure_ = axes[0], axes[0].figure
        self.image_, self.colorbar_ = _draw_heat_map(axes[0], drawn, quantity)
        self.lines_: list[Any] = []
        self.legend_: Any = None
        if len(axes) > 1:
            scale = TauScale(drawn["tau"])
            self.lines_, handles = _draw_decay(axes[1], drawn, scale, quantity)
            if scale.uses_colorbar:
                scale.draw_colorbar([axes[1]])
            place = "right" if own and not scale.uses_colorbar else "inside"
            self.legend_ = draw_legend(axes[1], handles, place=place)
        if len(axes) > 2 and self.norms is not None:
            _draw_norms(axes[2], self.norms)
        return self


def _with_columns(label: str, frame: Any, columns: tuple[str, ...]) -> pd.DataFrame:
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"{label} must be a pandas DataFrame, got {type(frame).__name__}.")
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(
            f"{label} must have the columns {', '.join(columns)}, and lacks {', '.join(missing)}; "
            "pass the frames of a JacobianBlockDiagnostic."
        )
    return frame


def _rows_of_name(frame: pd.DataFrame, name: str | None) -> pd.DataFrame:
    if "name" not in frame:
        return frame
    names = list(dict.fromkeys(frame["name"]))
    if name is None and len(names) == 1:
        return frame
    if name not in names:
        raise ValueError(f"name must be one of {names} where snapshots have names, got {name!r}.")
    return frame[frame["name"] == name]


def _make_panels(plt: Any, with_norms: bool) -> list[Any]:
    """Make a figure; return its panels: heat map, decay and, if asked for, norms."""
    figure = plt.figure(figsize=(11.0, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1.0])
    heat = figure.add_subplot(grid[:, 0])
    decay = figure.add_subplot(grid[0, 1] if with_norms else grid[:, 1])
    return [heat, decay, figure.add_subplot(grid[1, 1])] if with_norms else [heat, decay]


def _draw_heat_map(ax: Any, drawn: pd.DataFrame, quantity: str) -> tuple[Any, Any]:
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
        norm = LogNorm(*log_limits(positive))
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


def _draw_decay(
    ax: Any, drawn: pd.DataFrame, scale: TauScale, quantity: str
) -> tuple[list[Any], list[Any]]:
    """Draw the mean over pairs at each distance, one line for each τ; return lines and handles."""
    from matplotlib.patches import Patch

    profile = drawn.groupby(["tau", "distance"])["value"].agg(["mean", "min", "max"]).reset_index()
    limits = log_limits(profile["mean"].to_numpy(), bands=profile[["min", "max"]].to_numpy())
    set_log_view(ax, "y", limits, keep=False)
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
            markersize=MARKER_SIZE,
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


def _draw_norms(ax: Any, norms: pd.DataFrame) -> None:
    """Draw ‖J‖ and, on an axis of its own, ‖dJ/dt‖ against τ: the mean and range over batches.

    Either axis is logarithmic unless it has to show zero.
    """
    from matplotlib.ticker import NullLocator

    taus = np.unique(norms["tau"])
    positive = taus[taus > 0]
    if positive.size > 1 and positive[-1] >= 10 * positive[0] and taus[0] >= 0:
        ax.set_xscale("symlog", linthresh=float(positive[0]), linscale=0.4)
        ax.xaxis.set_minor_locator(NullLocator())
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
            set_log_view(panel, "y", log_limits(rows.to_numpy()), keep=False)
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
    labels = distinct_labels(taus.tolist())
    text = rf"$\tau$ = {labels[-1]}"
    if halves:
        text = rf"above the diagonal $\tau$ = {labels[-1]}, below $\tau$ = {labels[0]}"
    ax.set_title(text, fontsize="medium", loc="left")


def _remove_box(ax: Any) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
