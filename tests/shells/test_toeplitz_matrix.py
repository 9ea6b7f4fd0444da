"""The Toeplitz part, the residual and what else is read off a shell coupling."""

import numpy as np
import pytest
from scipy.linalg import toeplitz

from spectralshell.shells import (
    intra_inter_ratio,
    offset_kernel,
    toeplitz_part,
    toeplitz_residual,
)
from spectralshell.shells.toeplitz_matrix import most_central, sliding_windows

ROUNDING = 1e-14

KERNEL = np.array([4.0, 2.0, 1.0, 0.5, 0.25, 0.1])


def masked(K, *shells):
    K = K.copy()
    K[list(shells)] = np.nan
    K[:, list(shells)] = np.nan
    return K


def random_coupling(n=6, seed=0):
    noise = np.random.default_rng(seed).random((n, n))
    return noise + noise.T


@pytest.mark.parametrize("hidden", [(), (0,), (2,), (1, 4), (5,)])
def test_toeplitz_matrices_have_no_residual_with_and_without_gaps(hidden):
    K = masked(toeplitz(KERNEL), *hidden)
    assert toeplitz_residual(K) < ROUNDING
    part = toeplitz_part(K)
    np.testing.assert_allclose(part[~np.isnan(K)], K[~np.isnan(K)], rtol=ROUNDING)
    means = offset_kernel(K)["coupling"]
    np.testing.assert_allclose(means.dropna(), KERNEL[means.notna()], rtol=ROUNDING)


def test_the_part_is_the_nearest_toeplitz_matrix():
    """The gap is orthogonal to every Toeplitz matrix, so squares add up."""
    K = masked(random_coupling(), 3)
    known = ~np.isnan(K)
    gap = (K - toeplitz_part(K))[known]
    for offset in range(-5, 6):
        assert abs(gap @ np.eye(6, k=offset)[known]) < ROUNDING
    expected = np.linalg.norm(gap) / np.linalg.norm(K[known])
    assert toeplitz_residual(K) == pytest.approx(expected, rel=1e-12)


def test_stacks_are_each_matrix_alone():
    stack = np.stack([random_coupling(seed=s) for s in range(4)] + [masked(toeplitz(KERNEL), 1)])
    for function in (toeplitz_residual, toeplitz_part, intra_inter_ratio):
        np.testing.assert_allclose(function(stack), [function(K) for K in stack], rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_residual_does_not_depend_on_the_unit(scale):
    K = random_coupling()
    assert toeplitz_residual(scale * K) == pytest.approx(toeplitz_residual(K), rel=1e-12)


@pytest.mark.parametrize(
    ("K", "residual", "ratio"),
    [
        (np.zeros((4, 4)), 0.0, 0.0),
        ([[3.0]], 0.0, np.nan),
        (np.eye(3), 0.0, np.inf),
        (np.full((3, 3), np.nan), np.nan, np.nan),
        ([[1.0, 1.0], [1.0, 3.0]], np.sqrt(2.0 / 12.0), 2.0),
    ],
    ids=["zero", "one shell", "diagonal", "all masked", "two shells"],
)
def test_degenerate_couplings(K, residual, ratio):
    assert toeplitz_residual(K) == pytest.approx(residual, nan_ok=True)
    assert intra_inter_ratio(K) == pytest.approx(ratio, nan_ok=True)


def test_offset_kernel_has_means_and_spreads():
    K = random_coupling(4)
    frame = offset_kernel(K)
    assert frame["offset"].tolist() == [0, 1, 2, 3]
    assert frame["n_pairs"].tolist() == [4, 3, 2, 1]
    np.testing.assert_allclose(frame["coupling"], [np.diagonal(K, d).mean() for d in range(4)])
    np.testing.assert_allclose(
        frame["spread"][:3], [np.diagonal(K, d).std(ddof=1) for d in (0, 1, 2)]
    )
    assert np.isnan(frame["spread"][3])


@pytest.mark.parametrize(
    ("usable", "width", "starts", "centralities"),
    [
        ([1] * 7, 3, [4, 3, 2, 1, 0], [0, 0.5, 1, 0.5, 0]),
        ([0, 1, 1, 0, 1, 0], 2, [3, 2, 1], [0, 1, 0]),
        ([1] * 3, 6, [0], [1]),
        ([0, 1, 0], 3, [1], [1]),
        ([0, 0], 3, [], []),
    ],
)
def test_windows_slide_from_the_upper_edge_to_the_lower(usable, width, starts, centralities):
    windows = sliding_windows(usable, width)
    assert [w.first for w in windows] == starts
    assert [w.centrality for w in windows] == centralities
    span = np.ptp(np.flatnonzero(usable)) + 1 if any(usable) else 0
    assert {w.stop - w.first for w in windows} <= {min(width, span)}
    chosen = most_central(windows)
    assert chosen is None if not windows else windows[chosen].centrality == max(centralities)


@pytest.mark.parametrize("K", [np.zeros((2, 3)), np.zeros(4), np.full((2, 2), np.inf)])
def test_wrong_matrices_are_named(K):
    with pytest.raises(ValueError, match="K "):
        toeplitz_residual(K)
