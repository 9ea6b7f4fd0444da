"""Intervals on samples and profiles whose answers are known in closed form."""

import numpy as np
import pytest
from scipy import stats

from spectralshell.estimators.intervals import jackknife_t, profile_interval, profile_threshold


def means_with_replicates(sample):
    """The mean, then the mean without each entry."""
    return np.append(sample.mean(), (sample.sum() - sample) / (len(sample) - 1))


def test_jackknife_of_a_mean_is_its_own_interval():
    sample = np.array([1.0, 2.0, 4.0, 5.0])
    half, error = jackknife_t(means_with_replicates(sample), 0.95)
    assert error == pytest.approx(sample.std(ddof=1) / 2)
    lower, upper = stats.t.interval(0.95, 3, loc=3.0, scale=error)
    assert (3.0 - half, 3.0 + half) == pytest.approx((lower, upper))


def test_jackknife_t_covers():
    def covers(seed):
        sample = np.random.default_rng(seed).normal(size=8)
        return abs(sample.mean()) <= jackknife_t(means_with_replicates(sample), 0.9)[0]

    # exact for a Gaussian mean: 0.9 ± three standard errors of 1,000 draws
    assert np.mean([covers(seed) for seed in range(1000)]) == pytest.approx(0.9, abs=0.03)


def test_profile_interval_of_a_parabola():
    ends = profile_interval(lambda theta: (theta - 1.0) ** 2, 1.0, 0.25, (-3.0, 8.0))
    assert ends == pytest.approx((0.5, 1.5), abs=1e-4)


def test_profile_interval_is_open_where_the_profile_stays_low():
    ends = profile_interval(lambda theta: np.maximum(theta, 0.0) ** 2, 0.0, 0.25, (-3.0, 8.0))
    assert ends == pytest.approx((-np.inf, 0.5), abs=1e-4)


def test_threshold_without_freedom_bounds_nothing():
    assert profile_threshold(1.0, 5, 5, 0.95) == np.inf
