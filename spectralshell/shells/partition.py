"""Logarithmic shells of the spectrum: their edges, their names, and which shell holds a rate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spectralshell.parameter_checks import check_integer, check_real

NULL = "null"
MAX_SHELLS = 100_000
_LARGEST_RATE = 1e300  # so that the edge above it is finite for ratios up to 1e8

# How far an edge may lie from λ0 q^α, in parts of a shell's width in ln λ.
EDGE_SLACK = 1e-4

_MOST_DIGITS = 17  # these tell all floats apart

_NAME = re.compile(r"shell\[([^,\[\]()]+),([^,\[\]()]+)\)")


@dataclass(frozen=True)
class ShellPartition:
    """Shells S_α = [λ0 q^α, λ0 q^(α+1)) for α = first, …, first + n_shells − 1, edges rounded.

    Parameters
    ----------
    q : float
        Shell ratio, above 1.
    lambda_0 : float
        Rate (1/τ) at which shell 0 begins, positive.
    first : int
        Index α of the lowest shell; negative for shells below ``lambda_0``.
    n_shells : int
        Number of shells, at least 1.

    Raises
    ------
    TypeError, ValueError
        If a parameter is out of range, or if the edges overflow, underflow or coincide in float64.

    Notes
    -----
    Each edge is ``lambda_0 * q**alpha`` in the fewest significant digits that keep it within
    1e-4·ln q of it (difference of logarithms), so that names of columns are short. The rounded
    number is the edge, everywhere. It is computed on its own, so it is the same float in every
    partition that contains it. Shells are those of Section 3.2 of "Renormalizable spectral-shell
    dynamics".

    Examples
    --------
    >>> shells = ShellPartition(q=2.0, lambda_0=1.0, first=-1, n_shells=3)
    >>> shells.edges.tolist()
    [0.5, 1.0, 2.0, 4.0]
    >>> shells.index([0.4, 0.5, 1.0, 7.0]).tolist()  # an edge belongs to the shell above it
    [-1, 0, 1, 2]
    >>> shells.names[0]
    'shell[0.5,1.0)'
    """

    q: float
    lambda_0: float
    first: int
    n_shells: int

    def __post_init__(self) -> None:
        q = check_real("q", self.q, low=1.0, low_open=True)
        lambda_0 = check_real("lambda_0", self.lambda_0, low=0.0, low_open=True)
        object.__setattr__(self, "q", q)
        object.__setattr__(self, "lambda_0", lambda_0)
        object.__setattr__(self, "first", check_integer("first", self.first))
        n_shells = check_integer("n_shells", self.n_shells, low=1, high=MAX_SHELLS)
        object.__setattr__(self, "n_shells", n_shells)
        edges = self.edges
        if not (np.all(np.isfinite(edges)) and edges[0] > 0.0 and np.all(np.diff(edges) > 0.0)):
            raise ValueError(
                f"q={q!r}, lambda_0={lambda_0!r}, first={self.first}, n_shells={n_shells} give "
                "edges that are not finite, positive and increasing in float64; take q further "
                "from 1 or fewer shells."
            )

    @cached_property
    def edges(self) -> NDArray[np.float64]:
        """Edges λ0 q^α in few digits, increasing, shape (n_shells + 1,), read-only."""
        powers = range(self.first, self.first + self.n_shells + 1)
        edges = np.array([_edge(self.q, self.lambda_0, alpha) for alpha in powers])
        edges.flags.writeable = False
        return edges

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Column names ``shell[lo,hi)``, one per shell."""
        edges = self.edges.tolist()
        return tuple(map(shell_name, edges[:-1], edges[1:]))

    @property
    def widths(self) -> NDArray[np.float64]:
        """Widths hi − lo, shape (n_shells,), unit 1/τ."""
        return np.diff(self.edges)

    @property
    def midpoints(self) -> NDArray[np.float64]:
        """Geometric midpoints √(lo·hi), shape (n_shells,), unit 1/τ."""
        roots = np.sqrt(self.edges)
        return roots[:-1] * roots[1:]

    def index(self, lam: ArrayLike) -> NDArray[np.intp]:
        """Return the position (0 … n_shells − 1) of the shell that holds each rate.

        Parameters
        ----------
        lam : array-like of float
            Rates, any shape, negative and infinite values included.

        Returns
        -------
        ndarray of int, same shape
            −1 below the first edge. A rate equal to an edge belongs to the shell above it. Rates
            at or above the last edge go to the last shell; `overflow` tells them apart.

        Raises
        ------
        ValueError
            If a rate is NaN.
        """
        position = np.searchsorted(self.edges, _rates(lam), side="right") - 1
        return np.minimum(position, self.n_shells - 1)

    def overflow(self, lam: ArrayLike) -> NDArray[np.bool_]:
        """Return True where a rate lies at or above the last edge."""
        return np.asarray(_rates(lam) >= self.edges[-1])

    @classmethod
    def covering(
        cls, lo: float, hi: float, *, q: float = 2.0, lambda_0: float = 1.0
    ) -> ShellPartition:
        """Return the shells between a resolution floor and a largest eigenvalue.

        The first edge is the smallest one at or above ``lo``, the last the smallest one strictly
        above ``hi``; there is at least one shell, also where ``hi`` is below the first edge.

        Parameters
        ----------
        lo : float
            Positive lower end, usually a resolution floor.
        hi : float
            Upper end, usually the largest eigenvalue; 0 is allowed.
        q, lambda_0 : float
            As in the constructor.

        Raises
        ------
        ValueError
            If ``lo`` is not positive, or more than 100,000 shells would be needed.

        Examples
        --------
        >>> ShellPartition.covering(0.3, 4.0).edges.tolist()
        [0.5, 1.0, 2.0, 4.0, 8.0]
        """
        q = check_real("q", q, low=1.0, low_open=True)
        lambda_0 = check_real("lambda_0", lambda_0, low=0.0, low_open=True)
        lo = check_real("lo", lo, low=0.0, low_open=True)
        hi = check_real("hi", hi, low=0.0, high=_LARGEST_RATE)
        first = _first_edge_at_or_above(lo, q, lambda_0)
        last = _first_edge_at_or_above(math.nextafter(hi, math.inf), q, lambda_0) if hi else first
        n_shells = max(last - first, 1)
        if n_shells > MAX_SHELLS:
            raise ValueError(
                f"q={q!r} needs {n_shells} shells between lo={lo!r} and hi={hi!r}, expected at "
                f"most {MAX_SHELLS}; take a larger q or raise lo."
            )
        return cls(q=q, lambda_0=lambda_0, first=first, n_shells=n_shells)


