"""Checks of parameters: what comes back, and the text where something is wrong."""

import numpy as np
import pytest

from spectralshell.parameter_checks import (
    check_integer,
    check_option,
    check_real,
    check_sample_weight,
    check_window,
)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2.0), np.int64(2)])
def test_a_real_number_comes_back_as_a_float(value):
    found = check_real("q", value, low=1.0, low_open=True)
    assert (type(found), found) == (float, 2.0)


@pytest.mark.parametrize("value", [5, np.int32(5)])
def test_an_integer_comes_back_as_an_int(value):
    found = check_integer("n_steps", value, low=1)
    assert (type(found), found) == (int, 5)


@pytest.mark.parametrize(
    ("check", "value", "limits", "error", "text"),
    [
        (check_real, True, {}, TypeError, "q must be a real number, got True of type bool"),
        (check_real, "2", {}, TypeError, "got '2' of type str"),
        (check_real, float("nan"), {}, ValueError, "q must be finite, got nan"),
        (check_real, 1.0, {"low": 1.0, "low_open": True}, ValueError, "finite and > 1.0, got 1.0"),
        (check_real, 3.0, {"low": 0.0, "high": 2.0}, ValueError, ">= 0.0 and <= 2.0, got 3.0"),
        (check_real, 2.0, {"high": 2.0, "high_open": True}, ValueError, "and < 2.0, got 2.0"),
        (check_integer, True, {}, TypeError, "q must be an integer, got True of type bool"),
        (check_integer, 2.0, {}, TypeError, "got 2.0 of type float"),
        (check_integer, 0, {"low": 1}, ValueError, "q must be an integer and >= 1, got 0"),
    ],
)
def test_what_is_wrong_is_named(check, value, limits, error, text):
    with pytest.raises(error) as found:
        check("q", value, **limits)
    assert text in str(found.value)


def test_an_option_is_one_of_those_listed():
    assert check_option("solver", "exact", ("auto", "exact")) == "exact"
    for value in ("lanczos", None, ["auto"]):
        with pytest.raises(ValueError, match="solver must be one of 'auto', 'exact', got"):
            check_option("solver", value, ("auto", "exact"))


def test_a_window_is_two_rates_or_none():
    assert check_window("window", (1, 10)) == (1.0, 10.0)
    assert check_window("window", None) is None


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (3.0, TypeError, "None or a pair"),
        ((1, 2, 3), TypeError, "None or a pair"),
        ((0.0, 1.0), ValueError, r"window\[0\] must be finite and > 0.0"),
        ((1.0, float("inf")), ValueError, r"window\[1\] must be finite"),
        ((2.0, 1.0), ValueError, "lambda_lo < lambda_hi"),
    ],
)
def test_a_window_that_is_none_is_an_error(value, error, text):
    with pytest.raises(error, match=text):
        check_window("window", value)


def test_sample_weights_are_ones_by_default():
    assert check_sample_weight(None, 2).tolist() == [1.0, 1.0]
    assert check_sample_weight([1, 3], 2).tolist() == [1.0, 3.0]


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [[1.0], [2.0]]])
def test_sample_weights_that_do_not_fit_are_an_error(weights):
    with pytest.raises(ValueError, match="sample_weight"):
        check_sample_weight(weights, 2)
