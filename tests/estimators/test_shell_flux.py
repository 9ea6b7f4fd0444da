"""ShellFluxEstimator: the contract, its balance against dense derivatives, and its solvers."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import GridSearchCV, GroupKFold

from spectralshell import ShellEnergyEstimator, ShellFluxEstimator, make_snapshots
from spectralshell.estimators import shell_flux
from spectralshell.measurements.settings import probe_seed
from spectralshell.operators import survey_motion
from spectralshell.shells import SoftShells
from spectralshell.warning_categories import DynamicsWarning
from tests.device import place, place_snapshot
from tests.estimators.contract import ShellEstimatorContract
from tests.estimators.sharp import Sharp

# Finite differences of energies in float64, extrapolated once.
RATE_ATOL = 1e-7
# What is promised of resolved matrix-free fluxes, relative to the largest flux.
MATRIX_FREE = 0.05
# Steps of gradient descent are straight, and the trapezoid has an error of their square.
TRAJECTORY_RTOL = 0.02


class TestContract(ShellEstimatorContract):
    estimator_class = ShellFluxEstimator


def small_model(seed=0, activation=torch.nn.Tanh):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), activation(), torch.nn.Linear(8, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return place(model)


def batch(seed=0, n=10):
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return place((x, y))


def descend(model, data, step, n_steps, every):
    """Return snapshots of gradient descent on ½E‖y − f‖² of the batch itself."""
    x, y = data
    snapshots = []
    for i in range(n_steps + 1):
        if i % every == 0:
            snapshots += make_snapshots(model, [data], tau=i * step)
        loss = 0.5 * (y - model(x)).square().sum() / len(x)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= step * g
    return snapshots


def soft_below(estimator, model, state, data):
    """Energies below the edges of an exact measurement at another state."""
    snapshot = place_snapshot(model, *data, state=state)
    measure = estimator._measure([snapshot]).measures[0].measure
    shells = SoftShells(estimator._shells.partition, estimator.softness)
    return shells.below(measure.nodes) @ measure.weights


@pytest.mark.parametrize("residual", ["mse", "brier", "cross-entropy"])
@pytest.mark.parametrize("direction", ["gradient-flow", "random"])
def test_energies_below_edges_change_by_dissipation_and_flux(residual, direction):
    """For every residual and direction, as dissipation takes ė as it is."""
    model, (x, y) = small_model(), batch()
    data = (x, y) if residual == "mse" else (x, y.argmax(dim=1))
    snapshot = place_snapshot(model, *data)
    estimator = ShellFluxEstimator(
        residual=residual, direction=direction, solver="exact", floor=1e-3, random_state=1
    ).fit([snapshot])
    with survey_motion(snapshot, residual=residual) as motion:
        generator = torch.Generator().manual_seed(probe_seed(1))
        moves = dict(
            zip(
                motion.parameter_names,
                motion.direction(direction, generator=generator).tangents,
                strict=True,
            )
        )
    start = snapshot.load_state()

    def rate(h):
        ends = [
            {name: value + s * h * moves.get(name, 0.0) for name, value in start.items()}
            for s in (1, -1)
        ]
        up, down = (soft_below(estimator, model, state, data) for state in ends)
        return (up - down) / (2 * h)

    expected = (4 * rate(1e-4) - rate(2e-4)) / 3
    fluxes = estimator.fluxes_
    actual = fluxes["flux_down"] - fluxes["dissipation_below"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RATE_ATOL)
    assert np.abs(fluxes["flux_down"]).max() > 1e-3


def test_frames_agree_with_each_other(measured_trajectory):
    estimator = ShellFluxEstimator(solver="exact").fit(measured_trajectory)
    fluxes, balance = estimator.fluxes_, estimator.balance_
    assert len(fluxes) == len(measured_trajectory) * estimator.n_shells_
    assert len(balance) == len(measured_trajectory) * (estimator.n_shells_ + 1)
    np.testing.assert_allclose(fluxes["drift"] + fluxes["rotation"], fluxes["flux_down"])
    wide = estimator.transform(measured_trajectory)
    np.testing.assert_array_equal(wide.to_numpy().ravel(), fluxes["flux_down"])
    sums = balance.groupby(["tau", "batch"])[["energy_soft", "transfer", "dissipation"]].sum()
    summary = estimator.summary_.set_index(["tau", "batch"])
    np.testing.assert_allclose(sums["energy_soft"], summary["energy"], rtol=1e-12)
    np.testing.assert_allclose(-sums["dissipation"], summary["energy_rate"], rtol=1e-6)
    assert sums["transfer"].abs().max() < 1e-12 * balance["transfer"].abs().max()
    assert summary["defect"].max() < 1e-12
    shares = estimator.locality_.groupby(["tau", "batch"])["share"].sum()
    np.testing.assert_allclose(shares, 1.0)
    new = estimator.flux_frame(measured_trajectory[:2])
    pd.testing.assert_frame_equal(new, fluxes.iloc[: len(new)])


def test_first_time_is_its_own_lazy_prediction(measured_trajectory):
    estimator = ShellFluxEstimator(solver="exact").fit(measured_trajectory)
    first = estimator.summary_.query("tau == 0")
    np.testing.assert_allclose(first["lazy_energy"], first["energy"], rtol=1e-12)
    assert first["lazy_energy_step"].isna().all()
    later = estimator.summary_.query("tau > 0")
    assert (later["lazy_energy"] < first["energy"].max()).all()
    shells = estimator.balance_.query("tau == 0")
    # Nodes outside M are of the null shell there, up to the rounding of the total.
    np.testing.assert_allclose(shells["lazy_energy"], shells["energy_soft"], rtol=1e-12, atol=1e-15)


def test_lazy_predictions_are_those_of_the_measures(measured_trajectory):
    X = [s for s in measured_trajectory if s.batch == 0]
    estimator = ShellFluxEstimator(solver="exact").fit(X)
    taus = [s.tau for s in X]
    measures = ShellEnergyEstimator(solver="exact").spectral_measures(X)
    summary = estimator.summary_
    expected = [measures[0].lazy_decay(tau) for tau in taus]
    np.testing.assert_allclose(summary["lazy_energy"], expected, rtol=1e-9)
    steps = [m.lazy_decay(tau - m.tau) for m, tau in zip(measures, taus[1:], strict=False)]
    np.testing.assert_allclose(summary["lazy_energy_step"][1:], steps, rtol=1e-9)
    by_shell = estimator.balance_.groupby("tau")["lazy_energy"].sum()
    np.testing.assert_allclose(by_shell, expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_matrix_free_fluxes_against_exact_ones(measured_trajectory, dtype):
    X = measured_trajectory[::8]
    exact = ShellFluxEstimator(solver="exact", dtype=dtype, floor=1e-3).fit(X)
    reference = exact.fluxes_[["tau", "edge", "flux_down"]].rename(columns={"flux_down": "exact"})
    frames = []
    for n_steps in (15, 60):
        lanczos = ShellFluxEstimator(solver="lanczos", n_steps=n_steps, dtype=dtype, floor=1e-3)
        found = lanczos.fit(X).fluxes_.assign(n_steps=n_steps)
        frames.append(found.merge(reference, on=["tau", "edge"]))
    found = pd.concat(frames, ignore_index=True)
    largest = found.groupby("tau")["exact"].transform(lambda flux: flux.abs().max())
    error = (found["flux_down"] - found["exact"]).abs() / largest
    few, many = found["n_steps"] == 15, found["n_steps"] == 60
    assert found.loc[many, "resolved"].sum() > found.loc[few, "resolved"].sum() > 0
    assert error[found["resolved"]].max() < MATRIX_FREE
    # There is something to be told apart.
    assert error[few & ~found["resolved"]].max() > MATRIX_FREE
    unresolved = found.loc[~found["resolved"], "status"]
    assert unresolved.str.contains("below the resolution floor|not converged").all()
    assert found["drift"].isna().all()


def test_step_of_a_matrix_free_difference_follows_the_jacobian():
    """In proportion to 400 idle parameters it would go over many turns of the sine."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Sharp()
    x = torch.randn(6, 3, generator=generator)
    snapshot = place_snapshot(model, x, torch.randn(6, 2, generator=generator))
    settings = {"q": 4.0, "floor": 1e-2}
    exact = ShellFluxEstimator(solver="exact", **settings).fit([snapshot]).fluxes_["flux_down"]

    def fluxes(**changes):
        return ShellFluxEstimator(solver="lanczos", **settings, **changes).fit([snapshot]).fluxes_

    found = fluxes()
    assert found["resolved"].all()
    error = (found["flux_down"] - exact).abs() / exact.abs().max()
    assert error.max() < MATRIX_FREE
    far = fluxes(step=0.05)
    error = (far["flux_down"] - exact).abs() / exact.abs().max()
    assert error.max() > 1.0
    assert not far["resolved"].any()
    assert far["status"].str.contains("changes with the step of the difference").all()


