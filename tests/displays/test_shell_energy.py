import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose, assert_array_equal

from spectralshell.displays import ShellEnergyDisplay
from tests.displays.frames import frontier_frame, tidy_frame, wide_frame

TAUS = (0.0, 1.0, 30.0)


def legend_texts(display):
    return [text.get_text() for text in display.legend_.get_texts()]


@pytest.mark.parametrize("quantity", ["energy", "density"])
@pytest.mark.parametrize("make", [tidy_frame, wide_frame])
def test_lines_are_the_frame(make, quantity):
    display = ShellEnergyDisplay.from_frame(make()).plot(quantity=quantity)
    curves = display.frame(quantity)
    assert len(display.lines_) == len(TAUS)
    assert ("density" in display.ax_.get_ylabel()) is (quantity == "density")
    for line, (_, curve) in zip(display.lines_, curves.groupby("tau"), strict=True):
        assert_array_equal(line.get_xdata(), curve["lambda_mid"])
        assert_array_equal(line.get_ydata(), curve["value"])


@pytest.mark.parametrize("make", [tidy_frame, wide_frame])
def test_values_are_means_over_batches(make):
    wide = wide_frame()
    curves = ShellEnergyDisplay.from_frame(make()).frame("density")
    mean = wide.groupby(level="tau").mean().drop(columns="null").to_numpy().ravel()
    width = (curves["lambda_hi"] - curves["lambda_lo"]).to_numpy()
    assert_allclose(curves["value"] * width, mean, rtol=1e-12)
    assert_allclose(curves["lambda_mid"] ** 2, curves["lambda_lo"] * curves["lambda_hi"])
    low = wide.groupby(level="tau").min().drop(columns="null").to_numpy().ravel()
    assert_allclose(curves["lower"] * width, low, rtol=1e-12)


def test_bounds_are_the_mean_certified_bounds():
    curves = ShellEnergyDisplay.from_frame(tidy_frame(bounds=0.25)).frame(band="bounds")
    assert_allclose(curves["lower"], 0.75 * curves["value"], rtol=1e-12)
    assert_allclose(curves["upper"], 1.25 * curves["value"], rtol=1e-12)


@pytest.mark.parametrize(
    ("frame", "band", "text"),
    [
        (tidy_frame(), "auto", "range over 3 batches"),
        (tidy_frame(n_batches=1), "auto", "certified bounds"),
        (tidy_frame(), "bounds", "certified bounds"),
        (wide_frame(n_batches=1), "auto", None),
        (tidy_frame(), "none", None),
    ],
)
def test_band_says_what_it_is(frame, band, text):
    display = ShellEnergyDisplay.from_frame(frame).plot(band=band)
    shown = [t for t in legend_texts(display) if "range" in t or "bounds" in t]
    assert shown == ([] if text is None else [text])
    assert len(display.bands_) == (0 if text is None else 3)
    if text is None:
        assert display.frame(band=band)["lower"].isna().all()


def test_axes_are_logarithmic_and_labelled():
    ax = ShellEnergyDisplay.from_frame(tidy_frame()).plot().ax_
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlabel() == r"eigenvalue $\lambda$  (1/$\tau$)"
    assert ax.get_ylabel().startswith("shell energy")
    assert (
        "density"
        in ShellEnergyDisplay.from_frame(tidy_frame()).plot(quantity="density").ax_.get_ylabel()
    )


def test_steps_cover_the_shells():
    display = ShellEnergyDisplay.from_frame(tidy_frame()).plot(style="step")
    curve = display.frame().query("tau == 1.0")
    values, edges, _ = display.lines_[1].get_data()
    assert_array_equal(values, curve["value"])
    assert_array_equal(edges, [*curve["lambda_lo"], curve["lambda_hi"].iloc[-1]])


def test_legend_for_few_taus_colorbar_for_many():
    few = ShellEnergyDisplay.from_frame(wide_frame(taus=range(6))).plot()
    many = ShellEnergyDisplay.from_frame(wide_frame(taus=range(7))).plot()
    assert few.colorbar_ is None
    assert sum("tau" in text for text in legend_texts(few)) == 6
    assert "tau" in many.colorbar_.ax.get_ylabel()
    assert not any("tau" in text for text in legend_texts(many))


def test_colorbar_is_logarithmic_over_decades_and_shows_zero():
    taus = (0.0, *np.geomspace(0.1, 100, 7))
    display = ShellEnergyDisplay.from_frame(wide_frame(taus=taus)).plot()
    assert display.colorbar_.ax.get_yscale() == "log"
    assert r"$\tau$ = 0" in [text.get_text() for text in display.colorbar_.ax.texts]


