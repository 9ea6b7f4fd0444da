"""Quotients of roundings are NaN with a status: what another order of sums would change."""

import numpy as np
import pytest
import torch
from torch import nn

from spectralshell import JacobianBlockDiagnostic, ShellFluxEstimator, ToeplitzDiagnostic
from spectralshell.estimators.jacobian_block_frames import explained_share, profile_score
from spectralshell.shells import ShellPartition, SoftShells, shell_balance
from spectralshell.statuses import (
    CHANGES_CANCEL,
    DISSIPATION_IS_ROUNDING,
    ENERGY_IS_ROUNDING,
    FLUX_IS_ROUNDING,
    STEP_TOO_LONG,
)
from tests.device import place_snapshot

EPS = 2.0**-52

SAME = 0.5
"""Relative change of a quotient under rounding: known denominators change by less than a third."""

K, DRAWS = 60, 20


def modes(generator):
    """Modes over six decades; those of two, and the slowest, hold no energy."""
    rates = np.logspace(-6, 0, K)
    amplitudes = generator.normal(size=K)
    amplitudes[(rates > 1e-5) & (rates < 1e-3)] = 0.0
    amplitudes[rates < 3e-6] = 0.0
    couplings = generator.normal(size=(K, K)) * np.sqrt(np.outer(rates, rates))
    return rates, amplitudes, -rates * amplitudes, couplings + couplings.T


def rounded(values, scale, generator):
    """Another order of sums: an error of some eps of the whole in every entry."""
    return values + EPS * scale * generator.normal(size=np.shape(values))


def balance_of(given, generator):
    rates, g, rate, V = given
    size, speed = np.linalg.norm(g), np.linalg.norm(rate)
    g, rate = rounded(g, size, generator), rounded(rate, speed, generator)
    V = rounded(V, np.abs(V).max(), generator)
    shells = SoftShells(ShellPartition(q=4.0, lambda_0=1.0, first=-11, n_shells=11))
    total = rounded(0.5 * float(g @ g), size**2, generator)
    total_rate = rounded(float(g @ rate), size * speed, generator)
    return shell_balance(
        rates, g, rate, 0.5 * (V + V.T), shells, total=float(total), total_rate=float(total_rate)
    )


@pytest.mark.parametrize("seed", range(3))
def test_what_is_given_survives_another_order_of_sums(seed):
    generator = np.random.default_rng(seed)
    given = modes(generator)
    drawn = [balance_of(given, generator) for _ in range(DRAWS)]
    for name in ("flux_to_dissipation", "velocity", "shell_velocity"):
        table = np.array([getattr(balance, name) for balance in drawn])
        known = np.isfinite(table).all(axis=0)
        assert known.sum() >= table.shape[1] // 3
        spread = table[:, known].max(axis=0) - table[:, known].min(axis=0)
        assert (spread <= SAME * np.abs(table[0, known])).all(), name
        assert np.isnan(table[0, ~known]).any()
    plain = np.array([np.abs(b.flux_down) / np.abs(b.dissipation[:-1]) for b in drawn])
    assert (plain.max(axis=0) > 2.0 * plain.min(axis=0)).any()  # there was something to refuse


@pytest.fixture(scope="module")
def linear():
    """A deep linear network: turning a hidden layer's basis moves neither outputs nor kernel."""
    torch.manual_seed(0)
    sizes = [(3, 4), (4, 4), (4, 2)]
    model = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes)).double()
    draws = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, size, generator=draws, dtype=torch.float64) for size in (3, 2))
    return place_snapshot(model, x, y)


def turning(snapshot):
    state = snapshot.load_state()
    first, second = state["0.weight"], state["1.weight"]
    turn = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).to(first)
    turn = turn - turn.T
    return {"0.weight": turn @ first, "1.weight": -second @ turn}


@pytest.mark.parametrize("derivative", ["exact", "difference"])
@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_a_symmetry_has_no_flux_and_no_dissipation(linear, solver, derivative):
    estimator = ShellFluxEstimator(
        direction=turning(linear), derivative=derivative, solver=solver, n_steps=20
    ).fit([linear])
    fluxes = estimator.fluxes_
    assert fluxes["flux_to_dissipation"].isna().all()
    assert not fluxes["resolved"].any()
    for status in fluxes["status"]:
        assert DISSIPATION_IS_ROUNDING in status
        assert FLUX_IS_ROUNDING in status or STEP_TOO_LONG in status
    assert estimator.velocity_fit_["b"].isna().all()
    if solver == "exact":
        assert estimator.locality_["share"].isna().all()
        assert estimator.summary_[["null_share", "defect"]].isna().all(axis=None)


