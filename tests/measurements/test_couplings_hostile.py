"""Couplings, fluxes and blocks where caches, labels and awkward inputs could give wrong numbers."""

import numpy as np
import pytest
import torch
from torch import nn

from spectralshell import (
    JacobianBlockDiagnostic,
    ShellFluxEstimator,
    ToeplitzDiagnostic,
)
from spectralshell.estimators import jacobian_blocks, shell_flux, toeplitz
from spectralshell.measurements import solver
from spectralshell.warning_categories import GateWarning
from tests.device import place, place_snapshot
from tests.fingerprints import model_fingerprint

# The same arithmetic in another order.
RTOL = 1e-9

ESTIMATORS = {
    "flux": lambda **k: ShellFluxEstimator(q=4.0, floor=1e-6, **k),
    "toeplitz": lambda **k: ToeplitzDiagnostic(q=4.0, n_null=1, min_modes=1, **k),
    "blocks": lambda **k: JacobianBlockDiagnostic(n_null=2, **k),
}
MEASURES = {
    "flux": (shell_flux, "measure_fluxes"),
    "toeplitz": (toeplitz, "measure_couplings"),
    "blocks": (jacobian_blocks, "measure_blocks"),
}
# Derivatives that see gates flip.
SEEN = {
    "flux": {"solver": "lanczos"},
    "toeplitz": {"derivative": "difference"},
    "blocks": {"derivative": "difference"},
}
anything = pytest.mark.parametrize("kind", ESTIMATORS)


def network(seed=0, activation=nn.Tanh):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(3, 4), activation(), nn.Linear(4, 4), activation(), nn.Linear(4, 2)]
        return place(nn.Sequential(*layers).double())


