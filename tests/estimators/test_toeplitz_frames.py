"""A diagnosis of couplings made by hand: known structure, nulls, intervals, degenerate cases."""

from dataclasses import replace

import numpy as np
import pytest

from spectralshell.estimators.toeplitz import ROW_NAMES, log_gain, scalar_frame
from spectralshell.estimators.toeplitz_frames import (
    ALTERNATIVES,
    Diagnosis,
    ShellSummary,
    SnapshotShells,
    adjacent_share,
    jackknife,
    null_p_value,
    place_coupling_shells,
)
from spectralshell.shells import (
    SoftShells,
    permutation_p_value,
    shell_balance,
    shell_coupling,
    toeplitz_residual,
)
from spectralshell.shells.coupling import CouplingRule
from tests.measurements.mode_couplings import by_offset, by_scale, even_rates, make_couplings, noise

N_NULL = 20
RATES = even_rates(10, 12)
RTOL = 1e-12
RULE = CouplingRule()


def in_shells(measured, *, rule=RULE, seed=0, q=2.0):
    partition = place_coupling_shells(measured, q=q, lambda_0=1.0).partition
    return [SnapshotShells(m, partition, rule, seed) for m in measured]


def diagnose(*matrices, rates=RATES, window_shells=6, **options):
    measured = [make_couplings(V, rates, seed=b, batch=b) for b, V in enumerate(matrices)]
    return Diagnosis(in_shells(measured, **options), N_NULL, window_shells)


@pytest.fixture(scope="module")
def four_batches():
    return diagnose(*(by_offset(RATES, seed=b) for b in range(4)))


def test_coupling_is_the_mean_over_snapshots(four_batches):
    alone = [
        shell_coupling(s.couplings.couplings, RATES, s.partition) for s in four_batches.snapshots
    ]
    frame = four_batches.coupling
    np.testing.assert_allclose(frame, np.mean(alone, axis=0), rtol=RTOL)
    assert list(frame.columns) == list(frame.index) == list(four_batches.partition.names)


def test_structure_by_offset_beats_permutations_and_structure_by_scale_does_not(four_batches):
    row = four_batches.statistics.loc["toeplitz_residual"]
    assert row["permutation_p"] == 1 / (1 + N_NULL)
    assert row["value"] < row["permutation_lower"]
    other = diagnose(*(by_scale(RATES, seed=b) for b in range(2)))
    assert other.statistics.loc["toeplitz_residual", "permutation_p"] == 1.0


def test_score_has_the_sign_of_the_structure():
    structured, scaled = in_shells(
        [make_couplings(by_offset(RATES), RATES), make_couplings(by_scale(RATES), RATES)]
    )
    assert log_gain(structured, N_NULL) > 0.1
    assert log_gain(scaled, N_NULL) < -0.5


def test_score_of_noise_does_not_depend_on_q():
    """The bare residual halves with twice the modes per shell, the gain over the null stays 0."""
    for q in (2.0, 4.0):
        gains = []
        for seed in range(12):
            V = np.sqrt(RATES[:, None] * RATES) * noise(RATES.size, seed)
            gains += [log_gain(s, 5) for s in in_shells([make_couplings(V, RATES)], q=q)]
        assert abs(np.mean(gains)) < 3 * np.std(gains, ddof=1) / np.sqrt(len(gains))


def test_statistics_are_those_of_the_mean_coupling(four_batches):
    statistics = four_batches.statistics
    assert list(statistics.index) == list(ALTERNATIVES)
    K = four_batches.coupling.to_numpy()
    assert statistics.loc["toeplitz_residual", "value"] == pytest.approx(toeplitz_residual(K))
    assert statistics.loc["coupling_slope", "value"] == pytest.approx(
        four_batches.diagonal.loc["coupling", "slope"]
    )
    assert statistics.loc["adjacent_share", "value"] == four_batches.locality["share"][0]
    null = four_batches.null.query("null == 'permutation'")
    for name in ("toeplitz_residual", "intra_inter_ratio"):
        assert statistics.loc[name, "permutation_median"] == pytest.approx(null[name].median())
    residuals = null["toeplitz_residual"]
    assert statistics.loc["toeplitz_residual", "permutation_p"] == permutation_p_value(
        statistics.loc["toeplitz_residual", "value"], residuals
    )


