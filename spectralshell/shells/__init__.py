"""Logarithmic shells: partitions, spectral measures, and the frames made of them."""

from spectralshell.shells.batch_mean import mean_measure
from spectralshell.shells.coupling import permutation_p_value, permuted_couplings, shell_coupling
from spectralshell.shells.coupling_statistics import (
    diagonal_scaling,
    intra_inter_ratio,
    offset_kernel,
    toeplitz_part,
    toeplitz_residual,
)
from spectralshell.shells.flux import EdgeBalance, ShellBalance, shell_balance
from spectralshell.shells.frames import (
    average_over_batches,
    energy_frame,
    read_frame,
    shell_frame,
    write_frame,
)
from spectralshell.shells.measure import (
    SpectralMeasure,
    cumulative_energies,
    noise_floor,
    quadrature_floor,
)
from spectralshell.shells.partition import (
    ShellPartition,
    edges_from_names,
    parse_shell_name,
    shell_name,
)
from spectralshell.shells.soft_shells import SoftShells

__all__ = [
    "EdgeBalance",
    "ShellBalance",
    "ShellPartition",
    "SoftShells",
    "SpectralMeasure",
    "average_over_batches",
    "cumulative_energies",
    "diagonal_scaling",
    "edges_from_names",
    "energy_frame",
    "intra_inter_ratio",
    "mean_measure",
    "noise_floor",
    "offset_kernel",
    "parse_shell_name",
    "permutation_p_value",
    "permuted_couplings",
    "quadrature_floor",
    "read_frame",
    "shell_balance",
    "shell_coupling",
    "shell_frame",
    "shell_name",
    "toeplitz_part",
    "toeplitz_residual",
    "write_frame",
]
