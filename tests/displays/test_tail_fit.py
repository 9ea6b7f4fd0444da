import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose, assert_array_equal

from spectralshell.displays import TailFitDisplay
from spectralshell.estimators.tail.fitter import GRSDTailFitter
from tests.displays.frames import comparison_frame, fitted_frame, wide_frame

WINDOW = (0.4, 51.2)


def make(wide=None, **kwargs):
    wide = wide_frame() if wide is None else wide
    defaults = {"b": 1.6, "b_interval": (1.5, 1.7), "window": WINDOW}
    return TailFitDisplay.from_frame(wide, fitted_frame(wide), **{**defaults, **kwargs})


def legend_texts(display):
    return [text.get_text() for text in display.legend_.get_texts()]


def solid_lines(ax):
    return [line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 2]


def test_residuals_are_logs_of_mean_density_over_fit():
    wide = wide_frame()
    drawn = make(wide).frame()
    data = wide.groupby(level="tau").mean().drop(columns="null").to_numpy().ravel()
    fit = fitted_frame(wide).groupby(level="tau").mean().drop(columns="null").to_numpy().ravel()
    inside = drawn["in_window"].to_numpy()
    assert_allclose(drawn["residual"][inside], np.log(data / fit)[inside], rtol=1e-10)
    assert drawn["residual"][~inside].isna().all()
    assert_array_equal(inside, drawn["lambda_lo"] >= 0.39)


def test_fit_lines_are_the_frame():
    display = make().plot()
    lines = solid_lines(display.ax_)
    curves = list(display.frame().groupby("tau"))
    assert len(lines) == len(curves) == 3
    for line, (_, curve) in zip(lines, curves, strict=True):
        assert_array_equal(line.get_xdata(), curve["lambda_mid"])
        assert_array_equal(line.get_ydata(), curve["fit"].where(curve["in_window"]))


def test_points_and_spread_are_the_frame():
    display = make(wide_frame(taus=(1.0,))).plot()
    drawn = display.frame()
    shown = np.sort(
        np.concatenate([ln.get_ydata() for ln in display.ax_.lines if ln.get_linestyle() == "None"])
    )
    assert_array_equal(shown, np.sort(drawn["density"]))
    ends = np.array(display.ax_.collections[0].get_segments())[:, :, 1]
    assert_array_equal(ends, drawn[["density_lower", "density_upper"]])
    low, high = display.ax_.get_ylim()
    assert low < ends.min()
    assert ends.max() < high


def test_panels_share_the_eigenvalue_axis():
    display = make(comparison=comparison_frame()).plot()
    fit, residuals, alternatives = display.axes_
    assert fit.get_xscale() == fit.get_yscale() == residuals.get_xscale() == "log"
    assert residuals.get_yscale() == "linear"
    assert fit.get_xlim() == residuals.get_xlim()
    assert residuals.get_xlabel() == r"eigenvalue $\lambda$  (1/$\tau$)"
    assert "density" in fit.get_ylabel()
    assert "AIC" in alternatives.get_xlabel()


def test_alternatives_are_ranked():
    display = make(comparison=comparison_frame()).plot()
    names = [text.get_text().replace("\n", " ") for text in display.axes_[2].get_yticklabels()]
    assert names[0] == "power law, template cutoff"
    assert names[-1] == "power law"
    assert_allclose([bar.get_width() for bar in display.axes_[2].patches], [0, 2.4, 19.5, 42.5])


def test_alternatives_tell_their_slopes():
    display = make(comparison=comparison_frame()).plot()
    texts = [text.get_text() for text in display.axes_[2].texts]
    assert texts == ["0.0 ($b$ = 1.60)", "2.4 ($b$ = 1.45)", "19.5", "42.5 ($b$ = 1.90)"]


@pytest.mark.parametrize(
    ("ranks", "n_best"), [(None, 1), ([4, 1, 1, 3], 2), ([1, 1, 1, 1], 4), ([4, 1, 2, 3], 1)]
)
def test_alternatives_of_rank_one_share_a_colour(ranks, n_best):
    comparison = comparison_frame()
    if ranks is not None:
        comparison["rank"] = ranks
    colours = [bar.get_facecolor() for bar in make(comparison=comparison).plot().axes_[2].patches]
    assert [colour == colours[0] for colour in colours] == [True] * n_best + [False] * (4 - n_best)


@pytest.mark.parametrize("comparison", [None, comparison_frame().assign(aic=np.nan)])
def test_no_alternatives_no_panel(comparison):
    assert make(comparison=comparison).plot().axes_.size == 2


@pytest.mark.parametrize("n_axes", [1, 2, 3])
def test_given_axes_are_filled_in_order(n_axes):
    _, axes = plt.subplots(1, n_axes)
    display = make(comparison=comparison_frame()).plot(axes)
    assert list(display.axes_) == list(np.ravel(axes))
    assert all(ax.has_data() for ax in np.ravel(axes))
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    ("fields", "title"),
    [
        ({}, "tail slope $b$ = 1.600, 95 % interval [1.500, 1.700]"),
        ({"b_interval": (np.nan, np.nan)}, "tail slope $b$ = 1.600, no interval"),
        ({"confidence": 0.9}, "tail slope $b$ = 1.600, 90 % interval [1.500, 1.700]"),
        ({"b": np.nan, "status": "empty tail"}, "no tail slope\nempty tail"),
    ],
)
def test_title_tells_slope_and_status(fields, title):
    assert make(**fields).plot().ax_.get_title(loc="left") == title


