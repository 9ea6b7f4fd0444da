"""ShellFluxDisplay: what it averages, its panels, its signs and its errors."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from sklearn.pipeline import make_pipeline

from spectralshell import ShellEnergyEstimator, ShellFluxEstimator
from spectralshell.displays import ShellFluxDisplay
from tests.displays.frames import EDGES, flux_frame


def test_frame_averages_flux_and_density_before_their_ratio():
    frame = ShellFluxDisplay.from_frame(flux_frame()).frame()
    first = frame[frame["tau"] == 0.0]
    np.testing.assert_allclose(first["flux_down"], 1.1 * EDGES)
    np.testing.assert_allclose(first["lower"], EDGES)
    np.testing.assert_allclose(first["upper"], 1.2 * EDGES)
    np.testing.assert_allclose(first["velocity"], -1.1 / 0.6 * EDGES)
    assert (frame["n_batches"] == 3).all()
    assert frame["resolved"].tolist() == [False, True, True, True] * 2


def test_one_batch_has_no_band():
    frame = ShellFluxDisplay.from_frame(flux_frame(n_batches=1)).frame()
    assert frame[["lower", "upper"]].isna().to_numpy().all()


def test_own_figure_has_all_panels_and_the_numbers_of_the_frame():
    display = ShellFluxDisplay.from_frame(flux_frame(), resolution_floor=0.45).plot()
    assert len(display.axes_) == 3
    drawn = [line.get_ydata() for line in display.lines_]
    expected = display.frame().groupby("tau")["flux_down"]
    for line, (_, values) in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(line, values)
    bars = [patch.get_height() for patch in display.axes_[2].patches]
    at_zero = display.frame().query("tau == 0")
    np.testing.assert_allclose(bars[:4], at_zero["drift"])
    np.testing.assert_allclose(bars[4:8], at_zero["rotation"])


def test_unknown_parts_leave_their_panel_out():
    frame = flux_frame().assign(drift=np.nan, rotation=np.nan)
    display = ShellFluxDisplay.from_frame(frame)
    assert len(display.plot().axes_) == 2
    with pytest.raises(ValueError, match="quantity='parts' needs drift and rotation"):
        display.plot(plt.figure().subplots(), quantity="parts")


@pytest.mark.parametrize("quantity", ["flux", "velocity", "parts"])
def test_one_panel_goes_on_given_axes(quantity):
    ax = plt.figure().subplots()
    display = ShellFluxDisplay.from_frame(flux_frame()).plot(ax, quantity=quantity)
    assert display.axes_ == [ax]
    assert ax.has_data()
    assert ax.get_xscale() == "log"


@pytest.mark.parametrize("quantity", ["flux", "velocity"])
def test_edges_that_are_not_resolved_are_pale(quantity):
    ax = plt.figure().subplots()
    display = ShellFluxDisplay.from_frame(flux_frame(taus=(0.0,))).plot(ax, quantity=quantity)
    drawn = [line for line in ax.lines if line.get_marker() != "None" and len(line.get_xdata())]
    full, pale = sorted(drawn, key=lambda line: sum(to_rgb(line.get_color())))
    assert list(pale.get_xdata()) == [EDGES[0]]
    chosen = full.get_markevery()
    marked = np.asarray(full.get_xdata())[slice(None) if chosen is None else chosen]
    np.testing.assert_array_equal(marked, EDGES[1:])
    assert "not resolved" in [text.get_text() for text in display.legend_.get_texts()]


def test_velocity_is_filled_down_and_hollow_up():
    ax = plt.figure().subplots()
    ShellFluxDisplay.from_frame(flux_frame()).plot(ax, quantity="velocity")
    points = [line for line in ax.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    hollow = [line.get_markerfacecolor() == "white" for line in points]
    assert hollow == [False, False, True, True]  # resolved and pale, each down and then up


@pytest.mark.parametrize(("taus", "names"), [((0.0,), ["a", "b"]), (tuple(range(8)), None)])
def test_many_times_and_names_draw(taus, names):
    display = ShellFluxDisplay.from_frame(flux_frame(taus=taus, names=names)).plot()
    assert len(display.lines_) == len(taus) * (1 if names is None else 2)
    assert (display.colorbar_ is not None) == (len(taus) > 6)
    display.figure_.draw_without_rendering()


def test_no_flux_draws_a_zero_line():
    frame = flux_frame().assign(flux_down=0.0, drift=0.0, rotation=0.0)
    display = ShellFluxDisplay.from_frame(frame).plot()
    display.figure_.draw_without_rendering()
    assert (display.lines_[0].get_ydata() == 0).all()


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_estimators_and_pipelines_are_sources(measured_trajectory, solver):
    X = measured_trajectory[::4]
    pipe = make_pipeline(ShellFluxEstimator(solver=solver, n_steps=20, floor=0.05)).fit(X)
    display = ShellFluxDisplay.from_estimator(pipe)
    assert display.velocity_fit is not None
    assert len(display.plot().axes_) == (3 if solver == "exact" else 2)
    other = ShellFluxDisplay.from_estimator(pipe[-1], X[:1])
    assert set(other.frame()["tau"]) == {X[0].tau}


@pytest.mark.parametrize("source", [ShellFluxEstimator(), ShellEnergyEstimator(), None])
def test_other_sources_are_refused(source):
    with pytest.raises(TypeError, match="estimator must be a fitted ShellFluxEstimator"):
        ShellFluxDisplay.from_estimator(source)


@pytest.mark.parametrize("frame", [pd.DataFrame(), flux_frame().drop(columns="density")])
def test_other_frames_are_refused(frame):
    with pytest.raises(ValueError, match="frame must have rows and the columns"):
        ShellFluxDisplay.from_frame(frame)
    with pytest.raises(TypeError, match="must be a pandas DataFrame"):
        ShellFluxDisplay.from_frame([1, 2])


def test_a_time_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="tau must be one of the times"):
        ShellFluxDisplay.from_frame(flux_frame()).plot(tau=0.3)
