"""The permutation null: what it keeps, and that its p-values are calibrated."""

import numpy as np
import pytest
from scipy import stats

from spectralshell.shells import (
    ShellPartition,
    permutation_p_value,
    permuted_couplings,
    shell_coupling,
    toeplitz_residual,
)
from spectralshell.shells.coupling import CouplingRule, PairEntries, assign_modes

SUM_RTOL = 1e-12
N_DRAWS, N_NULL = 500, 20

SHELLS = ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=6)
RATES = 2.0 ** (np.arange(48) / 8.0)
SCALE = np.sqrt(RATES[:, None] * RATES)
OFFSETS = np.abs(np.arange(48)[:, None] // 8 - np.arange(48) // 8)


def gaussian(rng, k=48):
    return rng.standard_normal((k, k))


def heavy_tailed(rng, k=48):
    return rng.standard_t(4, (k, k))


def symmetrised(upper):
    """Independent entries on and above the diagonal."""
    return np.triu(upper) + np.triu(upper, 1).T


def shuffled(matrix, rng):
    """A symmetric matrix with the same entries elsewhere, diagonal and rest apart."""
    above = np.triu_indices(len(matrix), 1)
    out = np.diag(rng.permutation(np.diagonal(matrix)))
    out[above] = rng.permutation(matrix[above])
    return np.triu(out) + np.triu(out, 1).T


def p_value(W, rng, rates=RATES, shells=SHELLS):
    V = np.sqrt(rates[:, None] * rates) * W
    observed = toeplitz_residual(shell_coupling(V, rates, shells))
    null = permuted_couplings(V, rates, shells, n_null=N_NULL, generator=rng)
    return permutation_p_value(observed, toeplitz_residual(null))


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: symmetrised(gaussian(rng)),
        lambda rng: symmetrised(heavy_tailed(rng)),
        lambda rng: shuffled(np.exp(-OFFSETS) * symmetrised(gaussian(rng)), rng),
    ],
    ids=["Gaussian noise", "heavy-tailed noise", "permuted structure"],
)
def test_p_values_are_uniform_without_structure(draw):
    rng = np.random.default_rng(0)
    p = np.array([p_value(draw(rng), rng) for _ in range(N_DRAWS)])
    # One in 21 draws, within two standard errors of 500.
    assert np.mean(p <= 1.0 / (1 + N_NULL)) == pytest.approx(0.048, abs=0.02)
    counts = np.bincount((p * (1 + N_NULL)).round().astype(int), minlength=22)[1:]
    assert stats.chisquare(counts).pvalue > 0.01


def test_structure_by_offset_is_found_and_structure_by_scale_is_not():
    rng = np.random.default_rng(1)
    shells = ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=10)
    rates = 2.0 ** (np.arange(160) / 16.0)
    scale = np.sqrt(rates[:, None] * rates)
    place = np.arange(160) // 16
    by_offset = np.exp(-np.abs(place[:, None] - place)) * symmetrised(gaussian(rng, 160))
    by_scale = scale * symmetrised(gaussian(rng, 160))
    assert p_value(by_offset, rng, rates, shells) == 1.0 / (1 + N_NULL)
    assert p_value(by_scale, rng, rates, shells) == 1.0


@pytest.mark.parametrize("diagonal", ["block", "modes", "pairs"])
@pytest.mark.parametrize("reducer", ["mean-square", "rms", "mean-abs"])
def test_a_draw_is_the_coupling_of_a_permuted_matrix(reducer, diagonal):
    """Where all entries are equal, nothing can change."""
    W = np.full((48, 48), 2.0) + 3.0 * np.eye(48)
    options = {"reducer": reducer, "diagonal": diagonal}
    null = permuted_couplings(
        SCALE * W, RATES, SHELLS, n_null=2, generator=np.random.default_rng(0), **options
    )
    observed = shell_coupling(SCALE * W, RATES, SHELLS, **options)
    np.testing.assert_allclose(null, np.stack([observed] * 2), rtol=SUM_RTOL)


def test_draws_keep_the_sums_of_squares():
    rng = np.random.default_rng(2)
    W = symmetrised(heavy_tailed(rng))
    pairs = np.full((6, 6), 64.0)
    null = permuted_couplings(SCALE * W, RATES, SHELLS, n_null=5, generator=rng)
    np.testing.assert_allclose((null * pairs).sum(axis=(1, 2)), (W**2).sum(), rtol=SUM_RTOL)
    assert np.ptp(null[:, 0, 0]) > 0
    np.testing.assert_array_equal(null, null.swapaxes(1, 2))


def test_signed_means_are_permuted_with_the_diagonal():
    rng = np.random.default_rng(3)
    W = symmetrised(gaussian(rng))
    rule = CouplingRule(diagonal="modes")
    entries = PairEntries.of(SCALE * W, RATES, assign_modes(RATES, SHELLS, 1), rule)
    null = entries.permuted(4, rng)
    np.testing.assert_allclose(null.signed_mean.mean(axis=1), np.trace(W) / 48, rtol=1e-10)
    assert (null.signed_mean**2 <= np.diagonal(null.coupling, axis1=1, axis2=2)).all()


def test_a_window_permutes_its_own_entries_alone():
    rng = np.random.default_rng(4)
    W = symmetrised(gaussian(rng))
    W[:8] *= 1e6  # the first shell, outside the window
    W[:, :8] *= 1e6
    modes = assign_modes(RATES, SHELLS, 1)
    entries = PairEntries.of(SCALE * W, RATES, modes, CouplingRule()).within(slice(2, 5))
    null = entries.permuted(3, rng).coupling
    known = np.isin(np.arange(6), [2, 3, 4])
    np.testing.assert_array_equal(
        ~np.isnan(null), np.broadcast_to(known[:, None] & known, (3, 6, 6))
    )
    inner = np.ix_(np.arange(16, 40), np.arange(16, 40))
    np.testing.assert_allclose(
        np.nansum(null * 64.0, axis=(1, 2)), (W[inner] ** 2).sum(), rtol=SUM_RTOL
    )


def test_sparse_shells_take_no_part():
    rates = np.concatenate([RATES[:40], [60.0]])
    V = np.ones((41, 41))
    V[40] = V[:, 40] = 1e9
    null = permuted_couplings(V, rates, SHELLS, generator=np.random.default_rng(0))
    assert np.isnan(null[:, 5]).all()
    assert np.nanmax(null) <= 1.0


def test_same_generator_same_draws():
    W = symmetrised(gaussian(np.random.default_rng(5)))
    first, second = (
        permuted_couplings(SCALE * W, RATES, SHELLS, generator=np.random.default_rng(7))
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("observed", "null", "expected"),
    [
        (0.5, [], 1.0),
        (0.5, [0.5 * (1 - 1e-12), 0.6], 2 / 3),
        (0.0, [0.0] * 4, 1.0),
        (0.5, [np.nan, 0.6], 2 / 3),
        (np.nan, [0.1], np.nan),
    ],
)
def test_p_value_counts_ties(observed, null, expected):
    assert permutation_p_value(observed, null) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"generator": 0}, TypeError, "generator must be a numpy.random.Generator"),
        ({"n_null": -1}, ValueError, "n_null"),
        ({"V": np.zeros((2, 48, 48))}, ValueError, "V must be one matrix"),
    ],
)
def test_wrong_input_is_named(changes, error, message):
    arguments = {
        "V": np.eye(48),
        "eigenvalues": RATES,
        "partition": SHELLS,
        "generator": np.random.default_rng(0),
    } | changes
    with pytest.raises(error, match=message):
        permuted_couplings(**arguments)