def test_random_null_is_along_the_random_directions(four_batches):
    draws = [
        [shell_coupling(V, RATES, s.partition) for V in s.couplings.random_couplings]
        for s in four_batches.snapshots
    ]
    expected = toeplitz_residual(np.mean(draws, axis=0))
    found = four_batches.null.query("null == 'random'")["toeplitz_residual"]
    np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_locality_is_the_exchange_between_soft_shells():
    (diagnosed,) = in_shells([make_couplings(by_offset(RATES), RATES)])
    m = diagnosed.couplings
    balance = shell_balance(
        RATES, m.amplitudes, m.error_rates, m.couplings, SoftShells(diagnosed.partition)
    )
    frame = Diagnosis([diagnosed], N_NULL, 6).locality
    within = 1.0 - balance.null_share
    np.testing.assert_allclose(frame["share"] * within, balance.share_by_distance, rtol=1e-10)
    assert frame["share"].sum() == pytest.approx(1.0, rel=RTOL)


def test_permuted_flux_keeps_equal_entries():
    """Equal normalised entries have nowhere to go, so the null of the flux is the flux."""
    V = np.sqrt(RATES[:, None] * RATES) * (2.0 + np.eye(RATES.size))
    (diagnosed,) = in_shells([make_couplings(V, RATES)])
    null = diagnosed.permuted(2).flux
    np.testing.assert_allclose(null, np.stack([diagnosed.observed.flux] * 2), rtol=1e-10)


def test_windows_are_residuals_of_parts_of_the_mean(four_batches):
    frame = four_batches.window_frame
    K = four_batches.coupling.to_numpy()
    assert frame["window"].tolist() == [0, 1, 2, 3, 4]
    assert frame["lambda_lo"].is_monotonic_decreasing
    assert frame["centrality"].tolist() == [0, 0.5, 1, 0.5, 0]
    np.testing.assert_allclose(frame["lambda_hi"] / frame["lambda_lo"], 2.0**6)
    expected = [toeplitz_residual(K[i : i + 6, i : i + 6]) for i in (4, 3, 2, 1, 0)]
    np.testing.assert_allclose(frame["residual"], expected, rtol=RTOL)
    assert (frame["lower"] < frame["residual"]).all()
    assert (frame["residual"] < frame["upper"]).all()


def test_a_window_of_everything_has_the_null_of_everything():
    diagnosis = diagnose(by_offset(RATES), window_shells=10)
    whole = diagnosis.statistics.loc["toeplitz_residual"]
    (window,) = diagnosis.window_frame.to_dict("records")
    assert window["residual"] == pytest.approx(whole["value"], rel=RTOL)
    assert window["permutation_median"] == pytest.approx(whole["permutation_median"], rel=0.3)
    assert window["random_median"] == pytest.approx(whole["random_median"], rel=RTOL)


def test_null_of_a_window_does_not_see_what_is_outside():
    V = by_offset(RATES)
    outside = RATES >= 2.0**7
    loud = V * np.where(outside[:, None] | outside, 1e6, 1.0)
    frames = [diagnose(matrix).window_frame.set_index("lambda_lo") for matrix in (V, loud)]
    for column in ("residual", "permutation_median", "permutation_p"):
        quiet, other = (frame.loc[2.0, column] for frame in frames)
        assert quiet == pytest.approx(other, rel=RTOL)


def test_offset_kernel_falls_as_planted(four_batches):
    kernel = four_batches.kernel
    decay = np.diff(np.log(kernel["coupling"]))
    np.testing.assert_allclose(decay, -2.0, atol=0.5)
    assert kernel["permutation_p"][0] == 1 / (1 + N_NULL)
    assert (kernel["lower"][:-1] < kernel["coupling"][:-1]).all()


