"""Fluxes between shells: identities, a dense derivative, and the balance over a run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erfc

from spectralshell.shells import ShellPartition, SoftShells, shell_balance
from tests.shells.moving_kernel import hard_shell_run, integrate, small_network

# Sums of some thousand products in float64, relative to their absolute sum.
IDENTITY = 1e-13
# Central differences extrapolated once, with eigenproblems good to 1e-15.
DENSE_RTOL = 1e-8
# What the solver's own tolerance of 1e-12 leaves after a few hundred steps.
BALANCE = 1e-9
RATE = 1e-7
# Close eigenvalues turn fast, and the difference has an error of h².
MODE_RATE = 1e-6

END = 6.0
NETWORK, THETA = small_network()
NARROW = SoftShells(ShellPartition.covering(3e-3, 4.0, q=1.2))


def random_modes(seed, k=40, *, repeated=False, null=0):
    rng = np.random.default_rng(seed)
    lam = np.exp(rng.uniform(-6, 2, k))
    if repeated:
        lam[: k // 2] = lam[0]
    lam[:null] = -1e-17 * rng.random(null)
    V = rng.normal(size=(k, k)) * np.sqrt(np.abs(np.outer(lam, lam)))
    return lam, rng.normal(size=k), rng.normal(size=k), V + V.T


def shells_for(q=2.0, softness=0.25):
    return SoftShells(ShellPartition.covering(0.01, 8.0, q=q), softness)


def soft_energies(M, e, shells):
    lam, U = np.linalg.eigh(M)
    return shells.weights(lam) @ (0.5 * (U.T @ e) ** 2)


def balance_of_drift(lam, g, velocity, shells):
    return shell_balance(lam, g, np.zeros_like(g), np.diag(velocity), shells)


def dense_transfer(lam, g, V, shells, h=2e-4):
    """½ eᵀ D[w_α(M)](dM) e by central differences of two steps."""
    M = np.diag(lam)
    one, two = (
        (soft_energies(M + s * V, g, shells) - soft_energies(M - s * V, g, shells)) / (2 * s)
        for s in (h, 2 * h)
    )
    return (4 * one - two) / 3


def modes_and_shells(seed, q, softness, repeated, null):
    return random_modes(seed, repeated=repeated, null=null), shells_for(q, softness)


CASES = st.builds(
    modes_and_shells,
    st.integers(0, 10**6),
    st.floats(1.1, 5.0),
    st.floats(0.05, 1.0),
    st.booleans(),
    st.integers(0, 10),
)


def written_out_transfer(lam, g, V, shells):
    """½ Σ g_u g_v V_uv w_α[λ_u, λ_v] of each weight, and the rounding of these plain quotients."""
    u, v = lam[:, None], lam[None, :]
    gaps = np.where(u == v, np.inf, u - v)
    logs = np.log(np.where(lam > 0, lam, 1.0))
    positions = (logs - np.log(shells.edges)[:, None]) / (np.sqrt(2) * shells.sigma)
    positions[:, lam <= 0] = -np.inf
    # c_k lies below edge k; null has c_0, shell α has c_(α+1) − c_α, the last one what is left.
    w = np.diff(0.5 * erfc(positions), axis=0, prepend=0.0, append=1.0)
    bell = np.exp(-(positions**2)) / (np.sqrt(2 * np.pi) * shells.sigma)
    slopes = np.diff(-bell / np.where(lam > 0, lam, 1.0), axis=0, prepend=0.0, append=0.0)
    quotients = (w[:, :, None] - w[:, None, :]) / gaps
    quotients += np.where(u == v, slopes[:, :, None], 0.0)
    terms = 0.5 * np.outer(g, g) * V
    # Of a weight: rounding of erfc, and of ln λ, which the slope carries over.
    per_weight = np.finfo(float).eps * (4 + 2 * np.abs(logs).max() / shells.sigma)
    rounding = np.abs(terms / gaps)[(u > 0) | (v > 0)].sum() * per_weight
    return (quotients * terms).sum(axis=(1, 2)), rounding


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_transfers_telescope_and_answer_each_other(case):
    (lam, g, rates, V), shells = case
    balance = shell_balance(lam, g, rates, V, shells)
    scale = np.abs(balance.pair_flux).sum()
    expected, rounding = written_out_transfer(lam, g, V, shells)
    tolerance = rounding + IDENTITY * scale
    # What a shell gains is the difference of the fluxes through its edges, with no remainder.
    np.testing.assert_allclose(balance.transfer, expected, rtol=0, atol=tolerance)
    # The pairs are summed in another way, and answer each other.
    np.testing.assert_allclose(balance.pair_flux.sum(axis=1), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(-balance.pair_flux.sum(axis=0), expected, rtol=0, atol=tolerance)
    assert balance.defect <= IDENTITY


def test_the_written_out_transfer_could_tell():
    """Its rounding is far below what it is compared with."""
    for softness in (0.05, 1.0):
        lam, g, _, V = random_modes(8, repeated=True, null=5)
        transfer, rounding = written_out_transfer(lam, g, V, shells_for(2.0, softness))
        assert rounding < 1e-8 * np.abs(transfer).max()


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_shares_and_totals_add_up(case):
    (lam, g, rates, V), shells = case
    balance = shell_balance(lam, g, rates, V, shells)
    assert balance.null_share + balance.share_by_distance.sum() == pytest.approx(1.0)
    assert balance.energy.sum() == pytest.approx(0.5 * g @ g)
    assert balance.dissipation.sum() == pytest.approx(-g @ rates)
    assert balance.energy_below[-1] + balance.energy[-1] == pytest.approx(0.5 * g @ g)


@settings(max_examples=20, deadline=None)
@given(CASES, st.permutations(range(40)), st.floats(0.1, 10.0))
def test_order_and_units_of_modes_do_not_matter(case, order, factor):
    (lam, g, rates, V), shells = case
    order = list(order)
    plain = shell_balance(lam, g, rates, V, shells)
    mixed = shell_balance(
        lam[order], factor * g[order], rates[order], V[np.ix_(order, order)], shells
    )
    scale = np.abs(plain.pair_flux).sum()
    np.testing.assert_allclose(
        mixed.flux_down / factor**2, plain.flux_down, rtol=0, atol=IDENTITY * scale
    )


@pytest.mark.parametrize("softness", [0.25, 1.0])
@pytest.mark.parametrize("repeated", [False, True])
def test_transfer_is_the_derivative_of_the_dense_function(softness, repeated):
    shells = shells_for(1.7, softness)
    lam, g, rates, V = random_modes(3, repeated=repeated)
    V[0] = V[:, 0] = 0.0  # one mode stands still
    balance = shell_balance(lam, g, rates, V, shells)
    expected = dense_transfer(lam, g, V, shells)
    tolerance = DENSE_RTOL * np.abs(expected).max()
    np.testing.assert_allclose(balance.transfer, expected, rtol=0, atol=tolerance)


def test_pair_fluxes_against_the_plain_sum():
    lam, g, rates, V = random_modes(4)
    shells = shells_for()
    w = shells.weights(lam)
    gap = lam[:, None] - lam
    np.fill_diagonal(gap, np.inf)
    ratio = np.outer(g, g) * V / gap
    cross = np.einsum("au,bv->abuv", w, w) - np.einsum("av,bu->abuv", w, w)
    expected = 0.5 * np.einsum("abuv,uv->ab", cross, ratio)
    below = np.vstack([np.zeros((1, lam.size)), shells.slope_below(lam), np.zeros((1, lam.size))])
    slopes = np.diff(below, axis=0)
    diagonal = 0.5 * (slopes * g**2 * np.diag(V)) @ w.T
    expected += diagonal - diagonal.T
    actual = shell_balance(lam, g, rates, V, shells).pair_flux
    # The plain quotient loses digits between close eigenvalues.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("factor", [-1.0, 0.7])
def test_a_common_scaling_of_the_kernel_is_a_drift_with_its_velocity(factor):
    """dM = a M moves every rate by a λ and turns no mode."""
    lam, g, *_ = random_modes(5)
    balance = balance_of_drift(lam, g, factor * lam, shells_for())
    np.testing.assert_allclose(balance.velocity, factor * balance.shells.edges, rtol=1e-12)
    assert (balance.rotation == 0).all()


def test_velocity_of_shells_is_that_of_a_common_drift():
    """Many modes, so that a shell's density is smooth; the last shell has no upper edge."""
    lam = np.exp(np.linspace(-6, 3, 500))
    shells = SoftShells(ShellPartition.covering(0.01, 8.0, q=1.2))
    g = lam**0.5
    velocity = balance_of_drift(lam, g, -lam, shells).shell_velocity
    np.testing.assert_allclose(velocity[:-1], -shells.partition.midpoints[:-1], rtol=1e-2)
    assert np.isnan(velocity[-1])


