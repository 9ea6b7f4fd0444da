"""Spectral measures of error vectors: their energy over the eigenvalues of M, and its floors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralshell.parameter_checks import check_real
from spectralshell.statuses import OK
from spectralshell.warning_categories import DynamicsWarning

Floats = NDArray[np.float64]

# Weights and total come from two summations; more than this is a normalisation mistake.
_TOTAL_TOLERANCE = 1e-9

# What summing the weights in another order changes, with room for 1e4 of them.
_ROUNDING = 1e-14

# With no noise, null is what has eigenvalue zero or less.
SMALLEST_RATE = float(np.finfo(np.float64).tiny)

_POINTS_PER_OCTAVE = 2

# Bounds half as far apart as the energy of the octave above: a smooth measure reaches this near
# 40 λ_max/m², inside the known range of 10 to 80.
_WIDTH_PER_OCTAVE_ENERGY = 0.5

# Where the spectrum has a gap the octave is empty; a thousandth of all the energy is then fine.
_WIDTH_PER_TOTAL = 1e-3

# The noise bounds one product; the eigenvalues of a rounded null space reach a little further.
_NOISE_MARGIN = 2.0


class EnergyBounds(Protocol):
    """Anything with certified bounds of the energy strictly below an edge."""

    def at(self, edges: Floats, /) -> tuple[Floats, Floats]:
        """Return (lower, upper), each of the shape of ``edges``."""

    def unwidened(self, edges: Floats, /) -> tuple[Floats, Floats]:
        """Return (lower, upper) before any allowance for rounding; their middle estimates."""


@dataclass(frozen=True, eq=False)
class SpectralMeasure:
    """Energy ½‖e‖² of one residual, spread over the spectrum of M = J J*.

    Parameters
    ----------
    nodes : array-like of float, shape (m,)
        Eigenvalues or Ritz values, unit 1/τ, in any order; negative ones are kept.
    weights : array-like of float, shape (m,)
        Energies ½g² at the nodes (the ½ is in), non-negative.
    total : float
        ½‖e‖². What the weights leave out of it has eigenvalue 0.
    lambda_max : float
        Largest eigenvalue of M.
    floor : float
        Resolution floor, an absolute λ: shells that begin below it are unresolved.
    noise : float
        Absolute bound of the operator's rounding error, in the units of λ.
    tau : float, default=0.0
        Effective training time.
    batch : int or str, default=0
        Label of the batch.
    name : str, optional
        Label of the run or model.
    bounds : object with ``at(edges) -> (lower, upper)``, optional
        Certified bounds of the energy strictly below each edge.
    residual_norms : array-like of float, shape (m,), optional
        ‖Mφ − λφ‖ of each node.
    solver : str, default="exact"
        Where the measure comes from. Unless it is ``"exact"``, bounds define the energies.
    rung : str, default=""
        The way the operator was differentiated.
    n_matvecs, n_probes, n_outputs, n_rows : int, default=0
        Products behind the measure, products spent on probes, entries of e, rows N.
    dynamics_exact : bool, default=True
        Whether ė = −M e holds for this residual and model.
    jacobian_defect : float, default=0.0
        By how much the outputs change otherwise than J of reverse mode says, relative to their
        change; 0.0 where no difference is certain. Rates are those of M = J J* all the same.
    status : str, default="ok"
        Phrases joined by ``"; "``.
    plan : dict, optional
        What was predicted before the measurement: the solver chosen, costs and memory.

    Raises
    ------
    TypeError, ValueError
        If shapes disagree, values are not finite, a weight is negative, or the weights exceed
        ``total`` by more than rounding.

    Notes
    -----
    A measure is *counted* if it is exact or has no bounds: energies are sums of weights, and nodes
    below ``noise`` are null. Otherwise the energy below an edge is the middle of its bounds before
    their widening for rounding, kept within the widened ones, and shell energies are the
    differences of these. All are made monotone in λ, so energies are never negative.

    Examples
    --------
    >>> measure = SpectralMeasure([0.5, 3.0], [0.25, 0.5], total=1.0, lambda_max=3.0, floor=0.0,
    ...                           noise=1e-12)
    >>> measure.energies([0.1, 1.0, 4.0]).tolist()  # the energy in no mode is null
    [0.25, 0.25, 0.5]
    >>> measure.lazy_decay(0.0)
    1.0
    """

    nodes: Floats
    weights: Floats
    total: float
    lambda_max: float
    floor: float
    noise: float
    tau: float = 0.0
    batch: int | str = 0
    name: str | None = None
    bounds: EnergyBounds | None = None
    residual_norms: Floats | None = None
    solver: str = "exact"
    rung: str = ""
    n_matvecs: int = 0
    n_probes: int = 0
    n_outputs: int = 0
    n_rows: int = 0
    dynamics_exact: bool = True
    jacobian_defect: float = 0.0
    status: str = OK
    plan: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        nodes = finite_vector("nodes", self.nodes)
        weights = finite_vector("weights", self.weights, length=nodes.size)
        order = np.argsort(nodes, kind="stable")
        self._set("nodes", read_only(nodes[order]))
        self._set("weights", read_only(weights[order]))
        if self.residual_norms is not None:
            norms = finite_vector("residual_norms", self.residual_norms, length=nodes.size)
            self._set("residual_norms", read_only(norms[order]))
        for field in ("total", "lambda_max", "floor", "noise"):
            self._set(field, check_real(field, getattr(self, field), low=0.0))
        self._set("tau", check_real("tau", self.tau))
        self._set("batch", check_label("batch", self.batch))
        self._set("name", None if self.name is None else check_name(self.name))
        if (weights < 0.0).any():
            raise ValueError("weights holds a negative energy; pass energies ½g², never negative.")
        if weights.sum() > self.total * (1.0 + _TOTAL_TOLERANCE):
            raise ValueError(
                f"weights sum to {weights.sum()!r}, more than total={self.total!r}; both must be "
                "energies, with the factor ½."
            )

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    @property
    def counted(self) -> bool:
        """Whether energies are sums of weights (True) or middles of bounds (False)."""
        return self.bounds is None or self.solver == "exact"

    @property
    def n_negative(self) -> int:
        """Number of negative nodes; their energy is part of ``null``."""
        return int(np.count_nonzero(self.nodes < 0.0))

    @cached_property
    def null(self) -> float:
        """Energy below the noise; without noise, at rates of zero and below."""
        return float(self._estimate(np.array([self.noise or SMALLEST_RATE]))[0])

    @property
    def missing(self) -> float:
        """Energy of ``total`` that no node carries, so of eigenvalue 0; 0 within rounding."""
        missing = self.total - float(self.weights.sum())
        return missing if missing > _ROUNDING * self.total else 0.0

    def cumulative(self, edges: ArrayLike) -> tuple[Floats, Floats, Floats]:
        """Return lower bound, estimate and upper bound of the energy strictly below each edge.

        Parameters
        ----------
        edges : array-like of float, shape (k,)
            Positive and non-decreasing.

        Returns
        -------
        lower, mid, upper : ndarray of float64, shape (k,)
            Each non-decreasing and within [0, total]; lower ≤ mid ≤ upper.
        """
        checked = check_edges(edges)
        mid = self.estimate(checked)
        below = np.searchsorted(self.nodes, checked, side="left")
        if not self.counted:
            lower, upper = self._monotone_bounds(checked)
            return np.minimum(lower, mid), mid, np.maximum(upper, mid)
        # Nodes below the noise may lie on either side of an edge: counted as null, bounded by both.
        strict = np.minimum(self._running()[below] + self.missing, self.total)
        if self.bounds is None:
            return strict, mid, mid.copy()
        lower, upper = self._monotone_bounds(checked)
        return np.minimum(lower, strict), mid, np.maximum(upper, mid)

    def estimate(self, edges: ArrayLike) -> Floats:
        """Return the energy strictly below each edge, without its bounds.

        Parameters
        ----------
        edges : array-like of float, shape (k,)
            Positive and non-decreasing.

        Returns
        -------
        ndarray of float64, shape (k,)
            Non-decreasing and within [0, total]; the middle of `cumulative`, at a small part of
            its cost.
        """
        return self._estimate(check_edges(edges))

    def energies(self, edges: ArrayLike) -> Floats:
        """Return ``null`` and the shell energies E_α.

        Parameters
        ----------
        edges : array-like of float, shape (n_shells + 1,)

        Returns
        -------
        ndarray of float64, shape (n_shells + 1,)
            First the energy below the first edge, then the shells; what lies above the last edge
            is in the last shell. They add up to ``total``.
        """
        checked = check_edges(edges, at_least=2)
        if self.counted:
            energies = self._count(checked, self.weights)
            energies[0] += self.missing
            return energies
        return np.diff(self.estimate(checked[:-1]), prepend=0.0, append=self.total)

    def density(self, edges: ArrayLike) -> Floats:
        """Return ε = E_α / width of each shell, shape (n_shells,)."""
        return self.energies(edges)[1:] / np.diff(check_edges(edges, at_least=2))

    def dissipation(self, edges: ArrayLike) -> Floats:
        """Return ``null`` and the dissipation D_α = Σ λ g² = 2 Σ λ w, energy per τ.

        It is summed over nodes, also for Lanczos measures: its sum over all shells is exact there
        from two steps on, its split between neighbouring shells is that of the Ritz values.
        """
        return self._count(check_edges(edges, at_least=2), 2.0 * self.nodes * self.weights)

    def counts(self, edges: ArrayLike) -> NDArray[np.int64]:
        """Return the number of nodes in ``null`` and in each shell, shape (n_shells + 1,)."""
        checked = check_edges(edges, at_least=2)
        return np.bincount(self._bins(checked), minlength=checked.size).astype(np.int64)

    def lazy_decay(self, tau: ArrayLike) -> Any:
        """Return Σ w e^(−2λτ), the loss that a frozen kernel predicts after a further time τ.

        Parameters
        ----------
        tau : float or array-like of float
            Time since this measure was taken.

        Returns
        -------
        float or ndarray of float64
            Of the shape of ``tau``. Energy without a node has eigenvalue 0 and stays. Cost: one
            exponential per node and time.

        Warns
        -----
        DynamicsWarning
            If ``dynamics_exact`` is False: no kernel, frozen or not, then makes the energy decay
            at these rates.
        """
        if not self.dynamics_exact:
            warnings.warn(
                "lazy_decay needs ė = −M e, which this residual or model does not have; measure "
                'with residual="mse" or "brier", and a model whose outputs change as its Jacobian '
                "says, to predict a loss.",
                DynamicsWarning,
                stacklevel=2,
            )
        elapsed = np.asarray(tau, dtype=np.float64)
        if not np.isfinite(elapsed).all():
            raise ValueError(f"tau must be finite, got {tau!r}; pass elapsed training times.")
        decay = np.exp(-2.0 * elapsed[..., None] * self.nodes) @ self.weights + self.missing
        return float(decay) if elapsed.ndim == 0 else decay

    def relabel(
        self,
        *,
        tau: float | None = None,
        batch: int | str | None = None,
        name: str | None = None,
    ) -> SpectralMeasure:
        """Return the same measure under other labels; those left out stay as they are."""
        if (tau, batch, name) == (self.tau, self.batch, self.name) and not isinstance(batch, bool):
            return self
        wanted = {
            "tau": self.tau if tau is None else check_real("tau", tau),
            "batch": self.batch if batch is None else check_label("batch", batch),
            "name": self.name if name is None else check_name(name),
        }
        relabelled = copy(self)  # shares what is read-only, and what was computed from it
        for label, value in wanted.items():
            relabelled._set(label, value)
        return relabelled

    def _estimate(self, edges: Floats) -> Floats:
        if self.bounds is not None and not self.counted:
            lower, upper = self.bounds.unwidened(edges)
            middle = np.maximum.accumulate(0.5 * (lower + upper))
            return np.minimum(np.maximum(middle, 0.0), self.total)
        return self._counted_below[self.nodes.searchsorted(edges, side="left")]

    @cached_property
    def _counted_below(self) -> Floats:
        """Energy counted below a rate by the number of nodes below it, shape (m + 1,)."""
        null = self.nodes.searchsorted(self.noise, side="left")
        rank = np.maximum(np.arange(self.nodes.size + 1), null)
        return read_only(np.minimum(self._running()[rank] + self.missing, self.total))

    def _running(self) -> Floats:
        return np.concatenate([[0.0], np.cumsum(self.weights)])

    def _monotone_bounds(self, edges: Floats) -> tuple[Floats, Floats]:
        if self.bounds is None:
            raise TypeError("bounds is None, expected an object with at(edges).")
        lower, upper = self.bounds.at(edges)
        # The true cumulative is monotone, so a bound holds at every edge further out too.
        lower = np.maximum.accumulate(np.clip(lower, 0.0, self.total))
        upper = np.minimum.accumulate(np.clip(upper, 0.0, self.total)[::-1])[::-1]
        return np.minimum(lower, upper), np.maximum(lower, upper)

    def _bins(self, edges: Floats) -> NDArray[np.intp]:
        bins = np.minimum(np.searchsorted(edges, self.nodes, side="right"), edges.size - 1)
        return np.where(self.nodes < self.noise, 0, bins) if self.counted else bins

    def _count(self, edges: Floats, values: Floats) -> Floats:
        counted = np.bincount(self._bins(edges), weights=values, minlength=edges.size)
        return counted.astype(np.float64)  # bincount of nothing gives integers


def cumulative_energies(measures: Sequence[SpectralMeasure], edges: ArrayLike) -> Floats:
    """Return the energy of many measures strictly below each edge.

    Parameters
    ----------
    measures : sequence of SpectralMeasure
        At least one.
    edges : array-like of float, shape (k,)
        Positive and non-decreasing.

    Returns
    -------
    ndarray of float64, shape (n_measures, k)
        Rows are those of `SpectralMeasure.estimate`.

    Examples
    --------
    >>> measure = SpectralMeasure([0.5], [1.0], total=1.0, lambda_max=0.5, floor=0.0, noise=0.0)
    >>> cumulative_energies([measure], [0.1, 1.0]).tolist()
    [[0.0, 1.0]]
    """
    checked = check_edges(edges)
    return np.array([measure._estimate(checked) for measure in measures])


def noise_floor(noise: float, lambda_max: float, n: int) -> float:
    """Lowest rate that rounding leaves meaningful, for a spectrum known completely.

    Parameters
    ----------
    noise : float
        Norm bound of the operator's rounding error, 1/τ.
    lambda_max : float
        Largest eigenvalue, 1/τ.
    n : int
        Dimension of M; a dense eigensolver in float64 is accurate to about n ε λ_max.

    Returns
    -------
    float
        The floor, 1/τ, at most ``lambda_max``.

    Examples
    --------
    >>> noise_floor(6e-7, 1.0, 640)  # float32 products
    1.2e-06
    """
    rounding = n * float(np.finfo(np.float64).eps) * lambda_max
    return min(max(_NOISE_MARGIN * noise, rounding), lambda_max)


def quadrature_floor(bounds: EnergyBounds, total: float, lambda_max: float, lowest: float) -> float:
    """Lowest rate above which a Gauss quadrature determines the energy of an octave.

    Test points stand at every half octave below ``lambda_max``, whatever the shell ratio is. A
    point is resolved if the bounds of the energy below it (without their allowance for rounding)
    are closer than half the energy of the octave above it, or than a thousandth of all energy.
    The floor is the lowest point that has only resolved points above it.

    Parameters
    ----------
    bounds : object with a method ``unwidened``
        Bounds of the cumulative energy.
    total : float
        ½‖e‖².
    lambda_max : float
        Largest Ritz value, 1/τ.
    lowest : float
        The noise floor, below which there is nothing to find.

    Returns
    -------
    float
        The floor, 1/τ, between ``lowest`` and ``lambda_max``.

    Notes
    -----
    For a smooth measure the floor falls as λ_max/m² with the number m of Lanczos steps; isolated
    eigenvalues are resolved far below that. It costs one evaluation of the bounds at about
    2 log₂(λ_max/lowest) points.
    """
    if total <= 0.0 or not 0.0 < lowest < lambda_max:
        return lowest
    n_points = 1 + int(np.ceil(_POINTS_PER_OCTAVE * np.log2(lambda_max / lowest)))
    points = lambda_max * 2.0 ** (-np.arange(1, n_points + 1) / _POINTS_PER_OCTAVE)
    lower, upper = bounds.unwidened(points)
    above = np.full(_POINTS_PER_OCTAVE, total)
    middle = np.concatenate([above, 0.5 * (lower + upper)])
    octave = middle[:-_POINTS_PER_OCTAVE] - middle[_POINTS_PER_OCTAVE:]
    allowed = np.maximum(_WIDTH_PER_OCTAVE_ENERGY * octave, _WIDTH_PER_TOTAL * total)
    failed = np.flatnonzero(upper - lower > allowed)
    n_resolved = int(failed[0]) if failed.size else n_points
    return max(float(points[n_resolved - 1]) if n_resolved else lambda_max, lowest)


def finite_vector(name: str, values: Any, *, length: int | None = None) -> Floats:
    """Return a float64 copy; raise unless it is a finite vector of that length."""
    vector = np.array(values, dtype=np.float64)
    if vector.ndim != 1 or (length is not None and vector.size != length):
        expected = "(m,)" if length is None else f"({length},) like nodes"
        raise ValueError(f"{name} must have shape {expected}, got {vector.shape}.")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} holds NaN or infinity, expected finite values; check the solve.")
    return vector


def read_only(vector: Floats) -> Floats:
    """Return the vector, which can no longer be written to."""
    vector.flags.writeable = False
    return vector


def check_name(name: Any) -> str:
    """Return the name; raise unless it is a string."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string or None, got {name!r}.")
    return name


def check_label(name: str, value: Any) -> int | str:
    """Return a label as int or str; raise on anything else."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{name} must be an integer or a string, got {value!r}; relabel the batch.")


def check_edges(edges: ArrayLike, *, at_least: int = 1) -> Floats:
    """Return edges as a vector; raise unless positive, finite and non-decreasing."""
    vector = np.asarray(edges, dtype=np.float64)
    if vector.ndim != 1 or vector.size < at_least:
        raise ValueError(
            f"edges must be one-dimensional with at least {at_least} entries, got {vector.shape}."
        )
    if not (vector[0] > 0.0 and np.isfinite(vector).all() and (np.diff(vector) >= 0.0).all()):
        raise ValueError(
            f"edges must be finite, positive and increasing, got {vector!r}; sort them, or take "
            "ShellPartition.edges."
        )
    return vector