def test_window_is_marked_in_both_panels():
    display = make().plot()
    for ax in display.axes_[:2]:
        (patch,) = ax.patches
        ends = [patch.get_x(), patch.get_x() + patch.get_width()]
        assert_allclose(ends, WINDOW)
    assert r"window: $\lambda$ 0.4–51.2" in legend_texts(display)
    assert "data outside the window" in legend_texts(display)


def test_many_taus_get_a_colorbar():
    display = make(wide_frame(taus=range(9)), comparison=comparison_frame()).plot()
    assert display.colorbar_ is not None
    assert not any("tau" in text for text in legend_texts(display))
    display.figure_.draw_without_rendering()
    assert display.figure_.bbox.x1 >= display.legend_.get_window_extent().x1
    panel = display.axes_[2].get_window_extent()
    assert all(panel.x1 >= text.get_window_extent().x1 for text in display.axes_[2].texts)


@pytest.mark.parametrize(
    "wide",
    [
        wide_frame(taus=(3.0,), n_batches=1),
        wide_frame(n_shells=1),
        wide_frame() * 0.0,
    ],
    ids=["one tau, one batch", "one shell", "all zero"],
)
@pytest.mark.parametrize("failed", [False, True])
def test_degenerate_data_are_drawn(wide, failed):
    fitted = fitted_frame(wide) * (np.nan if failed else 1.0)
    window = (np.nan, np.nan) if failed else None
    b = np.nan if failed else 1.6
    display = TailFitDisplay.from_frame(wide, fitted, b=b, window=window)
    display.plot(Figure().subplots(2))
    display.figure_.draw_without_rendering()
    assert np.isfinite([*display.ax_.get_ylim(), *display.axes_[1].get_ylim()]).all()
    assert display.frame()["in_window"].all() == (not failed)


def test_zero_density_is_marked_not_drawn():
    wide = wide_frame(taus=(1.0,))
    wide.iloc[:, 6] = 0.0
    display = make(wide).plot()
    assert np.isnan(display.frame()["residual"].iloc[5])
    assert "zero, or below the view" in legend_texts(display)


class FittedTail:
    """Doubles the energies, so that every residual is −ln 2."""

    b_, b_interval_, confidence, status_ = 1.6, (1.5, 1.7), 0.9, "ok"
    window_, comparison_ = WINDOW, comparison_frame()

    def transform(self, X):
        self.seen_ = X
        return X

    def inverse_transform(self, X):
        return 2 * X


class Steps:
    def __init__(self, *steps):
        self.steps = [(str(i), step) for i, step in enumerate(steps)]


class Measure:
    def transform(self, taus):
        return wide_frame(taus=taus)


@pytest.mark.parametrize("in_pipeline", [False, True])
def test_from_estimator_fits_the_mean_over_batches(in_pipeline):
    fitter = FittedTail()
    if in_pipeline:
        display = TailFitDisplay.from_estimator(Steps(Measure(), fitter), (0.0, 1.0, 30.0))
    else:
        display = TailFitDisplay.from_estimator(fitter, wide_frame())
    residual = display.frame()["residual"].dropna()
    assert_allclose(residual, -np.log(2), rtol=1e-10)
    assert len(fitter.seen_) == 3
    assert fitter.seen_.attrs == wide_frame().attrs
    assert display.confidence == 0.9
    assert display.window == WINDOW


def test_a_fitted_tail_runs_through_its_data():
    wide = wide_frame(taus=(1.0, 30.0), n_batches=4)
    fitter = GRSDTailFitter(window=WINDOW).fit(wide)
    display = TailFitDisplay.from_estimator(fitter, wide)
    drawn = display.frame()
    assert display.b == fitter.b_
    assert drawn["in_window"].sum() == 2 * 7
    # 20 % noise, four batches: residuals of a tenth, and none left over on average
    assert drawn["residual"].abs().max() < 0.4
    assert abs(drawn["residual"].mean()) < 0.05
    assert display.plot().axes_.size == 3


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: TailFitDisplay.from_estimator(object(), wide_frame()), TypeError, "fit first"),
        (lambda: TailFitDisplay.from_estimator(FittedTail(), np.ones((2, 2))), TypeError, "X must"),
        (
            lambda: TailFitDisplay.from_frame(wide_frame(), wide_frame(n_shells=3), b=1.0),
            ValueError,
            "fitted must",
        ),
        (lambda: make(window=(2.0, 1.0)), ValueError, "window"),
    ],
)
def test_errors_name_the_remedy(call, error, text):
    with pytest.raises(error, match=text):
        call()
    assert plt.get_fignums() == []


def test_more_than_three_axes_are_refused():
    _, axes = plt.subplots(2, 2)
    with pytest.raises(ValueError, match="one to three Axes"):
        make().plot(axes)