def test_a_turning_pair_moves_energy_between_its_shells():
    """Two modes that turn in their plane: no drift, and dE/dt from the closed form."""
    lam, g, angular = np.array([0.5, 4.0]), np.array([1.0, 2.0]), 0.3
    V = angular * (lam[1] - lam[0]) * np.array([[0.0, 1.0], [1.0, 0.0]])
    balance = shell_balance(lam, g, [0.0, 0.0], V, shells_for(2.0, 0.01))
    assert (balance.drift == 0).all()
    between = (balance.shells.edges > 0.6) & (balance.shells.edges < 3.9)
    np.testing.assert_allclose(balance.flux_down[between], -angular * g[0] * g[1], rtol=1e-12)


def test_no_coupling_gives_zero_flux_and_no_nan_but_in_ratios():
    lam, g, rates, _ = random_modes(6)
    balance = shell_balance(lam, g, rates, np.zeros((40, 40)), shells_for())
    assert (balance.transfer == 0).all()
    assert balance.defect == balance.null_share == balance.null_exchange == 0
    assert (balance.share_by_distance == 0).all()


def test_no_mode_at_all_is_legal():
    empty = shell_balance([], [], [], np.zeros((0, 0)), shells_for(), total=0.5, total_rate=-0.25)
    assert empty.energy[0] == 0.5
    assert empty.dissipation[0] == 0.25
    assert (empty.flux_down == 0).all()
    assert np.isnan(empty.velocity).all()


