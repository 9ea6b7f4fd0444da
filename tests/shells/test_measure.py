"""Spectral measures: closure, telescoping, bounds, degenerate spectra."""

import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralshell.shells import ShellPartition, SpectralMeasure, mean_measure
from spectralshell.statuses import join_statuses
from spectralshell.warning_categories import DynamicsWarning

CLOSURE = 1e-12  # the contract: rows sum to half the squared norm
SHELLS = ShellPartition(q=2.0, lambda_0=1.0, first=-6, n_shells=10)


@dataclass(frozen=True)
class WobblyBounds:
    """Bounds that hold but are neither monotone nor within [0, total], as rounding leaves them."""

    nodes: np.ndarray
    weights: np.ndarray
    seed: int
    width: float

    def at(self, edges):
        rng = np.random.default_rng(self.seed)
        below = np.array([self.weights[self.nodes < edge].sum() for edge in edges])
        slack = self.width * self.weights.sum()
        return below - slack * rng.random(below.size), below + slack * rng.random(below.size)

    def unwidened(self, edges):
        below = np.array([self.weights[self.nodes < edge].sum() for edge in edges])
        wobble = self.width * self.weights.sum() * np.sin(1e4 * np.asarray(edges) + self.seed)
        return below + np.minimum(wobble, 0.0), below + np.maximum(wobble, 0.0)


def measure_of(nodes, weights, **changes):
    nodes, weights = np.asarray(nodes, float), np.asarray(weights, float)
    arguments = {
        "total": float(weights.sum()),
        "lambda_max": max(float(nodes.max(initial=0.0)), 0.0),
        "floor": 0.01,
        "noise": 1e-9,
    }
    return SpectralMeasure(nodes, weights, **(arguments | changes))


spectra = st.lists(
    st.tuples(
        st.floats(-1e-8, 100.0) | st.sampled_from(SHELLS.edges.tolist()),
        # Half of a denormal energy is not exact.
        st.just(0.0) | st.floats(1e-100, 10.0),
    ),
    max_size=20,
)
widths = st.sampled_from([0.0, 1e-15, 1e-3, 0.5])


@given(spectra, st.floats(0.0, 3.0))
@settings(deadline=None, max_examples=80)
def test_exact_measures_close_and_count(spectrum, missing):
    nodes, weights = np.array(spectrum).reshape(-1, 2).T
    measure = measure_of(nodes, weights, total=float(weights.sum()) + missing)
    energies = measure.energies(SHELLS.edges)
    index = np.where(nodes < measure.noise, -1, SHELLS.index(nodes))
    shells = [weights[index == k].sum() for k in range(SHELLS.n_shells)]
    assert energies.sum() == pytest.approx(measure.total, rel=CLOSURE)
    np.testing.assert_allclose(energies[1:], shells, rtol=CLOSURE)
    assert measure.counts(SHELLS.edges)[1:].tolist() == [
        np.sum(index == k) for k in range(SHELLS.n_shells)
    ]
    assert measure.dissipation(SHELLS.edges).sum() == pytest.approx(
        2.0 * nodes @ weights, rel=CLOSURE, abs=1e-300
    )


@given(spectra, st.integers(0, 99), widths)
@settings(deadline=None, max_examples=80)
def test_lanczos_measures_telescope_within_their_bounds(spectrum, seed, width):
    nodes, weights = np.array(spectrum).reshape(-1, 2).T
    bounds = WobblyBounds(nodes, weights, seed, width)
    measure = measure_of(nodes, weights, bounds=bounds, solver="lanczos")
    lower, mid, upper = measure.cumulative(SHELLS.edges)
    truth = [weights[nodes < edge].sum() for edge in SHELLS.edges]
    rounding = 1e-14 * (1.0 + measure.total)  # of the sums that make the truth
    for values in (lower, mid, upper):
        assert (np.diff(values) >= 0.0).all()
        assert values[0] >= 0.0
        assert values[-1] <= measure.total
    assert (lower <= np.add(truth, rounding)).all()
    assert (upper >= np.subtract(truth, rounding)).all()
    energies = measure.energies(SHELLS.edges)
    assert (energies >= 0.0).all()
    assert energies.sum() == pytest.approx(measure.total, rel=CLOSURE)
    np.testing.assert_allclose(np.cumsum(energies)[:-1], mid[:-1], rtol=1e-13, atol=rounding)


