"""The exponent b per fold, window or shell ratio, with its intervals."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from spectralshell.displays._axes import (
    draw_legend,
    format_number,
    log_limits,
    require_pyplot,
    set_log_view,
)

_VALUES = ("b", "b_lower", "b_upper")
_NOT_LABELS = (*_VALUES, "score", "n_train", "n_test", "n_shells", "status")
_SHORT_NAMES = {"lower": "b_lower", "upper": "b_upper"}  # as b_by_name_ has them
_AXIS_LABELS = {
    "fold": "fold (held-out group)",
    "q": "shell ratio $q$",
    "tau": r"effective training time $\tau$",
    "window": r"window of $\lambda$  (1/$\tau$)",
    "n_steps": "Lanczos steps",
    "name": "name of the run",
}
_MAX_TICKS = 24
_MAX_TICK_LETTERS = 48  # more, over all ticks, are written at a slant
_DEGENERATE = 1.0
_COLOUR = "#31688e"  # the middle of viridis
_REFERENCE_COLOUR = "0.35"


class ExponentDisplay:
    """The tail slope b per fold, window or q, with intervals and the fit to all data.

    Build it with :meth:`from_estimator` or :meth:`from_frame`, then call :meth:`plot`.

    Parameters
    ----------
    exponents : DataFrame
        One row per estimate: a label column and ``b, b_lower, b_upper`` (dimensionless).
        NaN b means no estimate, NaN ends no interval, infinite ends an open one.
    label : str
        The column that tells the estimates apart. Numbers with different values give a numeric
        axis (not for ``fold``); anything else one place per row.
    reference : tuple of float or None, default=None
        ``(b, b_lower, b_upper)`` of the fit to all data, drawn across.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    points_ : matplotlib Line2D
        The estimates.
    legend_ : matplotlib Legend or None

    Examples
    --------
    >>> import pandas as pd
    >>> from matplotlib.figure import Figure
    >>> from spectralshell.displays import ExponentDisplay
    >>> folds = pd.DataFrame({"fold": [0, 1], "b": [1.4, 1.6],
    ...                       "b_lower": [1.3, 1.5], "b_upper": [1.5, 1.8]})
    >>> display = ExponentDisplay.from_frame(folds).plot(Figure().subplots())
    >>> display.ax_.get_ylabel()
    'tail slope $b$'
    """

    def __init__(
        self,
        *,
        exponents: pd.DataFrame,
        label: str,
        reference: tuple[float, float, float] | None = None,
    ) -> None:
        self.exponents = exponents
        self.label = label
        self.reference = reference

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        cv: Any = None,
        groups: Any = None,
        n_jobs: int | None = None,
    ) -> ExponentDisplay:
        """Cross-validate the exponent and take the folds.

        Parameters
        ----------
        estimator : GRSDTailFitter or Pipeline that ends in one
            Cloned for the folds. If it is fitted, its own b is the reference.
        X : list of Snapshot or DataFrame
            What the estimator accepts.
        cv, groups, n_jobs
            As in :func:`spectralshell.cross_validate_exponent`, whose cost this has.

        Returns
        -------
        ExponentDisplay
            Not drawn yet: call :meth:`plot`.
        """
        from spectralshell.estimators.cross_validation import cross_validate_exponent

        folds = cross_validate_exponent(estimator, X, cv=cv, groups=groups, n_jobs=n_jobs)
        fitter = getattr(estimator, "steps", [("", estimator)])[-1][1]
        reference = None
        if hasattr(fitter, "b_"):
            reference = (float(fitter.b_), *(float(end) for end in fitter.b_interval_))
        return cls.from_frame(folds, label="fold", reference=reference)

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        *,
        label: str | None = None,
        reference: Any = None,
    ) -> ExponentDisplay:
        """Take the estimates from a frame.

        Parameters
        ----------
        frame : DataFrame
            What :func:`spectralshell.cross_validate_exponent` gives, ``b_by_name_`` of a fitted
            GRSDTailFitter, or any frame with a label column and ``b, b_lower, b_upper``.
        label : str or None, default=None
            The label column; None takes the first column that is no result.
        reference : tuple of float, fitted GRSDTailFitter or None, default=None
            ``(b, b_lower, b_upper)`` of the fit to all data.

        Returns
        -------
        ExponentDisplay
            Not drawn yet: call :meth:`plot`.

        Raises
        ------
        TypeError
            If ``frame`` is not a DataFrame.
        ValueError
            If a column is missing, a label is missing or infinite, or ``reference`` is no triple.
        """
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(
                f"frame must be a pandas DataFrame, got type {type(frame).__name__}; pass what "
                "cross_validate_exponent returns."
            )
        frame = frame.rename(columns=_SHORT_NAMES)
        if label is None:
            label = next((str(c) for c in frame.columns if c not in _NOT_LABELS), None)
        missing = [column for column in (label, *_VALUES) if column not in frame.columns]
        if label is None or missing:
            raise ValueError(
                f"frame must have a label column (such as fold, window or q) and b, b_lower, "
                f"b_upper, got columns {[str(c) for c in frame.columns]}; name the label column "
                "with label=."
            )
        _check_labels(frame[label])
        return cls(exponents=frame, label=label, reference=_read_reference(reference))

    def frame(self) -> pd.DataFrame:
        """Return the numbers that :meth:`plot` draws.

        Returns
        -------
        DataFrame
            The label column, ``position`` on the horizontal axis, ``b, b_lower, b_upper``; one
            row per estimate, in the order given.
        """
        drawn = self.exponents[[self.label, *_VALUES]].reset_index(drop=True)
        if self._is_numeric():
            position = drawn[self.label].to_numpy(dtype=float)
        else:
            position = np.arange(len(drawn), dtype=float)
        drawn.insert(1, "position", position)
        return drawn.astype(dict.fromkeys(_VALUES, float))

    def _is_numeric(self) -> bool:
        labels = self.exponents[self.label]
        numeric = all(isinstance(v, Real) and not isinstance(v, bool) for v in labels)
        return self.label != "fold" and numeric and labels.is_unique and len(labels) > 1

    def plot(self, ax: Any = None) -> ExponentDisplay:
        """Draw the estimates with error bars.

        An estimate without an interval is hollow; a missing one is a cross at the lower edge. The
        line b = 1, where cutoff and slope cannot be told apart, is drawn when it is in view.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        ExponentDisplay
            Itself, with ``ax_`` and ``figure_``.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        """
        plt = require_pyplot("ExponentDisplay.plot")
        own = ax is None
        if own:
            _, ax = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
        self.ax_, self.figure_ = ax, ax.figure
        drawn = self.frame()
        self._set_horizontal(drawn)
        low, high = self._set_vertical(drawn)
        handles = self._draw_estimates(drawn, low, high) + self._draw_missing(drawn)
        handles += self._draw_reference(low, high)
        if low < _DEGENERATE < high:
            label = "$b$ = 1: slope and cutoff look alike"
            handles.append(ax.axhline(1.0, color="0.6", ls=":", lw=1, zorder=0, label=label))
        ax.set_xlabel(_AXIS_LABELS.get(self.label, self.label))
        ax.set_ylabel("tail slope $b$")
        self.legend_ = draw_legend(ax, handles, place="right" if own else "inside")
        return self

    def _set_horizontal(self, drawn: pd.DataFrame) -> None:
        ax, at = self.ax_, drawn["position"].to_numpy()
        if not self._is_numeric():
            step = -(-len(at) // _MAX_TICKS) or 1
            labels = [_write_label(value) for value in drawn[self.label][::step]]
            ax.set_xticks(at[::step], labels)
            crowded = sum(map(len, labels)) > _MAX_TICK_LETTERS
            if crowded:
                ax.tick_params(axis="x", labelrotation=30)
                for text in ax.get_xticklabels():
                    text.set(ha="right", rotation_mode="anchor")
            ax.set_xlim(-0.6, max(len(at), 1) - 0.4)
        elif at.min() > 0 and at.max() >= 10 * at.min():
            set_log_view(ax, "x", log_limits(at), keep=False)
        else:
            margin = 0.06 * (at.max() - at.min())
            ax.set_xlim(at.min() - margin, at.max() + margin)

    def _set_vertical(self, drawn: pd.DataFrame) -> tuple[float, float]:
        """Set the view to everything finite, with room below; return it."""
        values = np.append(drawn[list(_VALUES)].to_numpy().ravel(), self.reference or [])
        values = values[np.isfinite(values)]
        low, high = (values.min(), values.max()) if values.size else (0.0, 2.0)
        margin = max(0.08 * (high - low), 0.02)
        view = (float(low - 1.5 * margin), float(high + margin))
        self.ax_.set_ylim(view)
        return view

    def _draw_estimates(self, drawn: pd.DataFrame, low: float, high: float) -> list[Any]:
        there = drawn[np.isfinite(drawn["b"])]
        (self.points_,) = self.ax_.plot(
            there["position"],
            there["b"],
            linestyle="none",
            marker="o",
            markersize=5.5,
            color=_COLOUR,
            zorder=3,
            label="$b$ with interval",
        )
        known = there.dropna(subset=["b_lower", "b_upper"])
        # an infinite end runs off the view
        ends = known[["b_lower", "b_upper"]].clip(low - 1.0, high + 1.0)
        errors = np.abs(ends.sub(known["b"], axis=0).to_numpy().T)
        self.ax_.errorbar(
            known["position"], known["b"], yerr=errors, fmt="none", ecolor=_COLOUR, capsize=3
        )
        self.ax_.set_ylim(low, high)
        bare = there[there[["b_lower", "b_upper"]].isna().any(axis=1)]
        if bare.empty:
            return [self.points_] if len(known) else []
        (hollow,) = self.ax_.plot(
            bare["position"],
            bare["b"],
            linestyle="none",
            marker="o",
            markersize=5.5,
            color=_COLOUR,
            markerfacecolor="white",
            zorder=4,
            label="$b$ without interval",
        )
        return [self.points_, hollow] if len(known) else [hollow]

    def _draw_missing(self, drawn: pd.DataFrame) -> list[Any]:
        missing = drawn[~np.isfinite(drawn["b"])]
        if missing.empty:
            return []
        marks: list[Any] = self.ax_.plot(
            missing["position"],
            np.full(len(missing), 0.03),
            transform=self.ax_.get_xaxis_transform(),
            scaley=False,
            linestyle="none",
            marker="x",
            color="#b5443a",
            label="no estimate",
        )
        return marks

    def _draw_reference(self, low: float, high: float) -> list[Any]:
        if self.reference is None or not np.isfinite(self.reference[0]):
            return []
        b, lower, upper = self.reference
        text = f"all data: $b$ = {b:.3f}"
        if not np.isnan([lower, upper]).any():
            ends = np.clip([lower, upper], low, high)
            self.ax_.axhspan(*ends, color=_REFERENCE_COLOUR, alpha=0.12, lw=0, zorder=0)
            text += f"\n[{lower:.3f}, {upper:.3f}]"
        return [self.ax_.axhline(b, color=_REFERENCE_COLOUR, lw=1.2, zorder=1, label=text)]


def _check_labels(labels: pd.Series) -> None:
    for row, value in enumerate(labels):
        if value is None or (isinstance(value, Real) and not np.isfinite(float(value))):
            raise ValueError(
                f"column {labels.name!r} of frame holds the label {value!r} in row {row}, which "
                "has no place on an axis; label the row, or drop it."
            )


def _read_reference(reference: Any) -> tuple[float, float, float] | None:
    """Return (b, b_lower, b_upper) of a triple or a fitted tail fitter, None for None."""
    if reference is None:
        return None
    if hasattr(reference, "b_"):
        reference = (reference.b_, *reference.b_interval_)
    try:
        b, lower, upper = (float(value) for value in reference)
    except (TypeError, ValueError):
        raise ValueError(
            f"reference must be (b, b_lower, b_upper) or a fitted GRSDTailFitter, got "
            f"{reference!r}; pass NaN for ends that are not known."
        ) from None
    return b, lower, upper


def _write_label(value: Any) -> str:
    """Return tick text: windows as lo–hi, numbers short, anything else as it is."""
    if isinstance(value, tuple | list | np.ndarray) and len(value) == 2:
        return "–".join(format_number(end) for end in value)
    if isinstance(value, Real) and not isinstance(value, bool | int | np.integer):
        return format_number(float(value))
    return str(value)
