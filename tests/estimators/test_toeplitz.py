"""ToeplitzDiagnostic on real networks: the contract, its attributes, its parameters."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.utils.validation import check_is_fitted

from spectralshell import ToeplitzDiagnostic
from spectralshell.shells import ShellPartition, shell_coupling, toeplitz_residual
from tests.device import place_snapshot
from tests.estimators.contract import ShellEstimatorContract

CHEAP = {"solver": "exact", "n_null": 2}
RTOL = 1e-12
# A difference of states rounded in another order.
WAY_RTOL = 1e-6
# ln of shell couplings of modes whose own are more than rounding: those of SHORT are wrong by 0.004
# to 0.006, with the modes that are lost by 0.3 to 0.5, whatever the arithmetic.
ROUNDED = 0.03
# A third of the default step, whose lost couplings are wrong by 0.03 to 0.2.
SHORT = 3e-3


class TestContract(ShellEstimatorContract):
    estimator_class = ToeplitzDiagnostic
    cheap = {**CHEAP, "n_null": 1}


@pytest.fixture(scope="module")
def one_state(measured_trajectory):
    """Four batches of the state in the middle of training."""
    return measured_trajectory[4:8]


@pytest.fixture(scope="module")
def fitted(one_state):
    return ToeplitzDiagnostic(**CHEAP).fit(one_state)


def frozen_network():
    """Linear in its parameters, so that the kernel does not move."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3, dtype=torch.float64)
    inputs = torch.randn(10, 6, dtype=torch.float64)
    return place_snapshot(model, inputs, torch.randn(10, 3, dtype=torch.float64))


def test_attributes_belong_together(fitted, one_state):
    assert fitted.n_shells_ == len(fitted.coupling_) == len(fitted.edges_) - 1
    assert list(fitted.coupling_.columns) == list(fitted.shells_["shell"])
    # A frame may hold its numbers in another order, and sums round by it.
    expected = toeplitz_residual(fitted.coupling_)
    assert fitted.toeplitz_residual_ == pytest.approx(expected, rel=RTOL)
    assert fitted.p_value_ in (1 / 3, 2 / 3, 1.0)
    assert fitted.intra_inter_ratio_ == fitted.statistics_["value"]["intra_inter_ratio"]
    assert fitted.null_.groupby("null").size().to_dict() == {"permutation": 2, "random": 2}
    assert fitted.solver_ == "exact"
    assert fitted.status_ == "ok"
    measured = fitted.mode_couplings(one_state)
    assert fitted.lambda_max_ == max(m.lambda_max for m in measured)
    assert fitted.edges_[0] >= fitted.resolution_floor_


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "raw", "reducer": "rms", "diagonal": "modes"},
        {"normalization": "product", "diagonal": "pairs", "min_modes": 5},
    ],
)
def test_options_reach_the_coupling(one_state, options):
    snapshot = one_state[:1]
    diagnostic = ToeplitzDiagnostic(**CHEAP, **options).fit(snapshot)
    (m,) = diagnostic.mode_couplings(snapshot)
    expected = shell_coupling(m.couplings, m.eigenvalues, diagnostic._partition, **options)
    np.testing.assert_allclose(diagnostic.coupling_, expected, rtol=RTOL)


def test_rows_of_one_snapshot_are_its_own_diagnosis(one_state):
    snapshot = one_state[:1]
    diagnostic = ToeplitzDiagnostic(**CHEAP).fit(snapshot)
    row = diagnostic.transform(snapshot).iloc[0]
    assert row["toeplitz_residual"] == diagnostic.toeplitz_residual_
    assert row["permutation_p"] == diagnostic.p_value_
    statistics = diagnostic.statistics_
    for name in ("coupling_slope", "signed_r2", "intra_inter_ratio", "adjacent_share"):
        assert row[name] == statistics["value"][name]
    assert row["random_residual"] == statistics["random_median"]["toeplitz_residual"]
    central = diagnostic.windows_.loc[diagnostic.windows_["centrality"].idxmax()]
    assert row["central_residual"] == central["residual"]
    assert row["central_permutation_residual"] == central["permutation_median"]
    gain = np.log(row["permutation_residual"] / row["toeplitz_residual"])
    assert diagnostic.score(snapshot) == pytest.approx(gain, rel=RTOL)