def test_what_the_modes_leave_out_is_null():
    lam, g, rates, V = random_modes(7)
    whole = shell_balance(lam, g, rates, V, shells_for())
    total = 0.5 * g @ g + 1.0
    more = shell_balance(lam, g, rates, V, shells_for(), total=total, total_rate=g @ rates - 2.0)
    assert more.energy[0] == pytest.approx(whole.energy[0] + 1.0)
    assert more.dissipation[0] == pytest.approx(whole.dissipation[0] + 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amplitudes": [1.0]}, "one entry per mode"),
        ({"couplings": np.zeros((2, 3))}, "couplings must have shape"),
        ({"couplings": np.full((2, 2), np.nan)}, "couplings must be finite"),
        ({"eigenvalues": [1.0, np.inf]}, "eigenvalues"),
    ],
)
def test_bad_input_is_named(changes, message):
    good = {
        "eigenvalues": [1.0, 2.0],
        "amplitudes": [1.0, 1.0],
        "error_rates": [0.0, 0.0],
        "couplings": np.eye(2),
    }
    with pytest.raises(ValueError, match=message):
        shell_balance(**(good | changes), shells=shells_for())


def test_modes_turn_with_the_sign_of_the_denominator():
    """dg_u/dt = ⟨ė, φ_u⟩ + Σ g_v V_uv/(λ_u − λ_v), with λ_u first."""
    lam, g, rates, V, velocity = NETWORK.modes(THETA)
    gap = lam[:, None] - lam
    np.fill_diagonal(gap, np.inf)
    expected = rates + (V / gap) @ g
    h = 1e-5
    ahead, behind = (NETWORK.modes(THETA + s * h * velocity)[1] for s in (1, -1))
    # Eigenvectors come with any sign.
    signs = np.sign(ahead * g), np.sign(behind * g)
    actual = (signs[0] * ahead - signs[1] * behind) / (2 * h)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=MODE_RATE)
    wrong = rates - (V / gap) @ g
    assert np.abs(actual - wrong).max() > 1e3 * MODE_RATE


def test_energy_below_an_edge_changes_by_dissipation_and_flux():
    """dE_≤α/dt = −D_≤α + flux_down, the energies by finite differences along gradient flow."""
    shells = SoftShells(ShellPartition.covering(1e-4, 4.0, q=1.5))
    *modes, velocity = NETWORK.modes(THETA)
    balance = shell_balance(*modes, shells)
    expected = balance.flux_down - balance.dissipation_below

    def below(theta):
        lam, g, *_ = NETWORK.modes(theta)
        return shells.below(lam) @ (0.5 * g**2)

    # θ moves along a straight line here, which is gradient flow to first order.
    one, two = (
        (below(THETA + h * velocity) - below(THETA - h * velocity)) / (2 * h) for h in (1e-4, 2e-4)
    )
    np.testing.assert_allclose((4 * one - two) / 3, expected, rtol=0, atol=RATE)
    assert np.abs(balance.flux_down).max() > 0.01


def test_soft_balance_closes_over_a_run_with_crossings():
    def rates(*modes):
        balance = shell_balance(*modes, NARROW)
        return balance.transfer - balance.dissipation

    run = integrate(NETWORK, THETA, rates, len(NARROW.names), (0.0, END))
    states = [NETWORK.modes(run.y[: THETA.size, i]) for i in (0, -1)]
    first, last = (NARROW.weights(lam) @ (0.5 * g**2) for lam, g, *_ in states)
    assert np.abs(last - first).max() > 0.1
    np.testing.assert_allclose(last - first, run.y[THETA.size :, -1], rtol=0, atol=BALANCE)


def test_hard_shells_need_their_crossings():
    """Equation (3) of the first paper misses what crosses; with the events it closes."""
    edges = NARROW.partition.edges
    first, last, integral, moved, crossings = hard_shell_run(NETWORK, THETA, edges, END)
    assert crossings >= 20
    np.testing.assert_allclose(last - first, integral + moved, rtol=0, atol=BALANCE)
    without = np.abs(last - first - integral).max()
    assert without > 0.1 * np.abs(last - first).max()
