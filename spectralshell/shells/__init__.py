"""Logarithmic shells: partitions, spectral measures, and the frames made of them."""

from spectralshell.shells.batch_mean import mean_measure
from spectralshell.shells.frames import (
    average_over_batches,
    energy_frame,
    read_frame,
    shell_frame,
    write_frame,
)
from spectralshell.shells.measure import SpectralMeasure, cumulative_energies
from spectralshell.shells.partition import (
    ShellPartition,
    edges_from_names,
    parse_shell_name,
    shell_name,
)
from spectralshell.shells.resolution import noise_floor, quadrature_floor

__all__ = [
    "ShellPartition",
    "SpectralMeasure",
    "average_over_batches",
    "cumulative_energies",
    "edges_from_names",
    "energy_frame",
    "mean_measure",
    "noise_floor",
    "parse_shell_name",
    "quadrature_floor",
    "read_frame",
    "shell_frame",
    "shell_name",
    "write_frame",
]
