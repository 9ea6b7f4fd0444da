"""Data sets: small real trajectories, and synthetic spectra whose exponents are known."""

from spectralshell.datasets.digits import load_digits_trajectory
from spectralshell.datasets.synthetic import make_grsd_spectra, make_lazy_spectra

__all__ = ["load_digits_trajectory", "make_grsd_spectra", "make_lazy_spectra"]