@pytest.mark.parametrize("n_batches", [1, 3])
def test_frontiers_in_view_are_marked_in_the_colour_of_tau(n_batches):
    display = ShellEnergyDisplay.from_frame(
        wide_frame(n_batches=n_batches), fitter=frontier_frame()
    ).plot()
    known = frontier_frame().dropna(subset="frontier")
    assert [line.get_xdata()[0] for line in display.frontier_lines_] == list(known["frontier"])
    for line, curve in zip(display.frontier_lines_, display.lines_[1:], strict=True):
        assert line.get_color() == curve.get_color()
        assert line.is_dashed()
    assert any("frontier" in text for text in legend_texts(display))


def test_frontiers_do_not_stretch_the_axis():
    plain = ShellEnergyDisplay.from_frame(wide_frame()).plot()
    far = frontier_frame().assign(frontier=1e9)
    marked = ShellEnergyDisplay.from_frame(wide_frame(), fitter=far).plot()
    assert marked.ax_.get_xlim() == plain.ax_.get_xlim()
    assert marked.frontier_lines_ == []


def test_frame_carries_the_frontiers():
    curves = ShellEnergyDisplay.from_frame(wide_frame(), fitter=frontier_frame()).frame()
    by_tau = curves.groupby("tau")["frontier"].first()
    assert_array_equal(by_tau, frontier_frame()["frontier"])


def test_frontiers_of_other_runs_are_not_drawn():
    named = {"adam": frontier_frame(), "sgd": frontier_frame().assign(frontier=0.7)}
    both = pd.concat([rows.assign(name=name) for name, rows in named.items()])
    shells = tidy_frame().assign(name="sgd")
    display = ShellEnergyDisplay.from_frame(shells, fitter=both).plot()
    assert {line.get_xdata()[0] for line in display.frontier_lines_} == {0.7}
    assert set(display.frame()["frontier"]) == {0.7}


def test_null_that_a_reader_took_for_missing_is_refused_and_the_remedies_work():
    frame = tidy_frame()
    text = frame.to_csv(index=False)
    read = pd.read_csv(io.StringIO(text))
    with pytest.raises(ValueError, match=r"no shell in row 0.*keep_default_na=False"):
        ShellEnergyDisplay.from_frame(read)
    wanted = ShellEnergyDisplay.from_frame(frame).frame()
    for remedy in (
        read.fillna({"shell": "null"}),
        pd.read_csv(io.StringIO(text), keep_default_na=False),
    ):
        pd.testing.assert_frame_equal(ShellEnergyDisplay.from_frame(remedy).frame(), wanted)


def test_floor_is_shaded_and_its_energy_told():
    frame = tidy_frame()
    display = ShellEnergyDisplay.from_frame(frame).plot()
    assert display.resolution_floor == frame.attrs["resolution_floor"]
    (patch,) = display.ax_.patches
    assert_allclose(patch.get_x() + patch.get_width(), display.resolution_floor)
    assert "% of energy in no shell" in patch.get_label()
    assert not ShellEnergyDisplay(shells=frame).plot().ax_.patches


def test_unresolved_shells_are_hollow():
    display = ShellEnergyDisplay.from_frame(tidy_frame(unresolved=2)).plot()
    hollow = [ln for ln in display.ax_.lines if ln.get_markerfacecolor() == "white"]
    assert [len(line.get_xdata()) for line in hollow] == [2, 2, 2]
    assert "not resolved" in legend_texts(display)
    clear = ShellEnergyDisplay.from_frame(tidy_frame(unresolved=0)).plot()
    assert "not resolved" not in legend_texts(clear)


def test_used_axes_are_widened():
    _, ax = plt.subplots()
    ShellEnergyDisplay.from_frame(wide_frame(n_shells=4)).plot(ax)
    before = ax.get_xlim()
    ShellEnergyDisplay.from_frame(wide_frame()).plot(ax)
    ShellEnergyDisplay.from_frame(wide_frame(n_shells=4)).plot(ax)
    assert ax.get_xlim()[0] <= before[0]
    assert ax.get_xlim()[1] > 10 * before[1]
    assert len(ax.lines) == 9


