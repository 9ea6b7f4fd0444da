"""Plots of the frames; matplotlib is imported when something is drawn."""

from spectralshell.displays.exponent import ExponentDisplay
from spectralshell.displays.shell_energy import ShellEnergyDisplay
from spectralshell.displays.tail_fit import TailFitDisplay

__all__ = ["ExponentDisplay", "ShellEnergyDisplay", "TailFitDisplay"]
