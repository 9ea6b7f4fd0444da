import numpy as np
import pytest

from spectralshell.displays._axes import (
    TauScale,
    distinct_labels,
    format_number,
    log_limits,
    set_log_ticks,
    write_counts,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.5, "0.5"),
        (1234.0, "1234"),
        (0.001234, "0.00123"),
        (1e-6, "$10^{-6}$"),
        (2.5e7, r"$2.5\times10^{7}$"),
        (-3.0, "-3"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text


def test_labels_of_close_values_stay_distinct():
    assert distinct_labels([0.10001, 0.10002]) == ["0.10001", "0.10002"]
    assert distinct_labels([0.0, 1.0]) == ["0", "1"]


def test_write_counts():
    assert write_counts([3, 3]) == "3"
    assert write_counts([2, 5, 3]) == "2–5"


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [np.nan, -1.0]])
def test_log_limits_without_positive_data(values):
    assert log_limits(np.array(values)) == (0.1, 1.0)


def test_log_limits_hold_the_data_but_no_rounding():
    low, high = log_limits(np.array([0.0, 1e-30, 0.01, 1.0]))
    assert 1e-12 < low < 0.01
    assert high > 1.0


def test_log_limits_hold_a_band_within_a_factor():
    low, high = log_limits(np.array([0.1, 1.0]), bands=np.array([1e-9, 5.0]))
    assert 1e-3 < low < 0.1
    assert high > 5.0


@pytest.mark.parametrize("limits", [(0.9, 2.2), (0.01, 8.0), (1e-9, 1.0), (3.0, 4.0), (1e-30, 1.0)])
def test_log_ticks_are_readable(limits):
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    ax.set_yscale("log")
    ax.set_ylim(*limits)
    set_log_ticks(ax.yaxis, *limits)
    ticks = [t for t in ax.yaxis.get_majorticklocs() if limits[0] <= t <= limits[1]]
    texts = [t.get_text() for t in ax.yaxis.get_minorticklabels()]
    assert 2 <= len(ticks) <= 9
    assert not any(texts)


def test_few_taus_get_distinct_colours_and_markers():
    scale = TauScale([0.0, 1.0, 1.0, 100.0])
    assert not scale.uses_colorbar
    assert len({scale.colour(t) for t in scale.taus}) == 3
    assert len({scale.marker(t) for t in scale.taus}) == 3
    assert scale.label(100.0) == r"$\tau$ = 100"


def luminance(colour):
    return float(np.dot(colour[:3], [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("taus", [[0, 1, 2, 50], np.geomspace(0.1, 100, 12), np.arange(9)])
def test_colours_brighten_with_tau(taus):
    scale = TauScale(taus)
    light = [luminance(scale.colour(t)) for t in scale.taus]
    assert np.all(np.diff(light) > 0)
    assert light[-1] < 0.8  # still readable on white


def test_tau_zero_is_grey_on_a_logarithmic_bar():
    scale = TauScale([0.0, *np.geomspace(0.1, 100, 8)])
    assert scale.is_log
    assert len(set(scale.colour(0.0)[:3])) == 1
    assert len(set(scale.colour(0.1)[:3])) == 3


@pytest.mark.parametrize("taus", [[5.0], [0.0], [], [-1.0, 0.0, 30.0]])
def test_degenerate_taus(taus):
    scale = TauScale(taus)
    assert not scale.is_log
    assert [len(scale.colour(t)) for t in scale.taus] == [4] * len(taus)