@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_a_symmetry_has_no_couplings(linear, derivative):
    found = ToeplitzDiagnostic(
        direction=turning(linear), derivative=derivative, n_null=5, min_modes=1
    ).fit([linear])
    assert found.statistics_.loc[["toeplitz_residual", "intra_inter_ratio"], "value"].isna().all()


def test_tails_of_far_modes_are_no_dissipation():
    shells = SoftShells(ShellPartition(q=2.0, lambda_0=1.0, first=-20, n_shells=20))
    rates, g = np.array([1e-6, 0.9]), np.array([1.0, 1.0])
    balance = shell_balance(rates, g, -rates * g, np.ones((2, 2)), shells)
    far = np.abs(np.log(shells.edges[:, None] / rates)).min(axis=1) > 3.0 * np.log(2.0)
    assert far.sum() >= 10
    assert np.isnan(balance.flux_to_dissipation[far]).all()
    own = np.searchsorted(shells.edges, rates[0])  # the edge above the slow mode's shell
    lost = float(shells.weights(rates)[own] @ (rates * g**2))
    assert balance.flux_to_dissipation[own] == pytest.approx(abs(balance.flux_down[own]) / lost)


def test_a_mode_without_error_is_named_in_the_frames():
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64))
    model = nn.Linear(3, 1, bias=False).double()
    x = vectors * torch.tensor([10.0, 1.0, 0.1])
    with torch.no_grad():
        y = model(x) + vectors[:, :1] + vectors[:, 2:]  # none along the second mode, of rate 1/8
    found = ShellFluxEstimator(solver="exact").fit([place_snapshot(model, x, y)])
    shells = found.balance_.set_index("shell")
    inner = (shells["lambda_lo"] <= 1 / 8) & (shells["lambda_hi"] > 1 / 8)
    assert shells.loc[inner, "status"].str.contains(ENERGY_IS_ROUNDING).all()
    near = found.fluxes_[(found.fluxes_["edge"] * 8).between(0.9, 1.1)]
    assert near["n_near"].tolist() == [1]
    assert near["velocity"].isna().all()
    assert near["status"].str.contains(ENERGY_IS_ROUNDING).all()


@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_changes_that_cancel_have_no_shares(linear, derivative):
    """M of the first layer goes with the product of the squares of the others, which stays."""
    state = linear.load_state()
    direction = {"1.weight": state["1.weight"], "2.weight": -state["2.weight"]}
    found = JacobianBlockDiagnostic(direction=direction, derivative=derivative).fit([linear])
    first = found.coherence_[found.coherence_["block"] == "0"].set_index("other")["influence"]
    assert first[["1", "2"]].isna().all()
    blocks = found.blocks_.set_index("block")
    assert blocks.loc["0", "status"] == CHANGES_CANCEL
    assert blocks.loc["0", "change"] == 0.0
    assert np.isnan(blocks.loc["0", "explained"])
    assert blocks.loc[["1", "2"], "explained"].tolist() == pytest.approx([1.0, 1.0])


def test_shares_of_a_change_that_cancels_are_unknown():
    gram = np.zeros((2, 2, 2))
    gram[0] = [[1.0, -1.0], [-1.0, 1.0 + 4.0 * EPS]]
    assert np.isnan(explained_share(gram, 1))


def test_orthogonal_blocks_have_no_decay():
    """Four blocks that see other inputs: their Jacobians are orthogonal but for rounding."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(4))

        def forward(self, x):
            pieces = [part(x[:, 2 * i : 2 * i + 2]) for i, part in enumerate(self.parts)]
            return torch.stack(pieces).sum(0)

    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    snapshot = place_snapshot(Parts().double(), basis, torch.ones(8, 1))
    row = JacobianBlockDiagnostic().fit_transform([snapshot]).iloc[0]
    assert np.isnan([row["decay_rate"], row["decay_power"]]).all()


def test_equal_coherences_but_for_rounding_are_no_profile():
    norms, apart = np.ones(3), np.abs(np.subtract.outer(range(3), range(3)))
    coherence = np.where(apart == 0, 1.0, 0.5)
    coherence[0, 1] = coherence[1, 0] = 0.5 + 3.0 * EPS
    profile = np.array([1.0, 0.5 + EPS, 0.5])
    assert (
        profile_score([(coherence, norms)], np.ones(1), profile, np.array([3.0, 2.0, 1.0])) == 0.0
    )
