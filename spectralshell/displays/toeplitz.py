"""Shell couplings beside their Toeplitz part, the residual by window, and the diagonal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays import _axes, _toeplitz_panels
from spectralshell.parameter_checks import check_option
from spectralshell.shells import toeplitz_part, toeplitz_residual
from spectralshell.shells.partition import edges_from_names

PANELS = ("coupling", "toeplitz", "windows", "diagonal")
_WINDOWS = ("lambda_lo", "lambda_hi", "centrality", "residual", "lower", "upper")
_SHELLS = ("lambda_mean", "coupling", "coupling_lower", "coupling_upper", "signed_mean")
_DIAGONAL = ("slope", "slope_lower", "slope_upper", "r2", "scale_free")


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
        check_option("panel", panel, PANELS)
        plt = _axes.require_pyplot("ToeplitzDisplay.plot")
        own = ax is None
        if own:
            self.axes_ = _toeplitz_panels.make_panels(plt)
            for name in PANELS:
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
        self.legend_ = _axes.draw_legend(self.ax_, handles, place="below" if own else "inside")
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
        norm = _toeplitz_panels.coupling_norm(matrix)
        titles = {"coupling": r"coupling $K$", "toeplitz": self._residual_title(matrix)}
        values = {"coupling": matrix, "toeplitz": part}
        drawn = [name for name in values if name in self.axes_]
        self.meshes_ = [
            _toeplitz_panels.draw_heat_map(
                self.axes_[name], values[name], edges, norm, titles[name]
            )
            for name in drawn
        ]
        axes = [self.axes_[name] for name in drawn]
        bar = _toeplitz_panels.draw_coupling_bar
        self.colorbar_ = bar(self.meshes_[0], axes) if drawn else None

    def _draw_lines(self) -> list[Any]:
        handles: list[Any] = []
        if "windows" in self.axes_ and self.windows is not None:
            handles += _toeplitz_panels.draw_windows(self.axes_["windows"], self.windows)
        if "diagonal" in self.axes_ and self.shells is not None:
            ax = self.axes_["diagonal"]
            handles += _toeplitz_panels.draw_diagonal(ax, self.shells, self.diagonal)
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
