"""Sums, decay, bands and nulls of block arrays against what was planted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralshell.estimators.jacobian_block_frames import (
    distances,
    explained_share,
    explained_shares,
    fit_decay,
    normalized_coherence,
    null_frame,
    observed_statistics,
    profile_score,
    within_band,
)

# Rounding of a few hundred float64 operations.
ROUNDING = 1e-12


def coherence_of(blocks):
    n = len(blocks)
    matrix = [[np.linalg.norm(blocks[i].T @ blocks[j], 2) for j in range(n)] for i in range(n)]
    return np.array(matrix), np.array([np.linalg.norm(block, 2) for block in blocks])


def random_rates(n_blocks, size, seed):
    """Return D_lm of shape (L, L, size) and their inner products."""
    rates = np.random.default_rng(seed).standard_normal((n_blocks, n_blocks, size))
    return rates, np.einsum("lms,lks->lmk", rates, rates)


@settings(deadline=None, max_examples=25)
@given(
    n_blocks=st.integers(1, 5),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_coherence_bounds_the_jacobian(n_blocks, rows, columns, seed):
    rng = np.random.default_rng(seed)
    blocks = [rng.standard_normal((rows, columns)) for _ in range(n_blocks)]
    coherence, norms = coherence_of(blocks)
    normalized = normalized_coherence(coherence, norms)
    assert (normalized >= 0).all()
    assert (normalized <= 1).all()
    np.testing.assert_allclose(np.diag(normalized), 1.0, rtol=ROUNDING)
    squared = np.linalg.norm(np.hstack(blocks), 2) ** 2
    largest_sum = coherence.sum(axis=1).max()
    assert squared <= largest_sum * (1 + ROUNDING)
    assert largest_sum <= n_blocks * norms.max() ** 2 * (1 + ROUNDING)


@pytest.mark.parametrize(
    ("shape", "rate", "power"),
    [(lambda d: np.exp(-0.3 * d), 0.3, None), (lambda d: np.maximum(d, 1) ** -1.7, None, 1.7)],
    ids=["exponential", "power law"],
)
def test_decay_is_found(shape, rate, power):
    found = fit_decay(shape(distances(7).astype(float)))
    if rate is not None:
        assert found.rate == pytest.approx(rate, rel=ROUNDING)
        assert found.rate_r2 > found.power_r2
    else:
        assert found.power == pytest.approx(power, rel=ROUNDING)
        assert found.power_r2 > found.rate_r2


@pytest.mark.parametrize("n", [1, 2])
def test_no_decay_without_three_blocks(n):
    assert np.isnan(fit_decay(np.ones((n, n))).rate)


def test_pairs_without_coherence_are_left_out_of_the_decay():
    matrix = np.exp(-0.3 * distances(6))
    matrix[0, 3] = matrix[3, 0] = 0.0
    assert fit_decay(matrix).rate == pytest.approx(0.3, rel=ROUNDING)


@pytest.mark.parametrize("band", range(5))
def test_explained_share_is_that_of_the_sums(band):
    rates, gram = random_rates(5, 7, seed=band)
    far = distances(5) > band
    outside = np.linalg.norm((rates * far[..., None]).sum(axis=1), axis=1) ** 2
    whole = np.linalg.norm(rates.sum(axis=1), axis=1) ** 2
    np.testing.assert_allclose(explained_shares(gram, band), 1 - outside / whole, rtol=ROUNDING)
    expected = 1 - outside.sum() / whole.sum()
    assert explained_share(gram, band) == pytest.approx(expected, rel=ROUNDING)


def test_cancelling_parts_explain_less_than_nothing():
    gram = np.array([[[1.0, -0.9], [-0.9, 1.0]]] * 2)
    assert explained_shares(gram, 0).tolist() == pytest.approx([-4.0, -4.0])


def test_no_change_has_no_share():
    assert np.isnan(explained_shares(np.zeros((2, 2, 2)), 0)).all()
    assert np.isnan(explained_share(np.zeros((2, 2, 2)), 0))
    assert np.isnan(within_band(np.zeros((2, 2)), 0))


def test_statistics_of_arrays_without_depth():
    assert within_band(np.ones((3, 3)), 1) == pytest.approx(7 / 9, rel=ROUNDING)
    found = observed_statistics(np.eye(2), np.ones((2, 2, 2)), 0)
    assert found == {
        "toeplitz_residual": 0.0,
        "coherence_within_band": 1.0,
        "change_within_band": pytest.approx(0.75, rel=ROUNDING),
    }
    frame = null_frame(np.eye(3), np.ones((3, 3, 3)), band=2, n_null=4, seed=0)
    assert (frame["p_value"] == 1.0).all()


def test_order_of_the_blocks_moves_the_band():
    _, gram = random_rates(4, 6, seed=1)
    order = np.array([2, 0, 3, 1])
    back = np.argsort(order)
    moved = gram[np.ix_(back, back, back)]
    expected = explained_share(moved, 1)
    assert explained_share(gram, 1, order) == pytest.approx(expected, rel=ROUNDING)


def test_null_tells_a_chain_from_a_crowd():
    chain = np.exp(-0.8 * distances(8))
    gram = np.zeros((8, 8, 8))
    rows = np.arange(8)
    for m in rows:
        gram[rows, m, m] = chain[:, m]
    frame = null_frame(chain, gram, band=1, n_null=99, seed=0).set_index("statistic")
    assert (frame["p_value"] <= 0.02).all()
    assert frame.loc["toeplitz_residual", "observed"] == pytest.approx(0.0, abs=ROUNDING)
    crowd = null_frame(np.ones((8, 8)), np.ones((8, 8, 8)), band=1, n_null=99, seed=0)
    assert (crowd["p_value"] > 0.2).all()


def test_p_values_of_exchangeable_blocks_are_uniform():
    # A p-value of 0.05 with 19 random orders: 1 in 20, here within four standard errors.
    rng = np.random.default_rng(0)
    small = np.zeros(3)
    draws = 150
    for draw in range(draws):
        noise = rng.random((6, 6))
        _, gram = random_rates(6, 5, seed=draw)
        frame = null_frame((noise + noise.T) / 2, gram, band=1, n_null=19, seed=draw)
        small += frame["p_value"].to_numpy() <= 0.05
    spread = 4 * np.sqrt(0.05 * 0.95 / draws)
    np.testing.assert_allclose(small / draws, 0.05, atol=spread)


def test_no_null_asked_for():
    frame = null_frame(np.eye(3), np.ones((3, 3, 3)), band=0, n_null=0, seed=0)
    assert frame["p_value"].isna().all()
    assert frame["observed"].notna().all()


@pytest.mark.parametrize(
    ("n_blocks", "n_null", "status"),
    [
        (3, 99, "p of about 0.33 or more: few orders of 3 blocks"),
        (4, 999, "p of about 0.083 or more: few orders of 4 blocks"),
        (5, 99, "ok"),
        (5, 9, "p of 0.1 or more: few random orders"),
    ],
)
def test_p_values_that_cannot_be_small_say_so(n_blocks, n_null, status):
    """An order and its mirror image are alike, so the best of L! orders is never alone."""
    chain = np.exp(-0.8 * distances(n_blocks))
    gram = np.ones((n_blocks,) * 3)
    frame = null_frame(chain, gram, band=1, n_null=n_null, seed=0).set_index("statistic")
    assert (frame["status"] == status).all()
    if status != "ok":
        assert (frame["p_value"] > 0.05).all()


def test_score_is_the_gain_of_distance_over_a_constant():
    apart = distances(5)
    profile, counts = np.exp(-0.4 * np.arange(5)), np.arange(5.0, 0.0, -1)
    matrix, ones = profile[apart], np.ones(5)
    weights = np.ones(1)
    assert profile_score([(matrix, ones)], weights, profile, counts) == 1.0
    constant = (profile[1:] @ counts[1:]) / counts[1:].sum()
    flat = np.where(apart > 0, constant, 1.0)
    assert profile_score([(flat, ones)], weights, np.ones(5) * constant, counts) == 0.0
    assert profile_score([(profile[::-1][apart], ones)], weights, profile, counts) < 0.0


def test_score_without_weight_is_unknown():
    snapshots, profile = [(np.eye(2), np.ones(2))], np.ones(2)
    assert np.isnan(profile_score(snapshots, np.zeros(1), profile, np.ones(2)))


def test_score_weighs_snapshots():
    profile, counts = np.exp(-0.4 * np.arange(4)), np.arange(4.0, 0.0, -1)
    rng = np.random.default_rng(0)
    held_out = [(m + m.T, np.sqrt(np.full(4, 2.0))) for m in rng.random((2, 4, 4))]
    one = profile_score(held_out[1:], np.ones(1), profile, counts)
    both = profile_score(held_out, np.array([0.0, 3.0]), profile, counts)
    assert both == pytest.approx(one, rel=ROUNDING)
