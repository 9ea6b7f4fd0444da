import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose, assert_array_equal

from spectralshell.displays import ToeplitzDisplay
from spectralshell.shells import edges_from_names, toeplitz_part
from tests.displays.frames import toeplitz_frames

PANELS = ["coupling", "toeplitz", "windows", "diagonal"]


def make_display(p_value=None, **kwargs):
    return ToeplitzDisplay.from_frame(**toeplitz_frames(**kwargs), p_value=p_value)


def legend_texts(display):
    return [text.get_text() for text in display.legend_.get_texts()]


def test_heat_maps_are_the_coupling_and_its_toeplitz_part():
    display = make_display().plot()
    matrix = toeplitz_frames()["frame"].to_numpy()
    known = ~np.isnan(matrix)
    expected = [matrix, toeplitz_part(matrix)]
    for mesh, values in zip(display.meshes_, expected, strict=True):
        drawn = mesh.get_array()
        assert_array_equal(np.ma.getmaskarray(drawn), ~known)
        assert_allclose(drawn.filled(np.nan)[known], values[known])
    assert display.meshes_[0].norm is display.meshes_[1].norm


def test_frame_holds_both_matrices():
    frame = make_display().frame()
    assert len(frame) == 64  # one of nine shells is masked
    spread = frame.groupby("offset")["toeplitz"].agg(np.ptp)
    assert_allclose(spread, 0.0, atol=1e-15)
    means = frame.groupby("offset")["coupling"].mean()
    assert_allclose(frame.groupby("offset")["toeplitz"].mean(), means)


def test_masked_shells_at_the_ends_are_not_drawn():
    display = make_display(masked=(0, 1, 8)).plot()
    assert display.meshes_[0].get_array().shape == (6, 6)
    assert display.ax_.get_xlim()[0] == edges_from_names(toeplitz_frames()["frame"].columns)[2]


def test_axes_are_rates():
    display = make_display().plot()
    for name in ("coupling", "toeplitz"):
        ax = display.axes_[name]
        assert ax.get_xscale() == ax.get_yscale() == "log"
        assert r"\lambda" in ax.get_xlabel()
    assert display.axes_["windows"].get_ylim()[0] == 0.0
    assert display.ax_ is display.axes_["coupling"]


def test_title_tells_residual_and_p_value():
    display = make_display(p_value=1 / 21).plot()
    title = display.axes_["toeplitz"].get_title()
    assert "residual 0." in title
    assert "p = 0.048" in title


def test_windows_are_drawn_over_both_null_bands():
    display = make_display().plot()
    ax, windows = display.axes_["windows"], toeplitz_frames()["windows"]
    middle = np.sqrt(windows["lambda_lo"] * windows["lambda_hi"])
    (line,) = [line for line in ax.lines if line.get_linestyle() == "-"]
    assert_array_equal(line.get_ydata(), windows["residual"][::-1])
    assert_allclose(line.get_xdata(), np.sort(middle))
    medians = {line.get_ydata()[0] for line in ax.lines if line.is_dashed()}
    assert {0.3, 0.35} <= medians
    assert len(ax.collections) == 3  # two bands, and the intervals
    assert sum("5–95" in text for text in legend_texts(display)) == 2
    assert "residual, 95 % over batches" in legend_texts(display)


def test_diagonal_has_points_fits_and_slopes():
    display = make_display().plot()
    ax, shells = display.axes_["diagonal"], toeplitz_frames()["shells"].dropna()
    drawn = [line.get_ydata() for line in ax.lines if line.get_marker() in ("o", "s")]
    assert_allclose(drawn, [shells["coupling"], -shells["signed_mean"]])
    fits = [line for line in ax.lines if line.is_dashed()]
    for fit in fits:
        slope = np.diff(np.log(fit.get_ydata())) / np.diff(np.log(fit.get_xdata()))
        assert_allclose(slope, 0.1)
    assert sum("slope 0.10 [-0.10, 0.30]" in text for text in legend_texts(display)) == 2