def test_zero_energies_leave_gaps_and_marks():
    wide = wide_frame(taus=(1.0,))
    wide.iloc[:, 4] = 0.0
    display = ShellEnergyDisplay.from_frame(wide).plot()
    assert np.isnan(display.lines_[0].get_ydata()[3])
    assert display.frame()["value"].iloc[3] == 0.0
    assert "zero, or below the view" in legend_texts(display)


@pytest.mark.parametrize(
    "frame",
    [
        wide_frame(taus=(5.0,), n_batches=1),
        wide_frame(taus=(0.0,), n_shells=1),
        wide_frame() * 0.0,
        wide_frame(taus=(0.0, *np.geomspace(1e-3, 1e4, 8)), n_shells=1, n_batches=1),
        tidy_frame(bounds=1.0, n_batches=1),
    ],
    ids=["one tau", "one shell", "all zero", "many taus, one shell", "bounds down to zero"],
)
def test_degenerate_data_are_drawn(frame):
    display = ShellEnergyDisplay.from_frame(frame, fitter=frontier_frame())
    display.plot(Figure().subplots(), style="step")
    display.plot(Figure().subplots())
    display.figure_.draw_without_rendering()
    assert np.isfinite([*display.ax_.get_xlim(), *display.ax_.get_ylim()]).all()


def test_names_at_one_tau_are_curves_of_their_own():
    small = tidy_frame(n_batches=1).assign(name="small")
    large = small.assign(name="large", energy=3 * small["energy"])
    display = ShellEnergyDisplay.from_frame(pd.concat([small, large])).plot()
    assert len(display.lines_) == 6
    assert len({line.get_linestyle() for line in display.lines_}) == 2
    assert r"$\tau$ = 1, large" in legend_texts(display)


class FittedShells:
    def __init__(self):
        self.shells_ = tidy_frame()
        self.resolution_floor_ = 0.07

    def shell_frame(self, X):
        return tidy_frame(taus=X)


class FittedTail:
    frame_ = frontier_frame()


class Steps:
    def __init__(self, *steps):
        self.steps = [(str(i), step) for i, step in enumerate(steps)]


def test_from_estimator_takes_shells_floor_and_frontiers():
    plain = ShellEnergyDisplay.from_estimator(FittedShells())
    assert plain.resolution_floor == 0.07
    assert plain.frontiers is None
    pipeline = Steps(FittedShells(), FittedTail())
    assert ShellEnergyDisplay.from_estimator(pipeline).frontiers is FittedTail.frame_
    given = ShellEnergyDisplay.from_estimator(FittedShells(), fitter=FittedTail())
    assert given.frontiers is FittedTail.frame_


def test_from_estimator_measures_new_snapshots():
    display = ShellEnergyDisplay.from_estimator(FittedShells(), [2.0, 3.0])
    assert list(display.frame()["tau"].unique()) == [2.0, 3.0]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ShellEnergyDisplay.from_estimator(object()), TypeError, "call fit first"),
        (lambda: ShellEnergyDisplay.from_frame([1.0]), TypeError, "pandas DataFrame"),
        (lambda: ShellEnergyDisplay.from_frame(pd.DataFrame({"a": [1]})), ValueError, "shells_"),
        (
            lambda: ShellEnergyDisplay.from_frame(wide_frame(), fitter=object()),
            TypeError,
            "GRSDTailFitter",
        ),
        (
            lambda: ShellEnergyDisplay.from_frame(wide_frame()).plot(quantity="loss"),
            ValueError,
            "quantity",
        ),
        (lambda: ShellEnergyDisplay.from_frame(wide_frame()).plot(band="sd"), ValueError, "band"),
        (lambda: ShellEnergyDisplay.from_frame(wide_frame()).plot(style="x"), ValueError, "style"),
    ],
)
def test_errors_name_the_remedy(call, error, text):
    with pytest.raises(error, match=text):
        call()
    assert plt.get_fignums() == []


@pytest.mark.parametrize(("share", "in_view"), [(0.5, True), (1e-9, False)])
def test_a_floor_far_below_the_shells_leaves_no_empty_decades(share, in_view):
    frame = tidy_frame()
    first = frame["lambda_lo"][frame["lambda_lo"] > 1e-4].min()
    display = ShellEnergyDisplay.from_frame(frame, resolution_floor=share * first).plot()
    left = display.ax_.get_xlim()[0]
    assert (left < share * first) == in_view
    assert left > 0.1 * first
    texts = [text.get_text() for text in display.legend_.get_texts()]
    (floor,) = (text for text in texts if text.startswith("below resolution floor"))
    assert ("is off view" in floor) != in_view
