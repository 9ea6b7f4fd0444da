"""Closed forms of the theory: characteristics, tail template, loss laws, lazy decay."""

from spectralshell.dynamics.characteristics import (
    characteristic,
    characteristic_origin,
    dissipation_action,
    exact_density,
    wall,
)
from spectralshell.dynamics.lazy import lazy_density, lazy_loss, lazy_shell_energies
from spectralshell.dynamics.loss_laws import (
    log_drift_characteristic,
    log_drift_density,
    log_drift_frontier,
    log_drift_loss_exponent,
    loss_exponent,
)
from spectralshell.dynamics.shell_integrals import (
    ShellAverageGradient,
    log_shell_average,
    log_shell_average_gradient,
)
from spectralshell.dynamics.tail_template import (
    frontier,
    log_template_shell_average,
    log_template_shell_average_slopes,
    template_density,
    template_loss,
    template_shell_average,
)

__all__ = [
    "ShellAverageGradient",
    "characteristic",
    "characteristic_origin",
    "dissipation_action",
    "exact_density",
    "frontier",
    "lazy_density",
    "lazy_loss",
    "lazy_shell_energies",
    "log_drift_characteristic",
    "log_drift_density",
    "log_drift_frontier",
    "log_drift_loss_exponent",
    "log_shell_average",
    "log_shell_average_gradient",
    "log_template_shell_average",
    "log_template_shell_average_slopes",
    "loss_exponent",
    "template_density",
    "template_loss",
    "template_shell_average",
    "wall",
]