def data(n=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return place((x, torch.arange(n) % 2))


def snapshot(seed=0, **labels):
    return place_snapshot(network(seed), *data(), **labels)


def size_of_motion(kind, estimator, found):
    """Return something in proportion to the size of the direction."""
    if kind == "flux":
        return estimator.transform([found]).to_numpy()[0, 0]
    if kind == "toeplitz":
        return np.abs(estimator.mode_couplings([found])[0].couplings).max()
    return estimator.transform([found])["jacobian_rate"].iloc[0]


@anything
def test_the_time_to_another_snapshot_is_never_taken_from_the_cache(kind, tmp_path):
    sizes = []
    for tau in (0.0, 2.0):
        estimator = ESTIMATORS[kind](direction=snapshot(5, tau=3.0), memory=tmp_path)
        sizes.append(size_of_motion(kind, estimator.fit([snapshot(tau=tau)]), snapshot(tau=tau)))
    assert sizes[1] == pytest.approx(3.0 * sizes[0], rel=RTOL)


@anything
def test_a_direction_by_label_is_never_taken_from_the_cache(kind, tmp_path):
    directions = {0: {"0.weight": torch.ones(4, 3)}, 1: {"0.weight": 2.0 * torch.ones(4, 3)}}
    sizes = []
    for batch in directions:
        estimator = ESTIMATORS[kind](direction=lambda s: directions[s.batch], memory=tmp_path)
        found = snapshot(batch=batch)
        sizes.append(size_of_motion(kind, estimator.fit([found]), found))
    assert sizes[1] == pytest.approx(2.0 * sizes[0], rel=RTOL)


@anything
def test_arrays_that_a_callable_answers_are_never_taken_from_the_cache(kind):
    found, scale = snapshot(), np.ones((4, 3))
    sizes = []
    for step in (0.0, 1e-9):  # beyond the digits of the array's text
        scale = scale + step
        direction = {"0.weight": scale}
        estimator = ESTIMATORS[kind](direction=lambda _, d=direction: d).fit([found])
        sizes.append(size_of_motion(kind, estimator, found))
    assert sizes[1] == pytest.approx((1.0 + 1e-9) * sizes[0], rel=1e-12, abs=0.0)
    assert len(found.measures) == 2


@anything
@pytest.mark.parametrize("answer", ["uphill", 3.0, {"0.weight": [1.0]}, snapshot])
def test_what_a_callable_answers_is_checked(kind, answer):
    with pytest.raises((ValueError, TypeError), match="direction"):
        ESTIMATORS[kind](direction=lambda _: answer).fit([snapshot()])


def statuses_of(kind, estimator):
    """Return what a fitted estimator says, as a set of phrases."""
    if kind == "toeplitz":
        return set(estimator.status_.split("; "))
    frame = estimator.summary_ if kind == "flux" else estimator.trajectory_
    return {phrase for status in frame["status"] for phrase in status.split("; ")}


@pytest.mark.parametrize(("kind", "n_jobs"), [*((kind, 1) for kind in ESTIMATORS), ("flux", 2)])
def test_held_gates_are_warned_of_once_from_workers_and_caches_too(kind, n_jobs):
    X = [place_snapshot(network(activation=nn.ReLU), *data(), batch=batch) for batch in range(2)]
    for _ in range(2):  # measured, and remembered
        with pytest.warns() as caught:
            estimator = ESTIMATORS[kind](n_jobs=n_jobs).fit(X)
        assert [w.category for w in caught] == [GateWarning]
        assert caught[0].filename == __file__
        assert "relu" in str(caught[0].message)
        assert "gates held: relu" in statuses_of(kind, estimator)
    assert "gates held: relu" not in statuses_of(kind, ESTIMATORS[kind](**SEEN[kind]).fit(X))


@anything
@pytest.mark.parametrize(
    ("direction", "said"),
    [
        ("gradient-flow", False),
        ("random", False),  # as long as gradient flow
        (snapshot(5, tau=3.0), False),
        (snapshot(5), True),
        ({"0.weight": torch.ones(4, 3)}, True),
    ],
    ids=["flow", "random", "later", "elsewhere", "mapping"],
)
def test_rates_that_are_not_per_tau_are_said_to_be_so(kind, direction, said):
    estimator = ESTIMATORS[kind](direction=direction).fit([snapshot()])
    phrase = "rates per unit of the direction as given"
    assert (phrase in statuses_of(kind, estimator)) == said
    assert estimator.dynamics_exact_ == (direction == "gradient-flow")


@anything
def test_the_way_of_selected_parameters_is_said_to_be_a_part(kind):
    settings = {"parameters": "weight", "direction": snapshot(5, tau=3.0)}
    estimator = ESTIMATORS[kind](**settings).fit([snapshot()])
    assert "rates per tau, of the selected parameters" in statuses_of(kind, estimator)


@anything
def test_a_callable_that_holds_the_snapshots_measures_once(kind, monkeypatch):
    X = [snapshot(seed, tau=float(seed)) for seed in range(2)]
    following = {0.0: X[1]}
    module, name = MEASURES[kind]
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(0) or original(*a, **k))
    estimator = ESTIMATORS[kind](direction=lambda s: following.get(s.tau, "gradient-flow"))
    estimator.fit(X).transform(X)
    estimator.score(X)
    assert len(calls) == 2


@anything
def test_a_callable_that_asks_for_a_random_direction_is_seeded(kind):
    sizes = [
        size_of_motion(
            kind,
            ESTIMATORS[kind](direction=lambda _: "random", random_state=seed).fit([found]),
            found,
        )
        for seed in (0, 1, 0)
        for found in [snapshot()]
    ]
    assert sizes[0] == sizes[2] != sizes[1]


@anything
def test_duplicated_and_permuted_data_change_nothing(kind):
    x, y = data()
    order = [3, 1, 4, 0, 2]
    variants = [(x, y), (x.repeat(2, 1), y.repeat(2)), (x[order], y[order])]
    rows = []
    for inputs, targets in variants:
        X = [place_snapshot(network(), inputs, targets)]
        rows.append(ESTIMATORS[kind](residual="brier").fit(X).transform(X).to_numpy())
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], rtol=RTOL, atol=RTOL * np.nanmax(np.abs(rows[0])))


