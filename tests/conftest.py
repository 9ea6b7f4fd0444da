"""Fixtures that several parts share."""

import os

import pytest
from hypothesis import settings

from spectralshell.datasets import load_digits_trajectory
from spectralshell.operators.set_up import forget_set_ups
from tests.device import place_trajectory

# A change is judged by the examples that everybody sees; other runs look for new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

SMALL_TRAJECTORY = {
    "n_snapshots": 3,
    "n_batches": 4,
    "batch_size": 8,
    "hidden": (12,),
    "max_iter": 200,
}


@pytest.fixture(autouse=True)
def whole_set_up():
    """No test finds what another has settled for a model of the same code."""
    forget_set_ups()


@pytest.fixture
def trajectory():
    """Twelve snapshots of a small network on the digits, n = 80 each, without measures."""
    return place_trajectory(load_digits_trajectory(**SMALL_TRAJECTORY))


@pytest.fixture(scope="session")
def measured_trajectory():
    """The same snapshots for the whole run: they keep the measures of the first test."""
    return place_trajectory(load_digits_trajectory(**SMALL_TRAJECTORY))


@pytest.fixture
def clean_matplotlib():
    """No window, no figure left behind, no change of matplotlib's global settings."""
    import matplotlib as mpl

    backend = mpl.get_backend()
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    settings = dict(mpl.rcParams)
    open_before = set(plt.get_fignums())
    yield
    for number in set(plt.get_fignums()) - open_before:
        plt.close(number)
    assert dict(mpl.rcParams) == settings
    mpl.use(backend)
