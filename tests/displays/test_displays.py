"""All displays: the import, the extra, axes that are given, figures that are made."""

import subprocess
import sys

import matplotlib.pyplot as plt
import pytest

from spectralshell.displays import (
    CoherenceDisplay,
    ExponentDisplay,
    ShellEnergyDisplay,
    ShellFluxDisplay,
    TailFitDisplay,
    ToeplitzDisplay,
)
from tests.displays.frames import (
    fitted_frame,
    flux_frame,
    fold_frame,
    norm_frame,
    pair_frame,
    tidy_frame,
    toeplitz_frames,
    wide_frame,
)


def make_shell_energy():
    return ShellEnergyDisplay.from_frame(tidy_frame())


def make_exponent():
    return ExponentDisplay.from_frame(fold_frame())


def make_tail_fit():
    wide = wide_frame()
    return TailFitDisplay.from_frame(wide, fitted_frame(wide), b=1.6)


def make_toeplitz():
    return ToeplitzDisplay.from_frame(**toeplitz_frames())


def make_coherence():
    return CoherenceDisplay.from_frame(pair_frame(), norm_frame())


def make_shell_flux():
    return ShellFluxDisplay.from_frame(flux_frame())


@pytest.fixture(
    params=[
        make_shell_energy,
        make_exponent,
        make_tail_fit,
        make_coherence,
        make_toeplitz,
        make_shell_flux,
    ]
)
def display(request):
    return request.param()


def test_import_leaves_matplotlib_alone():
    code = "import sys, spectralshell.displays; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_matplotlib_names_the_extra(display, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    name = type(display).__name__
    with pytest.raises(ImportError, match=rf'{name}\.plot needs .* "spectralshell\[plot\]"'):
        display.plot()


def test_missing_matplotlib_leaves_the_frame(display, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert len(display.frame()) > 0


def test_plot_returns_itself_and_makes_one_figure(display):
    numbers, before = display.frame(), plt.get_fignums()
    assert display.plot() is display
    assert len(plt.get_fignums()) == len(before) + 1
    assert display.ax_.figure is display.figure_
    assert display.ax_.get_ylabel()
    assert any(ax.get_xlabel() for ax in display.figure_.axes)
    assert display.frame().equals(numbers)


def test_plot_draws_on_the_given_axes_only(display):
    figure, (left, right) = plt.subplots(1, 2)
    before = plt.get_fignums()
    display.plot(right)
    assert plt.get_fignums() == before
    assert display.ax_ is right
    assert display.figure_ is figure
    assert right.has_data()
    assert not left.has_data()


def test_legend_covers_no_data_in_an_own_figure(display):
    display.plot()
    display.figure_.draw_without_rendering()
    legend = display.legend_.get_window_extent()
    drawn = [ax for ax in display.figure_.axes if ax.has_data()]
    assert not any(legend.overlaps(ax.get_window_extent()) for ax in drawn)
    assert display.figure_.bbox.x1 >= legend.x1
