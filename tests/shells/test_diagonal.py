"""Slopes of the diagonal couplings: known answers, intervals, statuses."""

import numpy as np
import pytest
from scipy import stats

from spectralshell.shells import ShellPartition, diagonal_scaling
from spectralshell.shells.diagonal import fit_line

# Differences of logarithms of float64 means.
SLOPE_TOLERANCE = 1e-8

SHELLS = ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=8)
RATES = 2.0 ** (np.arange(64) / 8.0)  # equally spaced in ln λ, eight modes a shell


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
