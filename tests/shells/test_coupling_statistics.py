"""Statistics of shell couplings: known answers, intervals, statuses."""

import numpy as np
import pytest
from scipy import stats
from scipy.linalg import toeplitz

from spectralshell.shells import (
    ShellPartition,
    diagonal_scaling,
    intra_inter_ratio,
    offset_kernel,
    toeplitz_part,
    toeplitz_residual,
)
from spectralshell.shells.coupling_statistics import fit_line, most_central, sliding_windows

ROUNDING = 1e-14

KERNEL = np.array([4.0, 2.0, 1.0, 0.5, 0.25, 0.1])

# Differences of logarithms of float64 means.
SLOPE_TOLERANCE = 1e-8

SHELLS = ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=8)
RATES = 2.0 ** (np.arange(64) / 8.0)  # equally spaced in ln λ, eight modes a shell


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
        ([1] * 6, 3, [3, 2, 1, 0], [0, 2 / 3, 2 / 3, 0]),
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
    assert chosen == (
        centralities.index(max(centralities)) if windows else None
    )  # the upper of two


@pytest.mark.parametrize("K", [np.zeros((2, 3)), np.zeros(4), np.full((2, 2), np.inf)])
def test_wrong_matrices_are_named(K):
    with pytest.raises(ValueError, match="K "):
        toeplitz_residual(K)


@pytest.mark.parametrize("diagonal", ["block", "modes"])
@pytest.mark.parametrize(
    ("normalization", "reducer", "slope", "mean_slope"),
    [
        ("raw", "rms", 1, 1),
        ("raw", "mean-abs", 1, 1),
        ("raw", "mean-square", 2, 1),
        ("sqrt", "rms", 0, 0),
        ("sqrt", "mean-square", 0, 0),
        ("product", "rms", -1, -1),
        ("product", "mean-square", -2, -1),
    ],
)
@pytest.mark.parametrize("a", [3.0, -0.2, 1.0])
def test_a_kernel_that_scales(a, normalization, reducer, slope, mean_slope, diagonal):
    """dM = aM, where the paper's slope 1 is that of the rms and of the signed mean."""
    frame = diagonal_scaling(
        np.diag(a * RATES),
        RATES,
        SHELLS,
        normalization=normalization,
        reducer=reducer,
        diagonal=diagonal,
    )
    assert frame.index.tolist() == ["coupling", "signed_mean"]
    np.testing.assert_allclose(frame["slope"], [slope, mean_slope], atol=SLOPE_TOLERANCE)
    assert frame["scale_free"].tolist() == [slope, mean_slope]
    np.testing.assert_allclose(frame["r2"], 1.0, atol=SLOPE_TOLERANCE)
    assert frame["status"].tolist() == ["ok", "ok"]


def test_unstructured_noise_passes_as_scale_free():
    """Why a slope is reported with its nulls: noise of D^½ W D^½ has the raw slope 1 as well."""
    noise = np.random.default_rng(0).standard_normal((64, 64))
    V = np.sqrt(RATES[:, None] * RATES) * (noise + noise.T)
    row = diagonal_scaling(V, RATES, SHELLS, normalization="raw", reducer="rms").loc["coupling"]
    assert row["slope_lower"] < 1.0 < row["slope_upper"]
    assert row["r2"] > 0.97


def test_line_is_that_of_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.random(9), rng.random((3, 9))
    y[1, 4] = np.nan
    fit = fit_line(x, y, confidence=0.9)
    for row in range(3):
        known = np.isfinite(y[row])
        expected = stats.linregress(x[known], y[row, known])
        assert fit.slope[row] == pytest.approx(expected.slope, rel=1e-10)
        assert fit.r2[row] == pytest.approx(expected.rvalue**2, rel=1e-10)
        half = expected.stderr * stats.t.ppf(0.95, known.sum() - 2)
        assert fit.half_width[row] == pytest.approx(half, rel=1e-10)


def test_rounding_of_logarithms_near_zero_is_no_scatter():
    """ln K of a normalised kernel that moves as itself, dM = M: rounding is absolute there."""
    ones = 1.0 + np.finfo(float).eps * np.random.default_rng(0).integers(-1, 2, 8)
    fit = fit_line(np.arange(8.0), np.log(ones))
    assert np.log(ones).any()
    assert fit.r2 == 1.0
    assert fit_line(np.arange(8.0), 1e10 * np.log(ones)).r2 < 0.9


def test_intervals_cover():
    rng = np.random.default_rng(0)
    fit = fit_line(np.arange(6.0), 0.5 * np.arange(6.0) + rng.standard_normal((2000, 6)))
    covered = np.abs(fit.slope - 0.5) < fit.half_width
    assert covered.mean() == pytest.approx(0.95, abs=0.02)  # four standard errors


@pytest.mark.parametrize(
    ("V", "status"),
    [
        (np.zeros((64, 64)), ["zero coupling", "zero coupling"]),
        (np.diag(np.where(RATES < 4.0, -RATES, RATES)), ["ok", "sign differs in 2 of 8 shells"]),
        (
            np.diag(np.where(RATES < 4.0, RATES, 0.0)),
            ["6 shells without coupling left out; two shells: no interval"] * 2,
        ),
        (
            np.diag(np.where(RATES < 2.0, RATES, 0.0)),
            ["7 shells without coupling left out; fewer than two shells"] * 2,
        ),
    ],
    ids=["zero", "sign", "two shells", "one shell"],
)
def test_statuses(V, status):
    frame = diagonal_scaling(V, RATES, SHELLS)
    assert frame["status"].tolist() == status
    if not V.any():
        assert (frame[["slope", "slope_lower", "slope_upper", "r2"]] == 0.0).all(axis=None)
    if "no interval" in status[0]:
        assert np.isinf(frame[["slope_lower", "slope_upper"]].to_numpy()).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"confidence": 1.0}, "confidence"), ({"V": np.zeros((2, 64, 64))}, "V must be one matrix")],
)
def test_wrong_input_is_named(changes, message):
    arguments = {"V": np.eye(64), "eigenvalues": RATES, "partition": SHELLS} | changes
    with pytest.raises(ValueError, match=message):
        diagonal_scaling(**arguments)
