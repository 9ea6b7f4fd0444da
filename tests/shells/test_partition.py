"""Shells: exact edges, names that read back, one shell for every rate."""

import math
import pickle
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spectralshell.shells import ShellPartition, edges_from_names, parse_shell_name, shell_name

# Of λ0 q^α in float64, and of its logarithm, in parts of the slack 1e-4·ln q.
ROUNDING = Decimal("1e-6")

ratios = st.floats(1.01, 50.0)
origins = st.floats(1e-6, 1e6)
partitions = st.builds(
    ShellPartition,
    q=ratios,
    lambda_0=origins,
    first=st.integers(-40, 20),
    n_shells=st.integers(1, 30),
)


@given(partitions)
@settings(deadline=None, max_examples=60)
def test_index_is_exact_at_edges(shells):
    inner = np.arange(shells.n_shells)
    assert shells.index(shells.edges[:-1]).tolist() == inner.tolist()
    assert shells.index(np.nextafter(shells.edges[1:], 0.0)).tolist() == inner.tolist()
    assert shells.index(np.nextafter(shells.edges[0], 0.0)) == -1
    assert not shells.overflow(np.nextafter(shells.edges[-1], 0.0))
    assert shells.overflow(shells.edges[-1])
    assert shells.index(shells.edges[-1]) == shells.n_shells - 1


@given(partitions)
@settings(deadline=None, max_examples=60)
def test_names_read_back_exactly(shells):
    assert edges_from_names(["null", *shells.names]).tolist() == shells.edges.tolist()
    assert edges_from_names(shells.names).tolist() == shells.edges.tolist()


@given(partitions)
@settings(deadline=None, max_examples=60)
def test_edges_are_the_fewest_digits_near_the_power(shells):
    slack = Decimal("1e-4") * Decimal(shells.q).ln()
    for position, edge in enumerate(shells.edges.tolist()):
        exact = Decimal(shells.lambda_0) * Decimal(shells.q) ** (shells.first + position)
        digits = len(Decimal(repr(edge)).normalize().as_tuple().digits)
        assert abs((Decimal(edge) / exact).ln()) <= slack * (1 + ROUNDING)
        if digits > 1:
            shorter = Decimal(f"{exact:.{digits - 2}e}")
            assert abs((shorter / exact).ln()) >= slack * (1 - ROUNDING)


@pytest.mark.parametrize(("q", "longest"), [(1.2, 30), (1.5, 29), (2.0, 29), (10.0, 27)])
def test_names_are_short(q, longest):
    shells = ShellPartition.covering(1e-8, 1e5, q=q)
    assert max(map(len, shells.names)) <= longest


@given(st.floats(5e-324, 1e300), st.floats(1.0001, 1e6))
@settings(deadline=None, max_examples=60)
def test_any_float_pair_survives_its_name(lo, factor):
    hi = max(lo * factor, math.nextafter(lo, math.inf))
    assert parse_shell_name(shell_name(np.float64(lo), np.float64(hi))) == (lo, hi)


@given(st.floats(1e-12, 1e3), st.floats(0.0, 1e4), ratios, origins)
@example(1.0, 8.0, 2.0, 1.0)  # both ends on an edge
@example(1.0, 0.5, 2.0, 1.0)
@settings(deadline=None, max_examples=100)
def test_covering_is_the_tightest_partition(lo, hi, q, lambda_0):
    shells = ShellPartition.covering(lo, hi, q=q, lambda_0=lambda_0)
    wider = ShellPartition(q=q, lambda_0=lambda_0, first=shells.first - 1, n_shells=1)
    assert wider.edges[0] < lo <= shells.edges[0]
    assert shells.edges[-1] > hi
    assert shells.n_shells == 1 or shells.edges[-2] <= hi


def test_an_edge_is_the_same_float_in_every_partition():
    whole = ShellPartition(q=1.3, lambda_0=0.7, first=-20, n_shells=40)
    part = ShellPartition(q=1.3, lambda_0=0.7, first=-3, n_shells=7)
    assert part.edges.tolist() == whole.edges[17:25].tolist()
    assert 0.7 in whole.edges


def test_widths_midpoints_and_pickle():
    shells = ShellPartition(q=4.0, lambda_0=1.0, first=0, n_shells=2)
    assert shells.widths.tolist() == [3.0, 12.0]
    assert shells.midpoints.tolist() == [2.0, 8.0]
    assert pickle.loads(pickle.dumps(shells)) == shells
    with pytest.raises(ValueError, match="read-only"):
        shells.edges[0] = 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"q": 1.0}, ValueError, "q must"),
        ({"q": math.nan}, ValueError, "q must"),
        ({"q": "2"}, TypeError, "q must"),
        ({"lambda_0": 0.0}, ValueError, "lambda_0 must"),
        ({"first": 0.5}, TypeError, "first must"),
        ({"n_shells": 0}, ValueError, "n_shells must"),
        ({"q": 1e200, "n_shells": 3}, ValueError, "not finite"),
        ({"first": -3000}, ValueError, "not finite, positive"),
        ({"q": 1.01, "first": -74_500}, ValueError, "increasing"),
    ],
)
def test_impossible_partitions_are_refused(arguments, error, match):
    given_ = {"q": 2.0, "lambda_0": 1.0, "first": 0, "n_shells": 2} | arguments
    with pytest.raises(error, match=match):
        ShellPartition(**given_)


@pytest.mark.parametrize("lo", [0.0, -1.0, math.nan])
def test_covering_needs_a_positive_floor(lo):
    with pytest.raises(ValueError, match="lo must"):
        ShellPartition.covering(lo, 1.0)


def test_too_many_shells_and_nan_rates_are_refused():
    with pytest.raises(ValueError, match="larger q"):
        ShellPartition.covering(1e-9, 1.0, q=1.0 + 1e-6)
    with pytest.raises(ValueError, match="NaN"):
        ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=1).index([1.0, math.nan])


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["null"],
        ["null", "loss"],
        ["shell[1.0,2.0)", "null"],
        ["shell[1.0,2.0)", "shell[4.0,8.0)"],
        ["shell[2.0,4.0)", "shell[1.0,2.0)"],
        ["shell[2.0,1.0)"],
        ["shell[0.0,1.0)"],
        ["shell[a,b)"],
        ["shell[1.0,inf)"],
        [3],
    ],
)
def test_foreign_columns_are_refused(names):
    with pytest.raises(ValueError, match="shell"):
        edges_from_names(names)
