"""No window, no figure left behind, no change of matplotlib's global settings."""

import matplotlib as mpl
import pytest


@pytest.fixture(scope="package", autouse=True)
def agg_backend():
    before = mpl.get_backend()
    mpl.use("Agg")
    yield
    mpl.use(before)


@pytest.fixture(autouse=True)
def clean_matplotlib(agg_backend):
    import matplotlib.pyplot as plt

    settings = dict(mpl.rcParams)
    open_before = set(plt.get_fignums())
    yield
    for number in set(plt.get_fignums()) - open_before:
        plt.close(number)
    assert dict(mpl.rcParams) == settings