def test_change_of_blocks_keeps_double_precision():
    # A root of two in single precision once put every norm off by 1e-8.
    X = [snapshot()]
    diagnostic = JacobianBlockDiagnostic(
        blocks={"^0": "first", "": "rest"},
        direction={"0.weight": torch.ones(4, 3, dtype=torch.float64)},
        n_null=1,
    ).fit(X)
    change = diagnostic.blocks_.set_index("block")["change"]
    assert change["first"] == pytest.approx(dense_change(), rel=1e-12)


def dense_change():
    """Return ‖dM_l/dt‖_F of the first layer when its weights grow alike."""
    model = network().requires_grad_(False)
    x, _ = data()

    def outputs(weight, bias):
        parameters = {"0.weight": weight, "0.bias": bias}
        return torch.func.functional_call(model, parameters, (x,)).flatten()

    def jacobian(weight):
        parts = torch.func.jacrev(outputs, argnums=(0, 1))(weight, bias)
        return torch.cat([part.flatten(1) for part in parts], dim=1) / len(x) ** 0.5

    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    J, rate = torch.func.jvp(jacobian, (weight,), (torch.ones_like(weight),))
    return (rate @ J.T + J @ rate.T).norm().item()


class Stubborn(nn.Module):
    """Counts its calls in a buffer, and fails as soon as it is differentiated."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2).double()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        if self.linear.weight.requires_grad:  # gradients are enabled in evaluations, too
            raise RuntimeError("stubborn")
        return self.linear(x)


@anything
def test_a_failing_model_is_left_alone(kind):
    model = Stubborn().train()
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    before = model_fingerprint(model)
    with pytest.raises(ValueError, match="where gradients are recorded: stubborn"):
        ESTIMATORS[kind]().fit([place_snapshot(model, *data())])
    assert model_fingerprint(model) == before


POOR = {
    "no error": {
        "flux": {"zero error", "zero direction"},
        "toeplitz": {"zero error", "zero direction", "zero coupling"},
        "blocks": {"zero direction", "frozen kernel"},
    },
    "one sample": {
        "flux": {"ok"},
        "toeplitz": {"one batch: no interval over batches"},
        "blocks": {"ok"},
    },
    "no kernel": {
        "flux": {"zero direction"},
        "toeplitz": {"no shell with 1 modes"},
        "blocks": {"one block", "zero kernel of weight", "frozen kernel"},
    },
    "no motion": {
        "flux": {"frozen kernel"},
        "toeplitz": {"frozen kernel", "zero coupling"},
        "blocks": {"one block", "frozen kernel"},
    },
}


def poor_snapshot(case):
    x, y = data()
    model, linear = network(), place(nn.Linear(3, 2, bias=False).double())
    return {
        "no error": lambda: place_snapshot(model, x, model(x).detach()),
        "one sample": lambda: place_snapshot(model, x[:1], y[:1]),
        "no kernel": lambda: place_snapshot(linear, torch.zeros_like(x), y),
        "no motion": lambda: place_snapshot(linear, x, y),
    }[case]()


@anything
@pytest.mark.parametrize("case", POOR)
def test_poor_snapshots_have_a_status_and_no_exception(kind, case):
    found = poor_snapshot(case)
    estimator = ESTIMATORS[kind]().fit([found])
    frame = estimator.transform([found])
    assert len(frame) == 1
    assert not np.isinf(frame.to_numpy()).any()
    assert POOR[case][kind] <= statuses_of(kind, estimator)


@anything
def test_a_snapshot_is_surveyed_once(kind, monkeypatch):
    surveyed = []
    survey = solver.survey_kernel
    monkeypatch.setattr(
        solver, "survey_kernel", lambda *a, **k: surveyed.append(1) or survey(*a, **k)
    )
    estimator, X = ESTIMATORS[kind](residual="brier"), [snapshot(0), snapshot(1, batch=1)]
    estimator.fit_transform(X)
    assert len(surveyed) == len(X)