def test_energy_below_the_noise_is_null_for_exact_measures():
    measure = measure_of([-1e-3, 1e-4, 0.5], [1.0, 2.0, 4.0], noise=1e-2)
    shells = ShellPartition(q=2.0, lambda_0=1.0, first=-20, n_shells=20)
    energies = measure.energies(shells.edges)
    assert energies[0] == 3.0
    assert energies[-1] == 4.0
    assert measure.n_negative == 1
    lower, mid, upper = measure.cumulative([5e-5, 5e-3, 0.1])
    assert lower.tolist() == [1.0, 3.0, 3.0]
    assert mid.tolist() == [3.0, 3.0, 3.0]
    assert upper.tolist() == [3.0, 3.0, 3.0]


def test_tiny_tail_energies_keep_their_digits():
    measure = measure_of([0.5, 8.0], [1.0, 1e-40])
    assert measure.energies(SHELLS.edges)[-1] == 1e-40


@pytest.mark.parametrize(
    "measure",
    [
        measure_of([], []),
        measure_of([], [], total=0.5),
        measure_of([0.0, 0.0], [0.0, 0.0]),
        measure_of([3.0], [0.5]),
        measure_of([], [], solver="lanczos", bounds=WobblyBounds(np.empty(0), np.empty(0), 0, 1.0)),
    ],
    ids=["nothing", "only missing energy", "zero error", "rank one", "zero Lanczos"],
)
def test_degenerate_measures_give_results(measure):
    edges = SHELLS.edges
    assert measure.energies(edges).sum() == pytest.approx(measure.total, abs=1e-15)
    for values in (*measure.cumulative(edges), measure.density(edges), measure.dissipation(edges)):
        assert np.isfinite(values).all()
    assert measure.lazy_decay(0.0) == measure.total


def test_lazy_decay_is_the_sum_of_exponentials():
    measure = measure_of([0.5, 2.0], [1.0, 3.0], total=5.0)
    times = np.array([[0.0, 0.3], [1.0, 2.0]])
    expected = 1.0 + np.exp(-times) + 3.0 * np.exp(-4.0 * times)
    np.testing.assert_allclose(measure.lazy_decay(times), expected, rtol=1e-14)
    assert isinstance(measure.lazy_decay(0.3), float)
    with pytest.raises(ValueError, match="tau must be finite"):
        measure.lazy_decay(math.nan)


def test_nodes_are_sorted_with_their_weights_and_norms():
    measure = measure_of([2.0, 1.0], [0.2, 0.1], residual_norms=[20.0, 10.0])
    assert measure.nodes.tolist() == [1.0, 2.0]
    assert measure.weights.tolist() == [0.1, 0.2]
    assert measure.residual_norms.tolist() == [10.0, 20.0]
    assert not measure.nodes.flags.writeable


def test_relabel_changes_labels_only():
    measure = measure_of([1.0], [1.0], tau=1.0, batch=2)
    other = measure.relabel(tau=3.0, name="run")
    assert (other.tau, other.batch, other.name) == (3.0, 2, "run")
    assert other.nodes.tolist() == measure.nodes.tolist()
    assert measure.relabel(batch="b").batch == "b"


