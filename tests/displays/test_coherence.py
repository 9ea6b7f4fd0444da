"""The coherence display: what the panels show, and the frames it accepts."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import LogNorm

from spectralshell.displays import CoherenceDisplay
from tests.displays.frames import norm_frame, pair_frame


def cells(display):
    side = int(np.sqrt(display.image_.get_array().size))
    return np.asarray(display.image_.get_array()).reshape(side, side)


def test_frame_averages_over_batches():
    pairs = pair_frame(taus=(0.0,), n_batches=3)
    drawn = CoherenceDisplay.from_frame(pairs).frame()
    expected = pairs.groupby(["depth", "other_depth"])["normalized"].mean()
    np.testing.assert_allclose(drawn["value"], expected)
    assert (drawn["n_batches"] == 3).all()


def test_heat_map_has_the_first_tau_below_the_diagonal_and_the_last_above():
    pairs = pair_frame(taus=(0.0, 1.0, 5.0))
    display = CoherenceDisplay.from_frame(pairs).plot()
    drawn = display.frame()
    by_tau = {tau: rows["value"].to_numpy().reshape(5, 5) for tau, rows in drawn.groupby("tau")}
    shown = cells(display)
    lower, upper = np.tril_indices(5, -1), np.triu_indices(5)
    np.testing.assert_array_equal(shown[lower], by_tau[0.0][lower])
    np.testing.assert_array_equal(shown[upper], by_tau[5.0][upper])
    assert display.ax_.get_title(loc="left") == (r"above the diagonal $\tau$ = 5, below $\tau$ = 0")
    # Input at the top.
    assert display.ax_.yaxis_inverted()
    assert [t.get_text() for t in display.ax_.get_yticklabels()] == list("abcde")


def test_influence_is_not_symmetric_and_has_one_tau():
    display = CoherenceDisplay.from_frame(pair_frame(taus=(0.0, 5.0))).plot(quantity="influence")
    drawn = display.frame("influence")
    last = drawn[drawn["tau"] == 5.0]["value"].to_numpy().reshape(5, 5)
    np.testing.assert_array_equal(cells(display), last)
    assert display.ax_.get_title(loc="left") == r"$\tau$ = 5"


def test_coherence_itself_is_on_a_logarithmic_scale():
    display = CoherenceDisplay.from_frame(pair_frame()).plot(quantity="coherence")
    assert isinstance(display.image_.norm, LogNorm)


def test_decay_is_the_mean_over_pairs_at_each_distance():
    display = CoherenceDisplay.from_frame(pair_frame(taus=(0.0, 2.0))).plot()
    drawn = display.frame()
    assert len(display.lines_) == 2
    for line, tau in zip(display.lines_, (0.0, 2.0), strict=True):
        expected = drawn[drawn["tau"] == tau].groupby("distance")["value"].mean()
        np.testing.assert_allclose(line.get_ydata(), expected)
        assert line.get_xdata().tolist() == list(range(5))


def test_panels():
    with_norms = CoherenceDisplay.from_frame(pair_frame(), norm_frame()).plot()
    assert with_norms.axes_.size == 3
    assert with_norms.axes_[2].get_yscale() == "log"
    assert CoherenceDisplay.from_frame(pair_frame()).plot().axes_.size == 2
    _, axes = plt.subplots(1, 3)
    given = CoherenceDisplay.from_frame(pair_frame(), norm_frame()).plot(axes)
    assert list(given.axes_) == list(axes)
    with pytest.raises(ValueError, match="one to three Axes"):
        given.plot(plt.subplots(4)[1])


def test_norms_that_reach_zero_are_on_a_linear_axis():
    norms = norm_frame().assign(jacobian_rate=0.0)
    display = CoherenceDisplay.from_frame(pair_frame(), norms).plot()
    rate = next(ax for ax in display.figure_.axes if r"\dot{J}" in ax.get_ylabel())
    assert rate.get_yscale() == "linear"
    assert rate.get_ylim()[0] == 0.0


NOTHING = pair_frame().assign(normalized=0.0, coherence=0.0, influence=0.0)


@pytest.mark.parametrize(
    ("pairs", "quantity"),
    [
        (pair_frame(n_blocks=1), "coherence"),
        (pair_frame(n_blocks=2, taus=(0.0,)), "normalized"),
        (pair_frame(taus=tuple(np.geomspace(0.1, 100, 9))), "normalized"),
        (pair_frame(n_blocks=40, taus=(0.0,), n_batches=1), "influence"),
        (NOTHING, "normalized"),
        (NOTHING, "coherence"),
        (NOTHING, "influence"),
    ],
    ids=["one block", "two blocks", "many taus", "many blocks", "zero", "zero", "zero"],
)
def test_unusual_frames_are_drawn(pairs, quantity):
    display = CoherenceDisplay.from_frame(pairs, norm_frame()).plot(quantity=quantity)
    display.figure_.draw_without_rendering()


def test_runs_are_chosen_by_name():
    pairs = pd.concat([pair_frame().assign(name="a"), pair_frame(seed=1).assign(name="b")])
    with pytest.raises(ValueError, match=r"name must be one of \['a', 'b'\]"):
        CoherenceDisplay.from_frame(pairs)
    chosen = CoherenceDisplay.from_frame(pairs, name="b").frame()
    pd.testing.assert_frame_equal(chosen, CoherenceDisplay.from_frame(pair_frame(seed=1)).frame())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: CoherenceDisplay.from_estimator(object()), TypeError, "without coherence_"),
        (lambda: CoherenceDisplay.from_frame([1]), TypeError, "frame must be a pandas"),
        (
            lambda: CoherenceDisplay.from_frame(pair_frame().drop(columns="influence")),
            ValueError,
            "lacks influence",
        ),
        (
            lambda: CoherenceDisplay.from_frame(pair_frame(), pd.DataFrame({"tau": [0.0]})),
            ValueError,
            "norms must have the columns",
        ),
        (
            lambda: CoherenceDisplay.from_frame(pair_frame()).frame("norm"),
            ValueError,
            "quantity must be",
        ),
    ],
)
def test_wrong_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_from_estimator_takes_training_and_other_snapshots(measured_trajectory):
    from sklearn.pipeline import make_pipeline

    from spectralshell import JacobianBlockDiagnostic

    X = measured_trajectory[:2]
    pipe = make_pipeline(JacobianBlockDiagnostic(n_null=0)).fit(X)
    own = CoherenceDisplay.from_estimator(pipe)
    assert own.norms["jacobian_norm"].size == 2
    again = CoherenceDisplay.from_estimator(pipe, X[:1])
    np.testing.assert_array_equal(
        again.frame()["value"], own.pairs[own.pairs["batch"] == X[0].batch]["normalized"]
    )
    again.plot()