def test_minority_signs_are_hollow():
    frames = toeplitz_frames()
    frames["shells"].loc[4, "signed_mean"] *= -1.0
    frames["shells"].loc[5, "signed_mean"] = 0.0
    display = ToeplitzDisplay.from_frame(**frames).plot()
    hollow = [ln for ln in display.axes_["diagonal"].lines if ln.get_markerfacecolor() == "white"]
    assert [len(line.get_xdata()) for line in hollow] == [6]
    assert any("< 0" in text for text in legend_texts(display))
    assert not any("< 0" in text for text in legend_texts(make_display().plot()))


@pytest.mark.parametrize("panel", PANELS)
def test_one_panel_on_given_axes(panel):
    ax = Figure().subplots()
    display = make_display().plot(ax, panel=panel)
    assert list(display.axes_) == [panel]
    assert display.ax_ is ax
    assert (display.colorbar_ is not None) is (panel in PANELS[:2])
    assert (display.legend_ is not None) is (panel in PANELS[2:])


def test_panels_without_a_frame_are_left_out():
    display = ToeplitzDisplay.from_frame(toeplitz_frames()["frame"]).plot()
    assert list(display.axes_) == PANELS[:2]
    assert display.legend_ is None
    with pytest.raises(ValueError, match="needs the frame windows"):
        display.plot(Figure().subplots(), panel="windows")


@pytest.mark.parametrize(
    "kwargs",
    [{"n_shells": 1, "masked": ()}, {"n_shells": 3, "masked": (0, 1, 2)}, {"n_shells": 2}],
    ids=["one shell", "all masked", "two shells, one masked"],
)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_degenerate_data_are_drawn(kwargs, scale):
    frames = toeplitz_frames(**{"masked": (0,), **kwargs})
    frames["frame"] *= scale
    frames["shells"][["coupling", "coupling_lower", "coupling_upper", "signed_mean"]] *= scale
    frames["windows"][["lower", "upper"]] = np.nan
    display = ToeplitzDisplay.from_frame(**frames, p_value=np.nan).plot()
    display.figure_.draw_without_rendering()
    for ax in display.axes_.values():
        assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()


class Fitted:
    coupling_ = toeplitz_frames()["frame"]
    windows_ = toeplitz_frames()["windows"]
    shells_ = toeplitz_frames()["shells"]
    diagonal_ = toeplitz_frames()["diagonal"]
    p_value_ = 0.5


class Steps:
    steps = [("diagnostic", Fitted())]


@pytest.mark.parametrize("estimator", [Fitted(), Steps()])
def test_from_estimator_takes_all_frames(estimator):
    display = ToeplitzDisplay.from_estimator(estimator)
    assert display.coupling is Fitted.coupling_
    assert display.windows is Fitted.windows_
    assert display.p_value == 0.5


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ToeplitzDisplay.from_estimator(object()), TypeError, "call fit first"),
        (lambda: ToeplitzDisplay.from_frame([1.0]), TypeError, "pandas DataFrame"),
        (lambda: ToeplitzDisplay.from_frame(pd.DataFrame({"a": [1]})), ValueError, "same shells"),
        (
            lambda: ToeplitzDisplay.from_frame(pd.DataFrame({"a": [1]}, index=["a"])),
            ValueError,
            "is not a shell",
        ),
        (
            lambda: ToeplitzDisplay.from_frame(
                toeplitz_frames()["frame"], windows=pd.DataFrame({"residual": [1.0]})
            ),
            ValueError,
            "windows must be None or a DataFrame with the columns",
        ),
        (lambda: make_display().plot(panel="kernel"), ValueError, "panel must be one of"),
    ],
)
def test_errors_name_the_remedy(call, error, text):
    with pytest.raises(error, match=text):
        call()
    assert plt.get_fignums() == []
