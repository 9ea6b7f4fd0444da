"""The frames that a fitted ShellFluxEstimator gives, of its own snapshots and of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from sklearn.utils.validation import check_is_fitted

from spectralshell.estimators.shell_flux_frames import (
    BalancedSnapshot,
    balance_all,
    distance_frame,
    edge_frame,
    shell_balance_frame,
    summary_frame,
)
from spectralshell.estimators.shell_flux_measurement import FluxMeasurement
from spectralshell.estimators.shell_flux_trajectory import integrability_frame, trajectory_frame
from spectralshell.estimators.shell_flux_velocity import fit_velocity


class FluxResultsMixin:
    """Frames of the balances, made when they are asked for.

    For an estimator with ``_training``, ``_balanced`` and ``_fitted_shells``.
    """

    def flux_frame(self: Any, X: Sequence[Any]) -> pd.DataFrame:
        """Return the tidy frame of fluxes of new snapshots, columns as in ``fluxes_``.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others.

        Returns
        -------
        DataFrame
            One row per (snapshot, edge).
        """
        return edge_frame(self._balanced(X), self._fitted_shells())

    def balance_frame(self: Any, X: Sequence[Any]) -> pd.DataFrame:
        """Return the balance of every shell of new snapshots, columns as in ``balance_``.

        Parameters
        ----------
        X : list of Snapshot
            Snapshots, those of `fit` or others. ``lazy_energy`` starts at the first of each batch.

        Returns
        -------
        DataFrame
            One row per (snapshot, shell).
        """
        return shell_balance_frame(self._balanced(X), self._fitted_shells())

    def trajectory_frame(self: Any, X: Sequence[Any]) -> pd.DataFrame:
        """Return measured and predicted fluxes of new snapshots, columns as in ``trajectory_``.

        Parameters
        ----------
        X : list of Snapshot
            Several times of each batch.

        Returns
        -------
        DataFrame
            One row per (interval, edge).
        """
        return trajectory_frame(self._balanced(X), self._fitted_shells())

    @property
    def fluxes_(self: Any) -> pd.DataFrame:
        """Fluxes of the training snapshots, one row per (snapshot, edge)."""
        return edge_frame(self._trained(), self._fitted_shells())

    @property
    def balance_(self: Any) -> pd.DataFrame:
        """Balance of the training snapshots, one row per (snapshot, shell)."""
        return shell_balance_frame(self._trained(), self._fitted_shells())

    @property
    def summary_(self: Any) -> pd.DataFrame:
        """One row per training snapshot."""
        return summary_frame(self._trained())

    @property
    def locality_(self: Any) -> pd.DataFrame:
        """Share of transfer by shell distance, one row per (training snapshot, distance)."""
        return distance_frame(self._trained())

    @property
    def trajectory_(self: Any) -> pd.DataFrame:
        """Measured and predicted fluxes, one row per (interval, edge)."""
        return trajectory_frame(self._trained(), self._fitted_shells())

    @property
    def integrability_(self: Any) -> pd.DataFrame:
        """Integrals of flux and dissipation over the times measured, per (batch, edge)."""
        return integrability_frame(self._trained(), self._fitted_shells())

    @property
    def velocity_fit_(self: Any) -> pd.DataFrame:
        """Power law of the velocity, for all times and for each."""
        return fit_velocity(self.fluxes_, self.confidence)

    def _trained(self: Any) -> list[BalancedSnapshot]:
        check_is_fitted(self)
        trained: list[BalancedSnapshot] = self._training
        return trained

    def _balance(self: Any, measurements: list[FluxMeasurement]) -> list[BalancedSnapshot]:
        return balance_all(measurements, self._shells)


__all__ = ["FluxResultsMixin"]