def test_nulls_depend_on_labels_and_seed_alone():
    measured = [make_couplings(noise(120, b), RATES, batch=b) for b in range(2)]
    together = [s.permuted(4).coupling for s in in_shells(measured)]
    alone = [in_shells([m])[0].permuted(4).coupling for m in measured]
    np.testing.assert_array_equal(together, alone)
    other_seed = in_shells(measured, seed=1)[0].permuted(4).coupling
    assert not np.array_equal(other_seed, together[0])
    for labels in ({"batch": 1}, {"name": "seed 1"}):
        relabelled = in_shells([replace(measured[0], **labels)])[0].permuted(4).coupling
        assert not np.array_equal(relabelled, together[0])


def test_unconverged_modes_and_modes_below_the_floor_do_not_enter():
    rates = np.append(RATES, [70.0, 3.0])
    V = np.zeros((122, 122))
    V[:120, :120] = by_offset(RATES)
    V[120:] = V[:, 120:] = 0.0
    V[120:, 120:] = 1e9
    converged = np.arange(122) != 120
    spoiled = make_couplings(V, rates, converged=converged)
    below = replace(spoiled, eigenvalues=np.where(np.arange(122) == 121, 1e-14, rates))
    (found,), (expected,) = in_shells([below]), in_shells([make_couplings(V[:120, :120], RATES)])
    np.testing.assert_allclose(found.observed.coupling, expected.observed.coupling, rtol=RTOL)
    np.testing.assert_allclose(found.observed.flux, expected.observed.flux, rtol=RTOL)
    np.testing.assert_array_equal(found.permuted(2).coupling, expected.permuted(2).coupling)


@pytest.mark.parametrize("diagonal", ["block", "modes"])
def test_zero_coupling_gives_zeros(diagonal):
    zero = np.zeros((120, 120))
    measured = replace(make_couplings(zero, RATES), random_couplings=np.zeros((3, 120, 120)))
    snapshots = in_shells([measured], rule=CouplingRule(diagonal=diagonal))
    diagnosis = Diagnosis(snapshots, N_NULL, 6)
    assert (diagnosis.coupling == 0.0).all(axis=None)
    assert (diagnosis.statistics["value"] == 0.0).all()
    assert diagnosis.statistics[["permutation_p", "random_p"]].isna().all(axis=None)
    assert diagnosis.window_frame[["permutation_p", "random_p"]].isna().all(axis=None)
    assert (diagnosis.window_frame["residual"] == 0.0).all()
    assert (diagnosis.diagonal["slope"] == 0.0).all()
    assert (diagnosis.locality["share"] == 0.0).all()
    assert "zero coupling" in diagnosis.status
    assert np.isnan(log_gain(snapshots[0], N_NULL))
    row = scalar_frame(snapshots, N_NULL, 6).iloc[0]
    assert row.drop(["permutation_p", "random_p", "central_permutation_p"]).notna().all()
    assert np.isnan(row["random_p"])
    assert row["toeplitz_residual"] == 0.0


@pytest.mark.parametrize(
    ("n_shells", "status", "residual"),
    [
        (0, "no shell with 3 modes", np.nan),
        (1, "one usable shell", 0.0),
        (2, "no more usable", 0.0),
    ],
)
def test_few_shells(n_shells, status, residual):
    rates = np.append(even_rates(n_shells, 20), [100.0, 500.0])  # and two sparse shells
    V = np.sqrt(rates[:, None] * rates) * noise(rates.size)
    diagnosis = diagnose(V, rates=rates)
    assert status in diagnosis.status
    value = diagnosis.statistics.loc["toeplitz_residual", "value"]
    assert value == pytest.approx(residual, abs=0.3, nan_ok=True)
    assert len(diagnosis.window_frame) == min(n_shells, 1)
    frame = scalar_frame(diagnosis.snapshots, N_NULL, 6)
    assert list(frame.columns) == list(ROW_NAMES)
    assert frame["n_shells"].tolist() == [n_shells]
    assert np.isnan(log_gain(diagnosis.snapshots[0], N_NULL)) == (n_shells < 2)
    if n_shells == 1:
        assert diagnosis.statistics.loc["toeplitz_residual", "permutation_p"] == 1.0