def test_random_state_decides_the_nulls(one_state):
    def null(seed):
        return ToeplitzDiagnostic(**CHEAP, random_state=seed).fit(one_state[:1]).null_

    pd.testing.assert_frame_equal(null(3), null(3), check_exact=True)
    assert (null(3)["toeplitz_residual"] != null(4)["toeplitz_residual"]).all()


@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_a_frozen_kernel_gives_zeros_and_a_status(derivative):
    snapshot = frozen_network()
    diagnostic = ToeplitzDiagnostic(**CHEAP, q=4.0, derivative=derivative).fit([snapshot])
    known = diagnostic.coupling_.dropna(how="all").dropna(axis=1, how="all")
    assert known.size > 0
    assert (known == 0.0).all(axis=None)
    assert diagnostic.toeplitz_residual_ == 0.0
    assert np.isnan(diagnostic.p_value_)
    assert {"frozen kernel", "zero coupling"} <= set(diagnostic.status_.split("; "))
    assert np.isnan(diagnostic.score([snapshot]))
    row = diagnostic.transform([snapshot]).iloc[0]
    assert row.index[row.isna()].tolist() == ["permutation_p", "random_p", "central_permutation_p"]


def test_no_motion_is_not_significant_beside_random_directions(measured_trajectory):
    """The last bias does not change the Jacobian; random directions do."""
    snapshot = measured_trajectory[:1]
    direction = {"2.bias": torch.ones(10)}
    diagnostic = ToeplitzDiagnostic(**CHEAP, direction=direction).fit(snapshot)
    assert diagnostic.statistics_["random_median"]["toeplitz_residual"] > 0.0
    for frame in (diagnostic.statistics_, diagnostic.windows_, diagnostic.kernel_):
        assert frame[["permutation_p", "random_p"]].isna().all(axis=None)
    assert diagnostic.locality_["random_p"].isna().all()
    row = diagnostic.transform(snapshot).iloc[0]
    assert row[["random_p", "permutation_p", "central_permutation_p"]].isna().all()


def test_shells_too_wide_to_compare_never_win(one_state):
    grid = {"q": [2.0, 1e3, 1e30]}
    search = GridSearchCV(ToeplitzDiagnostic(**CHEAP), grid, cv=GroupKFold(2))
    with pytest.warns(UserWarning, match="non-finite"):
        search.fit(one_state, groups=[s.batch for s in one_state])
    assert np.isnan(search.cv_results_["mean_test_score"][-1])
    assert search.best_params_["q"] < 1e30


def test_zero_error_moves_nothing():
    snapshot = frozen_network()
    exact = snapshot.model(snapshot.inputs).detach()
    diagnostic = ToeplitzDiagnostic(**CHEAP).fit([(snapshot.model, snapshot.inputs, exact)])
    assert "zero error" in diagnostic.status_
    assert diagnostic.toeplitz_residual_ == 0.0


def test_a_full_krylov_space_gives_what_the_matrix_gives(one_state):
    exact = ToeplitzDiagnostic(**CHEAP).fit(one_state[:1])
    krylov = ToeplitzDiagnostic(solver="lanczos", n_steps=12, n_null=2).fit(one_state[:1])
    assert krylov.solver_ == "lanczos"
    # Vectors are as good as the gaps between eigenvalues.
    pd.testing.assert_frame_equal(krylov.coupling_, exact.coupling_, rtol=1e-6)


def test_unconverged_modes_are_masked(one_state):
    diagnostic = ToeplitzDiagnostic(solver="lanczos", n_steps=4, block_size=4, n_null=1)
    diagnostic.fit(one_state[:1])
    (m,) = diagnostic.mode_couplings(one_state[:1])
    assert 0 < m.resolved.sum() < m.eigenvalues.size
    assert diagnostic.shells_["n_modes"].sum() <= m.resolved.sum()


