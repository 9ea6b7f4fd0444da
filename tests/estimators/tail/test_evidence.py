"""The test of no cutoff, at its level with correlated batches, and the ranks of the models."""

import dataclasses

import numpy as np
import pytest

from spectralshell.estimators.tail.data import (
    build_problem,
    collect,
    moderated_weights,
)
from spectralshell.estimators.tail.evidence import compare, no_cutoff_p_value
from spectralshell.estimators.tail.models import COMPARED
from spectralshell.estimators.tail.profile import profile_fit
from spectralshell.estimators.tail.reading import open_table, read_labels, read_layout
from tests.estimators.tail.energies import MIDS, WINDOW, batched_energies, frame


def p_value(data):
    """The test with quadratic cutoffs, which must not be convex."""
    means = data.energies.mean(axis=1)
    weights = moderated_weights(data, means, means > 0)
    y, root = np.log(means), np.sqrt(weights)
    blocks = np.eye(len(means))
    null = np.concatenate([np.kron(blocks, np.ones(MIDS.size)), np.tile(MIDS, len(means))[None]])
    full = np.concatenate([null, np.kron(blocks, MIDS**2)])
    squares = []
    for design in (null, full):
        scaled = (design * root.ravel()).T
        rest = (y * root).ravel()
        squares.append(((rest - scaled @ np.linalg.lstsq(scaled, rest, rcond=None)[0]) ** 2).sum())
    return no_cutoff_p_value(data, means, weights, MIDS, squares[0] - squares[1], squares[1])


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_level_of_the_test_holds_with_correlated_noise(shared):
    p_values = [p_value(batched_energies(seed, shared=shared)) for seed in range(300)]
    rejected = np.mean(np.array(p_values) < 0.05)
    assert rejected <= 0.05 + 0.026  # two standard errors of 300 draws above nominal


def test_test_has_power():
    assert max(p_value(batched_energies(seed, bend=0.1)) for seed in range(20)) < 0.01


def test_identical_batches_are_tested_without_dividing_by_zero():
    assert p_value(batched_energies(0, sd=0.0)) == 1.0
    assert p_value(batched_energies(0, sd=0.0, bend=0.1)) == 0.0


def test_model_without_likelihood_has_no_rank():
    X = frame("pure", 1.5)
    table = open_table(X)
    layout = read_layout(table, X.shape[1], None)
    data = collect(X.to_numpy(), read_labels(table, len(X)), layout)
    problem = build_problem(data, layout, WINDOW, 4)
    fits = {
        model: profile_fit(model, problem.log_density, problem.weights, problem.grid)
        for model in COMPARED
    }
    lost = fits[COMPARED[2]]
    fits[COMPARED[2]] = dataclasses.replace(lost, sse=np.full_like(lost.sse, np.nan))
    table = compare(problem, fits, shared=False, confidence=0.95)
    assert table["rank"][2] == 0
    assert table["rank"].drop(2).min() == 1