def shell_name(lo: float, hi: float) -> str:
    """Return the column name of the shell [lo, hi), with floats that read back exactly.

    Examples
    --------
    >>> shell_name(0.1, 0.2)
    'shell[0.1,0.2)'
    """
    return f"shell[{float(lo)!r},{float(hi)!r})"


def parse_shell_name(name: str) -> tuple[float, float]:
    """Return the edges (lo, hi) of a shell from its column name.

    Raises
    ------
    ValueError
        If ``name`` is not of the form ``shell[lo,hi)`` with 0 < lo < hi finite.

    Examples
    --------
    >>> parse_shell_name("shell[0.1,0.2)")
    (0.1, 0.2)
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    try:
        lo, hi = (float(text) for text in match.groups()) if match else (math.nan, math.nan)
    except ValueError:
        lo = hi = math.nan
    if not (0.0 < lo < hi < math.inf):
        raise ValueError(
            f"column {name!r} is not a shell: expected a name 'shell[lo,hi)' with 0 < lo < hi; "
            "pass a frame of shell energies, or drop the foreign column."
        )
    return lo, hi


def edges_from_names(names: Iterable[str]) -> NDArray[np.float64]:
    """Return the edges of the shells that columns are named after.

    Parameters
    ----------
    names : iterable of str
        Column names in increasing order. A leading ``null`` is skipped.

    Returns
    -------
    ndarray of float64, shape (n_shells + 1,)

    Raises
    ------
    ValueError
        If there is no shell, a column is foreign, or the shells are not contiguous and increasing.

    Examples
    --------
    >>> edges_from_names(["null", "shell[0.5,1.0)", "shell[1.0,2.0)"]).tolist()
    [0.5, 1.0, 2.0]
    """
    columns = list(names)
    shells = columns[1:] if columns[:1] == [NULL] else columns
    if not shells:
        raise ValueError("names holds no shell column; expected at least one 'shell[lo,hi)'.")
    pairs = [parse_shell_name(name) for name in shells]
    for (_, end), (start, _), name in zip(pairs[:-1], pairs[1:], shells[1:], strict=True):
        if end != start:
            raise ValueError(
                f"shells must be contiguous and increasing, but {name!r} begins at {start!r} "
                f"where the shell before it ends at {end!r}; restore the original columns."
            )
    return np.array([pairs[0][0], *(hi for _, hi in pairs)])


def _edge(q: float, lambda_0: float, alpha: int) -> float:
    # Scalar pow, since vectorised pow may round differently from one lane to another.
    try:
        return _in_few_digits(float(lambda_0 * q ** float(alpha)), EDGE_SLACK * math.log(q))
    except OverflowError:
        return math.inf


def _in_few_digits(value: float, slack: float) -> float:
    """Return the number of fewest significant digits within ``slack`` of a value, in logarithms."""
    if not 0.0 < value < math.inf:
        return value
    for digits in range(1, _MOST_DIGITS):
        short = float(f"{value:.{digits - 1}e}")
        if abs(math.log(short / value)) <= slack:
            return short
    return value


def _first_edge_at_or_above(lam: float, q: float, lambda_0: float) -> int:
    alpha = math.ceil((math.log(lam) - math.log(lambda_0)) / math.log(q))
    # The logarithms are off by at most a few shells (more only for q within 1e-12 of 1).
    while _edge(q, lambda_0, alpha) < lam:
        alpha += 1
    while _edge(q, lambda_0, alpha - 1) >= lam:
        alpha -= 1
    return alpha


def _rates(lam: ArrayLike) -> NDArray[np.float64]:
    rates = np.asarray(lam, dtype=np.float64)
    if np.isnan(rates).any():
        raise ValueError("lam holds NaN, expected rates; remove or repair these eigenvalues.")
    return rates