@pytest.mark.parametrize("k", [0, 1])
def test_hardly_any_modes(k):
    measured = make_couplings(np.ones((k, k)), np.ones(k))
    diagnosis = Diagnosis(in_shells([measured]), N_NULL, 6)
    assert "no shell with 3 modes" in diagnosis.status
    for frame in (diagnosis.coupling, diagnosis.kernel, diagnosis.locality, diagnosis.shells):
        assert not frame.select_dtypes(float).map(np.isinf).any(axis=None)


def test_one_batch_has_no_interval_over_batches():
    diagnosis = diagnose(by_offset(RATES))
    assert diagnosis.statistics[["lower", "upper"]].isna().all(axis=None)
    assert (diagnosis.diagonal["interval"] == "least squares over shells").all()
    assert np.isfinite(diagnosis.diagonal["slope_lower"]).all()
    assert "one batch" in diagnosis.status


def test_intervals_are_jackknife_over_batches_not_snapshots():
    measured = [
        make_couplings(by_offset(RATES, seed=10 * b), RATES, batch=b, tau=tau)
        for b in range(3)
        for tau in (0.0, 1.0)
    ]
    pairs = Diagnosis(in_shells(measured), N_NULL, 6)
    singles = Diagnosis(in_shells(measured[::2]), N_NULL, 6)
    for column in ("value", "lower", "upper"):
        np.testing.assert_allclose(pairs.statistics[column], singles.statistics[column], rtol=1e-9)
    assert "mean over several tau" in pairs.status
    assert singles.status == "ok"


def test_trajectories_side_by_side_are_resampled_as_batches_are():
    by_batch, by_name = (
        [make_couplings(by_offset(RATES, seed=b), RATES, **labels(b)) for b in range(3)]
        for labels in (lambda b: {"batch": b}, lambda b: {"batch": 0, "name": f"seed {b}"})
    )
    expected, found = (
        Diagnosis(in_shells(measured), N_NULL, 6) for measured in (by_batch, by_name)
    )
    for column in ("value", "lower", "upper"):
        np.testing.assert_array_equal(found.statistics[column], expected.statistics[column])
    assert np.isfinite(found.statistics["lower"]).all()
    assert found.status == "ok"


def checkpoints_of_noise(rates, rng, n_times=4):
    """Couplings of one batch that are noise, and nearly the same at successive times."""
    scale, first = np.sqrt(rates[:, None] * rates), rng.standard_normal((rates.size, rates.size))
    found = []
    for tau in range(n_times):
        V = first + 0.1 * rng.standard_normal(first.shape)
        found.append(make_couplings(scale * (V + V.T), rates, n_random=1, tau=float(tau)))
    return found


def test_checkpoints_of_one_batch_are_permuted_together(monkeypatch):
    """Noise that lasts from one time to the next is no structure, on either side of a null."""
    # Fluxes take long and are not asked for here.
    monkeypatch.setattr(SnapshotShells, "_flux_sizes", lambda self, V: np.ones(6))
    rates, rng, n_null, draws = even_rates(6, 5), np.random.default_rng(0), 9, 100
    small = dict.fromkeys(["toeplitz_residual", "intra_inter_ratio", "coupling_slope"], 0)
    for draw in range(draws):
        snapshots = in_shells(checkpoints_of_noise(rates, rng), seed=draw)
        p = Diagnosis(snapshots, n_null, 6).statistics["permutation_p"]
        for name in small:
            small[name] += p[name] <= 1 / (1 + n_null)
    spread = 4 * np.sqrt(0.1 * 0.9 / draws)  # four standard deviations of a proportion
    for count in small.values():
        assert count / draws == pytest.approx(0.1, abs=spread)


