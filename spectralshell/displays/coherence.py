"""Coherence of the blocks of a Jacobian, its decay with distance, and norms along a trajectory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays import _axes, _coherence_panels
from spectralshell.parameter_checks import check_option

QUANTITIES = ("normalized", "coherence", "influence")
_PAIRS = ("tau", "batch", "block", "other", "depth", "other_depth", "distance", *QUANTITIES)
_NORMS = ("tau", "jacobian_norm", "jacobian_rate")


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
        pairs = _one_run(_with_columns("frame", frame, _PAIRS), name)
        if norms is not None:
            flat = norms if "tau" in norms else norms.reset_index()
            norms = _one_run(_with_columns("norms", flat, _NORMS), name)
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
        check_option("quantity", quantity, QUANTITIES)
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
        plt = _axes.require_pyplot("CoherenceDisplay.plot")
        own = ax is None
        if own:
            axes = _coherence_panels.make_panels(plt, self.norms is not None)
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
        self.image_, self.colorbar_ = _coherence_panels.draw_heat_map(axes[0], drawn, quantity)
        self.lines_: list[Any] = []
        self.legend_: Any = None
        if len(axes) > 1:
            scale = _axes.TauScale(drawn["tau"])
            self.lines_, handles = _coherence_panels.draw_decay(axes[1], drawn, scale, quantity)
            if scale.uses_colorbar:
                scale.draw_colorbar([axes[1]])
            place = "right" if own and not scale.uses_colorbar else "inside"
            self.legend_ = _axes.draw_legend(axes[1], handles, place=place)
        if len(axes) > 2 and self.norms is not None:
            _coherence_panels.draw_norms(axes[2], self.norms)
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


def _one_run(frame: pd.DataFrame, name: str | None) -> pd.DataFrame:
    if "name" not in frame:
        return frame
    names = list(dict.fromkeys(frame["name"]))
    if name is None and len(names) == 1:
        return frame
    if name not in names:
        raise ValueError(f"name must be one of {names} where snapshots have names, got {name!r}.")
    return frame[frame["name"] == name]
