import numpy as np
import pytest

from spectralshell.datasets.synthetic import make_grsd_spectra, make_lazy_spectra

EDGES = np.geomspace(1e-3, 1.0, 9)
# Nodes are half a cell (1/1000 in ln λ) off an edge at most, and the densities fall by less than
# e^8 per unit of ln λ in the shells compared.
CELL = 0.01
# The mean of 4,000 factors of standard deviation 0.3, four standard errors.
SAMPLING = 0.02


def quiet(make, slope, **options):
    return make(slope, n_batches=1, noise="none", **options)


def integrals(density):
    """Shell integrals on a fine grid."""
    nodes = np.exp(np.linspace(np.log(1e-3), 0.0, 80_001))
    middle = np.sqrt(nodes[1:] * nodes[:-1])
    which = np.searchsorted(EDGES, middle, side="right") - 1
    return np.bincount(which, weights=density(middle) * np.diff(nodes), minlength=8)


@pytest.mark.parametrize("b", [0.7, 1.0, 2.5])
def test_pure_power_law_has_its_closed_form(b):
    (measure,) = quiet(make_grsd_spectra, b, K=0, taus=[1.0])
    np.testing.assert_allclose(
        measure.energies(EDGES)[1:], integrals(lambda lam: lam**-b), rtol=CELL
    )


@pytest.mark.parametrize("b", [0.7, 1.6])
def test_cutoff_is_k_tau(b):
    measures = quiet(make_grsd_spectra, b, K=0.3, taus=[1.0, 4.0])
    for measure in measures:
        truth = integrals(lambda x, tau=measure.tau: x**-b * np.exp(-0.3 * tau * x ** (b - 1)))
        np.testing.assert_allclose(measure.energies(EDGES)[1:], truth, rtol=CELL)


@pytest.mark.parametrize("b", [0.7, 1.3, 2.0])
def test_default_frontiers_lie_inside_and_follow_k_tau(b):
    measures = quiet(make_grsd_spectra, b)
    taus = np.array([measure.tau for measure in measures])
    assert (np.diff(taus) > 0).all()
    frontiers = taus ** (-1 / (b - 1))  # up to K
    spread = np.ptp(np.log(frontiers)) / np.log(1e3)
    assert spread == pytest.approx(0.6)


def test_lazy_spectra_decay_as_a_frozen_kernel():
    early, late = quiet(make_lazy_spectra, 1.5, taus=[0.0, 20.0])
    np.testing.assert_allclose(late.weights, early.weights * np.exp(-40.0 * early.nodes))


def test_lazy_two_is_the_template():
    lazy = quiet(make_lazy_spectra, 2.0, taus=[3.0])[0]
    template = quiet(make_grsd_spectra, 2.0, K=2.0, taus=[3.0])[0]
    np.testing.assert_allclose(lazy.weights, template.weights)


def factors(**options):
    """Noise factors as (batch, node), at one tau and with an e-fold of white spacing."""
    noisy = make_grsd_spectra(1.0, K=0, n_batches=400, nodes_per_log=10, random_state=1, **options)
    plain = quiet(make_grsd_spectra, 1.0, K=0, taus=[1.0], nodes_per_log=10)[0]
    return np.array([measure.weights / plain.weights for measure in noisy])


@pytest.mark.parametrize("noise", ["lognormal", "gamma"])
def test_noise_has_mean_one_and_its_spread(noise):
    values = factors(taus=[1.0], noise=noise, noise_sd=0.3, correlation_length=0.0)
    spread = np.log(values).std() if noise == "lognormal" else values.std()
    assert values.mean() == pytest.approx(1.0, abs=SAMPLING)
    assert spread == pytest.approx(0.3, abs=SAMPLING)


def test_noise_correlates_between_shells_and_taus():
    values = np.log(factors(taus=[1.0, 2.0], correlation_length=0.7, tau_correlation=0.5))
    first, second = values[:400], values[400:]
    # Nodes are 0.1 apart: exp(−0.7²/2·0.7²) = 0.61 at seven nodes. 0.07 is three standard errors
    # of the average over distant nodes.
    assert np.corrcoef(first[:, 20], first[:, 27])[0, 1] == pytest.approx(0.61, abs=0.12)
    across = np.mean([np.corrcoef(first[:, k], second[:, k])[0, 1] for k in range(0, 70, 10)])
    assert across == pytest.approx(0.5, abs=0.07)


def test_seed_decides():
    one, same = (make_grsd_spectra(1.5, random_state=3)[5].weights for _ in range(2))
    other = make_grsd_spectra(1.5, random_state=4)[5].weights
    assert (one == same).all()
    assert (one != other).any()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"b": np.nan}, "b"),
        ({"b": 1.0}, "b=1"),
        ({"b": 2.0, "K": -1.0}, "K"),
        ({"b": 2.0, "K": 1.0, "frontiers": [0.1]}, "frontiers"),
        ({"b": 2.0, "frontiers": [0.1], "taus": [1.0, 2.0]}, "frontier"),
        ({"b": 2.0, "frontiers": [-0.1]}, "frontiers"),
        ({"b": 2.0, "taus": [1.0, np.nan], "K": 1.0}, "taus"),
        ({"b": 2.0, "taus": [1.0, 1.0], "K": 1.0}, "taus"),
        ({"b": 2.0, "noise": "white"}, "noise"),
        ({"b": 2.0, "noise_sd": -1.0}, "noise_sd"),
        ({"b": 2.0, "tau_correlation": 2.0}, "tau_correlation"),
        ({"b": 2.0, "n_batches": 0}, "n_batches"),
        ({"b": 2.0, "window": (1.0, 0.1)}, "window"),
    ],
)
def test_wrong_input_is_named(options, name):
    with pytest.raises(ValueError, match=name):
        make_grsd_spectra(**options)
