"""Experiments with the package on real networks: ``make study-residual``."""