def test_checkpoints_with_other_modes_have_no_permutation_p_value():
    measured = [
        make_couplings(by_offset(RATES, seed=1), RATES, tau=0.0),
        make_couplings(by_offset(RATES[5:], seed=2), RATES[5:], tau=1.0),
    ]
    diagnosis = Diagnosis(in_shells(measured), N_NULL, 6)
    phrase = "modes of a batch differ between tau: no permutation p-value"
    assert phrase in diagnosis.status
    for frame in (diagnosis.statistics, diagnosis.kernel, diagnosis.locality):
        assert frame["permutation_p"].isna().all()
        assert frame["random_p"].notna().all()
    windows = diagnosis.window_frame.set_index("lambda_lo")
    whole = windows.index > 1.0  # the modes that are missing are those of the first shell
    assert (windows["status"] == np.where(whole, "ok", phrase)).all()
    assert (windows["permutation_p"].notna() == whole).all()
    other_batches = [replace(m, batch=b) for b, m in enumerate(measured)]
    apart = Diagnosis(in_shells(other_batches), N_NULL, 6)
    assert apart.statistics["permutation_p"].notna().all()


def test_jackknife_of_a_mean_is_its_t_interval():
    from scipy import stats

    values = np.random.default_rng(0).random(6)
    found = jackknife(range(6), lambda chosen: {"mean": values[list(chosen)].mean()})
    expected = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-10)
    assert jackknife(["a", "a"], lambda chosen: {}) is None


@pytest.mark.parametrize("name", ["toeplitz_residual", "adjacent_share", "intra_inter_ratio"])
def test_intervals_stay_in_range(name):
    values = np.array([0.01, 0.99, 0.5])
    lower, upper = jackknife(range(3), lambda chosen: {name: values[list(chosen)].mean()})[name]
    assert 0.0 <= lower < 0.5 < upper
    assert upper <= 1.0 or name == "intra_inter_ratio"


@pytest.mark.parametrize(
    ("observed", "alternative", "expected"),
    [
        (5.0, "less", 1.0),
        (5.0, "greater", 0.2),
        (5.0, "two-sided", 0.2),
        (-9.0, "two-sided", 0.2),
        (3.0, "two-sided", 0.8),  # one from the median 2, as the draws 1 and 3; 0 is farther
        (np.inf, "greater", 0.2),
        (np.inf, "two-sided", 0.2),
        (np.nan, "two-sided", np.nan),
    ],
)
def test_p_values_by_side(observed, alternative, expected):
    found = null_p_value(observed, np.arange(4.0), alternative)
    assert found == pytest.approx(expected, nan_ok=True)


def test_two_sided_p_values_are_uniform_and_reach_their_least_value():
    rng = np.random.default_rng(0)
    draws = rng.lognormal(size=(2000, 21))
    p = np.array([null_p_value(row[0], row[1:], "two-sided") for row in draws])
    # Three standard deviations of a proportion of 1/21.
    assert np.mean(p <= 1 / 21) == pytest.approx(1 / 21, abs=3 * np.sqrt(1 / 21 / 2000))
    assert null_p_value(0.1 + 0.2, np.full(20, 0.3), "two-sided") == 1.0


def test_summaries_average_what_is_known():
    first = ShellSummary(np.array([[1.0]]), np.array([np.nan]), np.full(1, np.nan), np.zeros(1))
    second = ShellSummary(np.array([[3.0]]), np.array([2.0]), np.full(1, np.nan), np.zeros(1))
    mean = ShellSummary.mean([first, second])
    assert mean.coupling == 2.0
    assert mean.signed_mean == 2.0
    assert np.isnan(mean.log_lambda)
    assert np.isnan(adjacent_share(mean.flux))
