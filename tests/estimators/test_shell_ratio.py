"""The one-standard-error rule, on results made by hand."""

import numpy as np
import pytest

from spectralshell import largest_q_within_one_se


def results(mean, spread, q=(1.5, 2.0, 3.0, 6.0), name="param_q"):
    """Two splits around the means, so that the standard error is the spread."""
    mean = np.asarray(mean)
    return {
        name: list(q),
        "mean_test_score": mean,
        "split0_test_score": mean - spread,
        "split1_test_score": mean + spread,
    }


def test_takes_the_largest_within_one_standard_error_of_the_best():
    assert largest_q_within_one_se(results([-1.05, -1.0, -1.09, -1.2], 0.1)) == 2
    assert largest_q_within_one_se(results([-1.05, -1.0, -1.09, -1.2], 0.01)) == 1


def test_order_of_the_grid_does_not_matter():
    shuffled = results([-1.0, -1.05, -1.2], 0.1, q=(2.0, 4.0, 1.1))
    assert largest_q_within_one_se(shuffled) == 1


def test_finds_q_behind_a_step_name_and_passes_over_nan():
    named = results([np.nan, -1.0, -1.05, -2.0], 0.1, name="param_shellenergyestimator__q")
    assert largest_q_within_one_se(named) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"param_other__q": [1.0]}, "exactly one parameter q"),
        ({"mean_test_score": [np.nan] * 4}, "every score is NaN"),
    ],
)
def test_unusable_results_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        largest_q_within_one_se({**results([-1.0] * 4, 0.1), **changes})


def test_one_split_has_no_standard_error():
    single = results([-1.0] * 4, 0.1)
    del single["split1_test_score"]
    with pytest.raises(ValueError, match="at least two splits"):
        largest_q_within_one_se(single)
