import numpy as np
import pytest
from scipy import special

from spectralshell.estimators.tail_data import BatchedEnergies
from spectralshell.estimators.tail_intervals import (
    _inverse_trigamma,
    jackknife_t,
    moderated_weights,
    no_cutoff_p_value,
)

X = np.linspace(0.0, 5.0, 9)


def batches(seed, n_batches=12, n_taus=3, sd=0.2, bend=0.0, shared=0.5):
    """Pure power laws, or bent ones, with noise that is smooth in ln λ and shared over tau."""
    rng = np.random.default_rng(seed)
    root = np.linalg.cholesky(np.exp(-0.5 * (X[:, None] - X) ** 2) + 1e-9 * np.eye(X.size))
    own = rng.normal(size=(n_taus, n_batches, X.size)) @ root.T
    common = rng.normal(size=(1, n_batches, X.size)) @ root.T
    noise = sd * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
    energies = np.exp(-1.5 * X - bend * (X - X.mean()) ** 2 + noise)
    present = np.ones((n_taus, n_batches), dtype=bool)
    return BatchedEnergies(np.arange(n_taus) + 1.0, energies, present, energies.sum((1, 2)))


def p_value(data):
    """The test with quadratic cutoffs, which must not be convex."""
    means = data.energies.mean(axis=1)
    weights = moderated_weights(data, means, means > 0)
    y, root = np.log(means), np.sqrt(weights)
    blocks = np.eye(len(means))
    null = np.concatenate([np.kron(blocks, np.ones(X.size)), np.tile(X, len(means))[None]])
    full = np.concatenate([null, np.kron(blocks, X**2)])
    squares = []
    for design in (null, full):
        scaled = (design * root.ravel()).T
        rest = (y * root).ravel()
        squares.append(((rest - scaled @ np.linalg.lstsq(scaled, rest, rcond=None)[0]) ** 2).sum())
    return no_cutoff_p_value(data, means, weights, X, squares[0] - squares[1], squares[1])


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_level_of_the_test_holds_with_correlated_noise(shared):
    rejected = np.mean([p_value(batches(seed, shared=shared)) < 0.05 for seed in range(300)])
    assert rejected <= 0.05 + 0.026  # two standard errors of 300 draws above nominal


def test_test_has_power():
    assert max(p_value(batches(seed, bend=0.1)) for seed in range(20)) < 0.01


def test_identical_batches_are_tested_without_dividing_by_zero():
    assert p_value(batches(0, sd=0.0)) == 1.0
    assert p_value(batches(0, sd=0.0, bend=0.1)) == 0.0


def test_equal_noise_gives_nearly_equal_weights():
    data = batches(0)
    weights = moderated_weights(data, data.energies.mean(axis=1), np.ones((3, X.size), bool))
    assert weights.max() / weights.min() < 2.0


def test_noisier_shells_get_less_weight():
    data = batches(0)
    rng = np.random.default_rng(1)
    data.energies[:, :, -1] *= rng.gamma(1.0, 1.0, size=(3, 12))
    weights = moderated_weights(data, data.energies.mean(axis=1), np.ones((3, X.size), bool))
    assert weights[:, -1].max() < 0.5 * weights[:, :-1].mean()


def test_weights_of_unusable_points_are_zero():
    data = batches(0)
    usable = np.ones((3, X.size), bool)
    usable[1, 4] = False
    weights = moderated_weights(data, data.energies.mean(axis=1), usable)
    assert weights[1, 4] == 0.0
    assert (weights[usable] > 0).all()


def test_jackknife_t_covers():
    def covers(seed):
        sample = np.random.default_rng(seed).normal(size=8)
        left_out = (sample.sum() - sample) / 7
        return abs(sample.mean()) <= jackknife_t(np.append(sample.mean(), left_out), 0.9)[0]

    # exact for a Gaussian mean: 0.9 ± three standard errors of 1,000 draws
    assert np.mean([covers(seed) for seed in range(1000)]) == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("value", [1e-3, 0.3, 5.0, 1e3])
def test_inverse_trigamma(value):
    assert special.polygamma(1, _inverse_trigamma(value)) == pytest.approx(value, rel=1e-6)


def test_replicates_are_means_without_one_batch():
    data = batches(0, n_batches=4)
    data.present[1, 2] = False
    data.energies[1, 2] = 0.0
    means, counts = data.replicates()
    for left_out in range(4):
        for tau in range(3):
            kept = data.present[tau] & (np.arange(4) != left_out)
            expected = data.energies[tau, kept].mean(axis=0)
            np.testing.assert_allclose(means[1 + left_out, tau], expected)
            assert counts[1 + left_out, tau] == kept.sum()
