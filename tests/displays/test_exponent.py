from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spectralshell.displays import ExponentDisplay
from tests.displays.frames import fold_frame


def legend_texts(display):
    return [text.get_text() for text in display.legend_.get_texts()]


def bars(display):
    (collection,) = display.ax_.containers[0].lines[2]
    return np.array(collection.get_segments())


def test_points_and_bars_are_the_frame():
    display = ExponentDisplay.from_frame(fold_frame()).plot()
    drawn = display.frame()
    assert_array_equal(display.points_.get_xdata(), drawn["position"])
    assert_array_equal(display.points_.get_ydata(), drawn["b"])
    assert_allclose(bars(display)[:, :, 1], drawn[["b_lower", "b_upper"]], rtol=1e-12)
    assert [text.get_text() for text in display.ax_.get_xticklabels()] == list("01234")
    assert display.ax_.get_xlabel() == "fold (held-out group)"


def test_numeric_labels_give_a_numeric_axis():
    frame = fold_frame().rename(columns={"fold": "q"}).assign(q=[1.1, 1.25, 1.5, 2.0, 3.0])
    display = ExponentDisplay.from_frame(frame).plot()
    assert_array_equal(display.frame()["position"], frame["q"])
    assert display.ax_.get_xscale() == "linear"
    wide = frame.assign(q=[10.0, 20.0, 50.0, 100.0, 400.0])
    assert ExponentDisplay.from_frame(wide).plot().ax_.get_xscale() == "log"


def test_windows_are_written_as_ranges():
    windows = [(0.1, 10.0), (1.0, 10.0), (1.0, 100.0), (0.5, 1e6), (2.0, 4.0)]
    frame = fold_frame().rename(columns={"fold": "window"}).assign(window=windows)
    display = ExponentDisplay.from_frame(frame).plot()
    texts = [text.get_text() for text in display.ax_.get_xticklabels()]
    assert texts[:3] == ["0.1–10", "1–10", "1–100"]
    assert texts[3] == "0.5–$10^{6}$"


def test_label_is_the_first_column_that_is_no_result():
    frame = fold_frame()[["score", "b", "b_lower", "b_upper", "fold"]]
    assert ExponentDisplay.from_frame(frame).label == "fold"
    assert ExponentDisplay.from_frame(frame, label="score").label == "score"


class Fitted:
    b_ = 1.52
    b_interval_ = (1.4, 1.7)


@pytest.mark.parametrize("reference", [(1.52, 1.4, 1.7), Fitted()])
def test_reference_is_drawn_across(reference):
    display = ExponentDisplay.from_frame(fold_frame(), reference=reference).plot()
    assert display.reference == (1.52, 1.4, 1.7)
    lines = [line for line in display.ax_.lines if "all data" in str(line.get_label())]
    assert_array_equal(lines[0].get_ydata(), [1.52, 1.52])
    (patch,) = display.ax_.patches
    assert_allclose([patch.get_y(), patch.get_y() + patch.get_height()], [1.4, 1.7])


@pytest.mark.parametrize("reference", [None, (np.nan, np.nan, np.nan)])
def test_no_reference_no_line(reference):
    display = ExponentDisplay.from_frame(fold_frame(), reference=reference).plot()
    assert not any("all data" in text for text in legend_texts(display))
    assert not display.ax_.patches


def test_missing_and_open_results_are_shown_as_such():
    frame = fold_frame()
    frame.loc[1, ["b", "b_lower", "b_upper"]] = np.nan
    frame.loc[2, ["b_lower", "b_upper"]] = np.nan
    frame.loc[3, "b_upper"] = np.inf
    display = ExponentDisplay.from_frame(frame).plot()
    assert legend_texts(display)[:3] == ["$b$ with interval", "$b$ without interval", "no estimate"]
    assert len(display.points_.get_xdata()) == 4
    low, high = display.ax_.get_ylim()
    assert high < 3.0
    assert bars(display)[1, 1, 1] > high
    assert low < frame["b_lower"].min()


def test_all_missing():
    frame = fold_frame().assign(b=np.nan, b_lower=np.nan, b_upper=np.nan)
    display = ExponentDisplay.from_frame(frame).plot()
    display.figure_.draw_without_rendering()
    assert legend_texts(display)[0] == "no estimate"


@pytest.mark.parametrize(("shift", "shown"), [(0.0, False), (-0.5, True)])
def test_degenerate_line_only_when_in_view(shift, shown):
    frame = fold_frame()
    frame[["b", "b_lower", "b_upper"]] += shift
    display = ExponentDisplay.from_frame(frame).plot()
    assert any("look alike" in text for text in legend_texts(display)) is shown


@pytest.mark.parametrize("n_folds", [1, 40])
def test_one_and_many_folds(n_folds):
    display = ExponentDisplay.from_frame(fold_frame(n_folds)).plot()
    display.figure_.draw_without_rendering()
    boxes = [text.get_window_extent() for text in display.ax_.get_xticklabels()]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ExponentDisplay.from_frame([1.5]), TypeError, "cross_validate_exponent"),
        (lambda: ExponentDisplay.from_frame(fold_frame()[["b"]]), ValueError, "label="),
        (
            lambda: ExponentDisplay.from_frame(fold_frame().drop(columns="b_lower")),
            ValueError,
            "b_lower",
        ),
        (lambda: ExponentDisplay.from_frame(fold_frame(), label="q"), ValueError, "label="),
        (
            lambda: ExponentDisplay.from_frame(fold_frame(), reference=(1, 2)),
            ValueError,
            "reference must be",
        ),
        (
            lambda: ExponentDisplay.from_frame(fold_frame(), reference=(1.5, (1, 2))),
            ValueError,
            "reference must be",
        ),
        (
            lambda: ExponentDisplay.from_frame(fold_frame(2).assign(q=[1.0, np.nan]), label="q"),
            ValueError,
            "column 'q' .* row 1",
        ),
    ],
)
def test_errors_name_the_remedy(call, error, text):
    with pytest.raises(error, match=text):
        call()
    assert plt.get_fignums() == []
