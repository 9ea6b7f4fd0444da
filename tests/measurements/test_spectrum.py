"""From snapshots to measures, over the whole zoo of models: closure, bounds, statuses."""

import warnings

import numpy as np
import pytest
import torch

from spectralshell import ShellEnergyEstimator
from spectralshell.measurements.settings import KernelSettings
from spectralshell.measurements.spectrum import measure_spectrum
from spectralshell.warning_categories import ResolutionWarning
from tests.device import place_snapshot
from tests.zoo import (
    CASES_BY_NAME,
    RESIDUALS,
    build_model,
    dense_reference,
    make_inputs,
    make_snapshot,
    make_targets,
)

# The contract for energies of an exact measure, relative to ½‖e‖².
CLOSURE = 1e-12
# ½‖e‖² by another route: float64 rounding of a forward pass through some layers.
TOTAL_RTOL = 1e-9
KINDS = ("mse", "brier", "nll")
N_STEPS = 6


@pytest.fixture(scope="module", params=sorted(CASES_BY_NAME))
def case(request):
    return CASES_BY_NAME[request.param]


@pytest.mark.parametrize("kind", KINDS)
def test_energies_close_and_bounds_hold_the_dense_truth(case, kind):
    model, inputs, targets = build_model(case), make_inputs(case), make_targets(case, kind)
    reference = dense_reference(model, inputs, targets, kind)
    error = reference["error"].numpy()
    rates, modes = np.linalg.eigh(reference["kernel"].numpy())
    truth = 0.5 * (modes.T @ error) ** 2

    snapshot = make_snapshot(case, kind)
    # Off the eigenvalues: at one, rounding decides on which side of the edge it is.
    edges = rates[-1] * np.geomspace(1e-3, 1.1, 12)
    expected = np.array([truth[rates < edge].sum() for edge in edges])
    for solver in ("exact", "lanczos"):
        settings = KernelSettings(residual=RESIDUALS[kind], solver=solver, n_steps=N_STEPS)
        measure = measure_spectrum(snapshot, settings)
        assert measure.total == pytest.approx(truth.sum(), rel=TOTAL_RTOL)
        assert measure.energies(edges).sum() == pytest.approx(measure.total, rel=CLOSURE)
        lower, middle, upper = measure.cumulative(edges)
        assert (lower <= expected + TOTAL_RTOL * truth.sum()).all()
        assert (upper >= expected - TOTAL_RTOL * truth.sum()).all()
        assert ((lower <= middle) & (middle <= upper)).all()


def test_rows_close_where_six_steps_resolve_nothing():
    X = [make_snapshot(CASES_BY_NAME["residual cnn"])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResolutionWarning)
        estimator = ShellEnergyEstimator(solver="lanczos", n_steps=N_STEPS).fit(X)
    (measure,) = estimator.spectral_measures(X)
    assert estimator.resolution_floor_ == measure.lambda_max
    assert estimator.n_shells_ == 1
    assert estimator.transform(X).to_numpy().sum() == pytest.approx(measure.total, rel=CLOSURE)
    assert np.isnan(estimator.score(X))


def test_full_depth_lanczos_is_exact():
    snapshot = make_snapshot(CASES_BY_NAME["mlp"])
    exact, deep = (
        measure_spectrum(snapshot, KernelSettings(solver=solver, n_steps=1000))
        for solver in ("exact", "lanczos")
    )
    edges = exact.lambda_max * np.geomspace(1e-6, 0.9, 9)
    np.testing.assert_allclose(deep.energies(edges), exact.energies(edges), atol=1e-9 * exact.total)


def test_steps_are_shown_when_asked_for(capsys):
    X = [make_snapshot(CASES_BY_NAME["mlp"])]
    estimator = ShellEnergyEstimator(solver="lanczos", n_steps=3, verbose=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResolutionWarning)
        estimator.fit(X)
    shown = capsys.readouterr().err
    assert "measuring snapshots" in shown
    assert "Lanczos" in shown
    assert "batch=0: lanczos (n = 18; predicted cost: exact " in shown
    assert "3/3" in shown


def test_noise_of_a_short_run_follows_the_norm_of_the_kernel():
    """One step from an error that is orthogonal to the one large mode sees a Ritz value of 1."""
    inputs = torch.cat([torch.full((8, 1), 1e3), torch.tensor([[1.0], [-1.0]]).repeat(4, 1)], dim=1)
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    snapshot = place_snapshot(model, inputs, inputs[:, 1:])
    measure = measure_spectrum(snapshot, KernelSettings(solver="lanczos", n_steps=1))
    assert measure.lambda_max == pytest.approx(1.0, rel=1e-3)
    assert measure.noise >= 6e-7 * 1e6 * 0.9
