"""Plots of the frames; matplotlib is imported when something is drawn."""

from spectralshell.displays.coherence import CoherenceDisplay
from spectralshell.displays.exponent import ExponentDisplay
from spectralshell.displays.shell_energy import ShellEnergyDisplay
from spectralshell.displays.shell_flux import ShellFluxDisplay
from spectralshell.displays.tail_fit import TailFitDisplay
from spectralshell.displays.toeplitz import ToeplitzDisplay

__all__ = [
    "CoherenceDisplay",
    "ExponentDisplay",
    "ShellEnergyDisplay",
    "ShellFluxDisplay",
    "TailFitDisplay",
    "ToeplitzDisplay",
]