@pytest.mark.parametrize("exact", [True, False])
def test_mean_measure_averages_energies_and_bounds(exact):
    rng = np.random.default_rng(0)
    parts = []
    for batch in range(3):
        nodes, weights = rng.uniform(0.05, 9.0, 12), rng.random(12)
        bounds = None if exact else WobblyBounds(nodes, weights, batch, 0.1)
        solver = "exact" if exact else "lanczos"
        parts.append(measure_of(nodes, weights, batch=batch, bounds=bounds, solver=solver))
    mean = mean_measure(parts)
    energies = np.mean([part.energies(SHELLS.edges) for part in parts], axis=0)
    np.testing.assert_allclose(mean.energies(SHELLS.edges), energies, rtol=1e-12)
    each = [part.cumulative(SHELLS.edges) for part in parts]
    for place, values in enumerate(mean.cumulative(SHELLS.edges)):
        expected = np.mean([triple[place] for triple in each], axis=0)
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-15)
    assert mean.lambda_max == max(part.lambda_max for part in parts)
    assert (mean.batch, mean.solver) == ("mean", parts[0].solver)
    restored = pickle.loads(pickle.dumps(mean))
    assert restored.energies(SHELLS.edges).tolist() == mean.energies(SHELLS.edges).tolist()


def test_mean_measure_keeps_what_each_part_counts_as_null():
    rough = measure_of([1e-3, 1.0], [0.25, 0.75], batch=0, noise=1e-2)
    fine = measure_of([1e-3, 1.0], [0.5, 0.5], batch=1, noise=1e-5)
    edges = [1e-4, 0.1, 10.0]
    assert rough.energies(edges).tolist() == [0.25, 0.0, 0.75]
    assert fine.energies(edges).tolist() == [0.0, 0.5, 0.5]
    assert mean_measure([rough, fine]).energies(edges).tolist() == [0.125, 0.25, 0.625]


def test_mean_measure_refuses_what_it_cannot_average():
    one = measure_of([1.0], [1.0], tau=1.0)
    with pytest.raises(ValueError, match="empty"):
        mean_measure([])
    with pytest.raises(ValueError, match="differ in tau"):
        mean_measure([one, one.relabel(tau=2.0)])
    with pytest.raises(ValueError, match="differ in name"):
        mean_measure([one, one.relabel(name="other")])


def test_statuses_are_joined_once():
    parts = [measure_of([1.0], [1.0], batch=b, status=s) for b, s in enumerate(["ok", "a", "a; b"])]
    assert mean_measure(parts).status == "a; b"
    assert join_statuses(["ok", "ok"]) == "ok"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"weights": [0.1]}, ValueError, "weights must have shape"),
        ({"nodes": [[1.0, 2.0]]}, ValueError, "nodes must have shape"),
        ({"nodes": [1.0, math.nan]}, ValueError, "nodes holds NaN"),
        ({"weights": [0.1, math.inf]}, ValueError, "weights holds NaN"),
        ({"weights": [0.3, -0.1]}, ValueError, "negative energy"),
        ({"total": 0.2}, ValueError, "more than total"),
        ({"total": math.nan}, ValueError, "total must"),
        ({"tau": math.inf}, ValueError, "tau must"),
        ({"floor": -1.0}, ValueError, "floor must"),
        ({"batch": 1.5}, TypeError, "batch must"),
        ({"batch": True}, TypeError, "batch must"),
        ({"name": 3}, TypeError, "name must"),
    ],
)
def test_wrong_input_is_named(changes, error, match):
    arguments = {"nodes": [1.0, 2.0], "weights": [0.1, 0.2], "total": 0.3} | changes
    arguments = {"lambda_max": 2.0, "floor": 0.1, "noise": 0.0} | arguments
    with pytest.raises(error, match=match):
        SpectralMeasure(**arguments)


@pytest.mark.parametrize(
    "edges", [[], [1.0], [0.0, 1.0], [2.0, 1.0], [[1.0, 2.0]], [1.0, math.nan]]
)
def test_wrong_edges_are_named(edges):
    with pytest.raises(ValueError, match="edges must"):
        measure_of([1.0], [1.0]).energies(edges)


def test_lazy_decay_warns_where_energies_do_not_decay_at_these_rates():
    measure = measure_of([1.0], [0.5], dynamics_exact=False)
    with pytest.warns(DynamicsWarning, match="needs ė = −M e"):
        measure.lazy_decay(1.0)