def test_matrix_free_dissipation_is_that_of_the_modes():
    """Along a random direction ė is far from −M e, and outside the Krylov space."""
    snapshot = place_snapshot(small_model(), *batch())
    settings = {"direction": "random", "random_state": 3, "floor": 1e-3}
    exact = ShellFluxEstimator(solver="exact", **settings).fit([snapshot]).balance_
    lanczos = ShellFluxEstimator(solver="lanczos", **settings).fit([snapshot]).balance_
    np.testing.assert_allclose(lanczos["dissipation"], exact["dissipation"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(lanczos["transfer"], exact["transfer"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_a_frozen_kernel_has_no_flux_and_says_so(solver):
    model = place(torch.nn.Linear(4, 2).double())
    X = make_snapshots(model, [batch(0), batch(1)])
    estimator = ShellFluxEstimator(solver=solver).fit(X)
    fluxes = estimator.fluxes_
    assert (fluxes["flux_down"] == 0).all()
    assert fluxes["status"].str.contains("frozen kernel").all()
    assert (estimator.velocity_fit_["status"] == "no flux").all()
    assert (estimator.balance_["dissipation"].to_numpy()[1:] >= 0).all()


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_no_error_gives_zeros_with_a_status(solver):
    model, (x, _) = small_model(), batch()
    snapshot = place_snapshot(model, x, model(x).detach())
    estimator = ShellFluxEstimator(solver=solver, n_steps=5).fit([snapshot])
    assert (estimator.fluxes_["flux_down"] == 0).all()
    assert estimator.fluxes_["status"].str.contains("zero").all()
    assert estimator.trajectory_.empty
    assert estimator.integrability_.empty


def test_measured_fluxes_of_gradient_descent_are_the_predicted_ones():
    X = descend(small_model(), batch(), step=1e-4, n_steps=750, every=150)
    estimator = ShellFluxEstimator(solver="exact", floor=0.05).fit(X)
    frame = estimator.trajectory_
    assert len(frame) == 5 * estimator.n_shells_
    scale = frame["predicted"].abs().max()
    assert (frame["measured"] - frame["predicted"]).abs().max() < TRAJECTORY_RTOL * scale
    assert not frame["status"].str.contains("another direction").any()
    ratios = estimator.integrability_
    assert (ratios["ratio"].dropna() > 0).all()
    assert len(ratios) == estimator.n_shells_


def decaying_modes(times):
    """Snapshots of exact gradient flow with M = diag(1, 100), which stays, and g = (1, 1)."""
    rates = torch.tensor([1.0, 100.0], dtype=torch.float64)
    inputs = torch.diag((2.0 * rates).sqrt())
    targets = torch.full((2, 1), 2.0**0.5, dtype=torch.float64)
    model = torch.nn.Linear(2, 1, bias=False).double()
    snapshots = []
    for tau in times:
        weight = (1.0 - torch.exp(-rates * tau)) / rates.sqrt()
        state = {"weight": weight[None]}
        snapshots.append(place_snapshot(model, inputs, targets, tau=tau, state=state))
    return snapshots


@pytest.mark.parametrize(("elapsed", "long"), [(1e-4, False), (1e-3, False), (0.1, True)])
def test_a_long_interval_is_not_taken_for_another_direction(elapsed, long):
    """The fast mode is gone at once, and D at the ends says little of what was lost between."""
    frame = ShellFluxEstimator(floor=0.5).fit(decaying_modes((0.0, elapsed))).trajectory_
    assert not frame["status"].str.contains("another direction").any()
    assert frame["status"].str.contains("too long to tell").all() == long


def test_what_another_optimiser_did_is_found_along_its_way():
    """Steps against a fixed vector: gradient flow does not explain them, the displacement does."""
    model, data = small_model(), batch()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moves = {name: torch.ones_like(p) for name, p in start.items()}
    X = [
        place_snapshot(model, *data, tau=t, state={n: p + t * moves[n] for n, p in start.items()})
        for t in (0.0, 0.01, 0.02)
    ]
    other = ShellFluxEstimator(solver="exact", floor=0.05).fit(X).trajectory_
    assert other["status"].str.contains("another direction").all()
    for direction in (moves, lambda snapshot: moves):
        frame = ShellFluxEstimator(solver="exact", floor=0.05, direction=direction).fit(X)
        way = frame.trajectory_
        scale = way["predicted"].abs().max()
        assert (way["measured"] - way["predicted"]).abs().max() < TRAJECTORY_RTOL * scale
        assert not way["status"].str.contains("another direction").any()


def test_direction_to_a_snapshot_is_a_mapping_over_the_time():
    model, data = small_model(), batch()
    here, there = place_snapshot(model, *data), place_snapshot(small_model(1), *data, tau=0.5)
    first, last = here.load_state(), there.load_state()
    moves = {name: (last[name] - first[name]) / 0.5 for name in first}
    frames = [
        ShellFluxEstimator(direction=direction, solver="exact").fit_transform([here])
        for direction in (there, moves)
    ]
    np.testing.assert_allclose(*frames, rtol=1e-9)


def test_frozen_predictions_warn_once_where_they_do_not_hold(measured_trajectory):
    X = measured_trajectory[::4]
    with pytest.warns(DynamicsWarning, match="frozen kernel") as caught:
        estimator = ShellFluxEstimator(residual="cross-entropy").fit(X)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not estimator.dynamics_exact_
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ShellFluxEstimator(residual="cross-entropy").fit(X[:1])


def test_grid_over_q_measures_every_snapshot_once(trajectory, monkeypatch):
    calls = []
    measure = shell_flux.measure_fluxes
    monkeypatch.setattr(shell_flux, "measure_fluxes", lambda *a: calls.append(a) or measure(*a))
    grid = {"q": [1.5, 2.0, 3.0], "softness": [0.2, 0.5]}
    search = GridSearchCV(ShellFluxEstimator(), grid, cv=GroupKFold(2), error_score="raise")
    search.fit(trajectory[:4], groups=[s.batch for s in trajectory[:4]])
    assert len(calls) == 4


def test_auto_takes_all_modes_where_they_are_affordable(measured_trajectory):
    assert ShellFluxEstimator().fit(measured_trajectory[:1]).solver_ == "exact"


def test_names_are_labels(measured_trajectory):
    first = measured_trajectory[0]
    X = [
        place_snapshot(first.model, first.inputs, first.targets, tau=tau, name=name)
        for name in ("a", "b")
        for tau in (0.0, 0.5)
    ]
    estimator = ShellFluxEstimator(floor=1e-2).fit(X)
    assert list(estimator.transform(X).index.names) == ["tau", "batch", "name"]
    assert set(estimator.trajectory_["name"]) == {"a", "b"}
    assert len(estimator.trajectory_) == 2 * estimator.n_shells_


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": 1.0}, "q must"),
        ({"softness": 0.0}, "softness"),
        ({"direction": "down"}, "direction must be one of"),
        ({"direction": 3}, "direction"),
        ({"derivative": "symbolic"}, "derivative must be one of"),
        ({"step": -1.0}, "step"),
        ({"confidence": 1.0}, "confidence"),
        ({"solver": "qr"}, "solver must be one of"),
        ({"floor": "low"}, "floor"),
    ],
)
def test_parameters_are_checked_in_fit(measured_trajectory, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ShellFluxEstimator(**changes).fit(measured_trajectory[:1])


def test_a_random_state_is_drawn_from_only_where_something_is_random(measured_trajectory):
    untouched, state = np.random.RandomState(3), np.random.RandomState(3)
    ShellFluxEstimator(solver="exact", random_state=state).fit(measured_trajectory[:4])
    assert state.randint(1000) == untouched.randint(1000)