def steep_spectrum():
    """A smooth function of one variable: eigenvalues over more decades than float32 has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4))
    with torch.no_grad():
        model[0].weight.mul_(3.0)
    x = torch.linspace(-2.0, 2.0, 24)[:, None]
    return place_snapshot(model, x, torch.sin(x * torch.arange(1.0, 5.0)))


def test_couplings_lost_in_rounding_are_masked():
    """A difference in float32 divides the rounding of two kernels by a short step."""
    snapshot = [steep_spectrum()]
    phrase = "couplings of some modes are lost in rounding"
    narrow = ToeplitzDiagnostic(
        **CHEAP, q=4.0, derivative="difference", step=SHORT, dtype="float32", min_modes=1
    ).fit(snapshot)
    wide = ToeplitzDiagnostic(**CHEAP, q=4.0, dtype="float64").fit(snapshot)
    assert phrase in narrow.status_
    assert phrase not in wide.status_
    (single,), (double,) = (d.mode_couplings(snapshot) for d in (narrow, wide))
    above = (single.eigenvalues >= single.floor) & (single.eigenvalues > 0.0)
    assert 20 < single.resolved.sum() < above.sum()

    def error(mask):
        partition = ShellPartition.covering(single.floor, single.lambda_max, q=4.0)
        found, expected = (
            shell_coupling(m.couplings, m.eigenvalues, partition, mask=mask)
            for m in (single, double)
        )
        return np.nanmax(np.abs(np.log(found / expected)))

    assert error(single.resolved) < ROUNDED < error(above)


def test_direction_may_be_the_next_snapshot(one_state, measured_trajectory):
    following = {s.batch: s for s in measured_trajectory[8:]}
    here, there = one_state[0], following[one_state[0].batch]
    start, end = here.load_state(), there.load_state()
    way = {name: (end[name] - start[name]) / (there.tau - here.tau) for name in start}
    moved, mapped = (
        ToeplitzDiagnostic(**CHEAP, direction=direction).fit(one_state)
        for direction in (lambda s: following[s.batch], way)
    )
    pd.testing.assert_frame_equal(moved.coupling_, mapped.coupling_, rtol=WAY_RTOL)
    flow = ToeplitzDiagnostic(**CHEAP).fit(one_state)
    assert not np.allclose(moved.coupling_, flow.coupling_, rtol=0.1, equal_nan=True)


def test_several_tau_are_said_to_be_mixed(measured_trajectory):
    assert "several tau" in ToeplitzDiagnostic(**CHEAP).fit(measured_trajectory).status_


def test_score_without_a_usable_shell_is_nan(one_state):
    diagnostic = ToeplitzDiagnostic(**CHEAP, min_modes=1000).fit(one_state)
    assert np.isnan(diagnostic.score(one_state))
    assert "no shell with 1000 modes" in diagnostic.status_


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": 1.0}, "q must be"),
        ({"lambda_0": -1.0}, "lambda_0"),
        ({"n_null": 0}, "n_null"),
        ({"window_shells": 1}, "window_shells"),
        ({"min_modes": 2.5}, "min_modes must be an integer"),
        ({"normalization": "unit"}, "normalization must be one of"),
        ({"reducer": "median"}, "reducer must be one of"),
        ({"diagonal": "all"}, "diagonal must be one of"),
        ({"direction": "adam"}, "direction must be one of"),
        ({"derivative": "symbolic"}, "derivative must be one of"),
        ({"step": 0.0}, "step"),
        ({"block_size": 0}, "block_size"),
        ({"residual": "hinge"}, "residual"),
    ],
)
def test_wrong_parameters_are_named(one_state, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ToeplitzDiagnostic(**changes).fit(one_state)


def test_two_snapshots_with_the_same_labels_are_refused(fitted, one_state):
    with pytest.raises(ValueError, match="give each snapshot its own"):
        fitted.transform([one_state[0], one_state[0]])


def test_a_fit_that_is_interrupted_leaves_nothing_fitted(one_state, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("spectralshell.estimators.toeplitz.Diagnosis", interrupt)
    diagnostic = ToeplitzDiagnostic(**CHEAP)
    with pytest.raises(KeyboardInterrupt):
        diagnostic.fit(one_state)
    with pytest.raises(NotFittedError):
        check_is_fitted(diagnostic)
