"""Flux of energy between shells against eigenvalue: its parts, and the drift velocity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays import _axes, _flux_panels
from spectralshell.displays._frames import resolution_floor_of
from spectralshell.parameter_checks import check_option

_QUANTITIES = ("flux", "velocity", "parts")
_NEEDED = ("tau", "batch", "edge", "flux_down", "density", "resolved")
_PARTS = ("drift", "rotation")


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
        plt = _axes.require_pyplot("ShellFluxDisplay.plot")
        scale = _axes.TauScale(drawn["tau"])
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
            _axes.shade_below_floor(panel, self.resolution_floor, None)
            panel.set_xlabel(_axes.LAMBDA_LABEL)
        if not drawn["resolved"].all() and chosen != ["parts"]:
            handles.append(_flux_panels.unresolved_handle())
        self.colorbar_ = scale.draw_colorbar(self.axes_) if scale.uses_colorbar else None
        self.legend_ = self._draw_legend(handles, own)
        return self

    def _draw(
        self,
        name: str,
        panel: Any,
        drawn: pd.DataFrame,
        scale: _axes.TauScale,
        parts: pd.DataFrame | None,
    ) -> list[Any]:
        if name == "flux":
            self.lines_ = _flux_panels.draw_fluxes(panel, drawn, scale)
            return self._flux_handles(drawn)
        if name == "velocity":
            return _flux_panels.draw_velocities(panel, drawn, scale, self.velocity_fit)
        if parts is None:
            return []
        label = "parts of the flux at " + scale.label(float(parts["tau"].iloc[0]))
        return _flux_panels.draw_parts(panel, parts, label)

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

    def _tau_handles(self, drawn: pd.DataFrame, scale: _axes.TauScale) -> list[Any]:
        from matplotlib.lines import Line2D

        found: dict[Any, Any] = {}
        for tau, dash, name, _ in _flux_panels.curves_of(drawn):
            if not scale.uses_colorbar:
                look = {"color": scale.colour(tau), "marker": scale.marker(tau), "markersize": 4.5}
                found.setdefault(tau, Line2D([], [], label=scale.label(tau), **look))
            if name is not None:
                style = Line2D([], [], color="0.3", linestyle=dash, label=str(name))
                found.setdefault(("name", name), style)
        return list(found.values())

    def _flux_handles(self, drawn: pd.DataFrame) -> list[Any]:
        from matplotlib.patches import Patch

        handles: list[Any] = []
        if (drawn["n_batches"] > 1).any():
            text = f"range over {_axes.write_counts(drawn['n_batches'])} batches"
            handles.append(Patch(color="0.5", alpha=0.3, linewidth=0, label=text))
        return handles

    def _draw_legend(self, handles: list[Any], own: bool) -> Any:
        if not own:
            return _axes.draw_legend(self.ax_, handles, place="inside")
        return self.figure_.legend(
            handles=handles, loc="outside lower center", ncols=5, fontsize="small"
        )
