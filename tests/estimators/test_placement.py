"""Energies of many measures together: each evaluated once, and none dependent on the others."""

import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV, GroupKFold

from spectralshell import ShellEnergyEstimator
from spectralshell.estimators.placement import energies_below, null_energies
from spectralshell.krylov import bounds as bounds_module
from spectralshell.warning_categories import ResolutionWarning

Q = [1.3, 1.7, 2.2, 3.0]
N_FOLDS = 4


@pytest.fixture(scope="module", params=["lanczos", "exact"])
def stored(request, measured_trajectory):
    """Measures of every snapshot as a pickle, so that each test begins without memory of edges."""
    estimator = ShellEnergyEstimator(solver=request.param, n_steps=25)
    return pickle.dumps(estimator.spectral_measures(measured_trajectory))


@pytest.fixture
def count_rules(monkeypatch):
    """Calls of the quadrature, and the (Jacobi matrix, edge) pairs in them."""
    counted = {"calls": 0, "pairs": []}
    split = bounds_module.split_masses

    def counting(families, points):
        counted["calls"] += 1
        rows = np.broadcast_to(points, (len(families), points.shape[-1]))
        counted["pairs"] += [(id(f), x) for f, row in zip(families, rows, strict=True) for x in row]
        return split(families, points)

    monkeypatch.setattr(bounds_module, "split_masses", counting)
    return counted


def test_search_over_q_evaluates_no_rule_twice(measured_trajectory, count_rules):
    estimator = ShellEnergyEstimator(solver="lanczos", n_steps=26)
    X = measured_trajectory
    estimator.spectral_measures(X)
    count_rules.update(calls=0, pairs=[])
    search = GridSearchCV(estimator, {"q": Q}, cv=GroupKFold(N_FOLDS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResolutionWarning)
        search.fit(X, groups=[s.batch for s in X])
    pairs = count_rules["pairs"]
    assert len(pairs) > len(X) * len(Q)
    assert len(set(pairs)) == len(pairs)
    # All measures at once: at worst a few calls a fit, of those that differ in what they know.
    assert count_rules["calls"] <= 2 * len(Q) * N_FOLDS
    assert count_rules["calls"] < len(pairs) / len(X)


def test_rows_do_not_depend_on_the_other_measures(stored):
    together, apart = pickle.loads(stored), pickle.loads(stored)
    edges = together[0].lambda_max * np.geomspace(1e-4, 1.0, 15)
    rows = energies_below(together, edges)
    null = null_energies(together)
    for row, measure in enumerate(apart):
        np.testing.assert_array_equal(measure.estimate(edges), rows[row])
        assert measure.null == null[row]


def test_threads_and_pickles_see_the_same_energies(stored, monkeypatch):
    monkeypatch.setattr(bounds_module, "MOST_KNOWN", 20)  # forgets while others look up
    shared, reference = pickle.loads(stored), pickle.loads(stored)
    grids = [shared[0].lambda_max * np.geomspace(1e-3, 1.0, 9 + k) for k in range(8)]
    expected = [np.array([m.estimate(g) for m in reference]) for g in grids]
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda grid: energies_below(shared, grid), grids * 3))
    for got, wanted in zip(rows, expected * 3, strict=True):
        np.testing.assert_array_equal(got, wanted)
    again = pickle.loads(pickle.dumps(shared))
    np.testing.assert_array_equal(energies_below(again, grids[0]), energies_below(shared, grids[0]))
