"""Shell couplings against loops over pairs of modes, and what they are invariant to."""

import numpy as np
import pytest

from spectralshell.shells import ShellPartition, shell_coupling, toeplitz_residual

# Sums of a few thousand float64 squares in another order.
SUM_RTOL = 1e-12

SHELLS = ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=5)
POWERS = {"sqrt": 0.5, "product": 1.0, "raw": 0.0}


def symmetric(k, seed=0, scale=1.0):
    noise = np.random.default_rng(seed).standard_normal((k, k))
    return scale * (noise + noise.T)


def random_rates(k, seed=1):
    return 2.0 ** np.random.default_rng(seed).uniform(-0.5, 5.0, k)


def looped(V, rates, normalization, reducer, diagonal, min_modes, mask):
    size = np.abs if reducer == "mean-abs" else np.square
    power = POWERS[normalization]
    members = [
        [u for u in range(len(rates)) if mask[u] and SHELLS.index(rates[u]) == alpha]
        for alpha in range(SHELLS.n_shells)
    ]
    K = np.full((SHELLS.n_shells, SHELLS.n_shells), np.nan)
    for a, first in enumerate(members):
        for b, second in enumerate(members):
            if min(len(first), len(second)) < min_modes:
                continue
            pairs = [(u, v) for u in first for v in second]
            if a == b and diagonal != "block":
                pairs = [(u, v) for u, v in pairs if (u == v) is (diagonal == "modes")]
            entries = [size(V[u, v] / (rates[u] * rates[v]) ** power) for u, v in pairs]
            if entries:
                K[a, b] = np.mean(entries)
    return np.sqrt(K) if reducer == "rms" else K


@pytest.mark.parametrize("diagonal", ["block", "modes", "pairs"])
@pytest.mark.parametrize("reducer", ["mean-square", "rms", "mean-abs"])
@pytest.mark.parametrize("normalization", list(POWERS))
def test_matches_loops_over_pairs(normalization, reducer, diagonal):
    V, rates = symmetric(24), random_rates(24)
    mask = np.arange(24) % 7 != 3
    options = (normalization, reducer, diagonal, 1, mask)
    K = shell_coupling(
        V,
        rates,
        SHELLS,
        normalization=normalization,
        reducer=reducer,
        diagonal=diagonal,
        min_modes=1,
        mask=mask,
    )
    np.testing.assert_allclose(K, looped(V, rates, *options), rtol=SUM_RTOL)


def test_stack_is_each_matrix_alone():
    stack, rates = np.stack([symmetric(20, seed) for seed in range(3)]), random_rates(20)
    together = shell_coupling(stack, rates, SHELLS, min_modes=2)
    alone = [shell_coupling(V, rates, SHELLS, min_modes=2) for V in stack]
    np.testing.assert_allclose(together, alone, rtol=SUM_RTOL)


def test_signs_and_order_of_the_modes_do_not_matter():
    V, rates = symmetric(20), random_rates(20)
    rng = np.random.default_rng(2)
    signs, order = rng.choice([-1.0, 1.0], 20), rng.permutation(20)
    moved = (signs[:, None] * V * signs)[np.ix_(order, order)]
    plain = shell_coupling(V, rates, SHELLS, min_modes=1)
    np.testing.assert_allclose(
        shell_coupling(moved, rates[order], SHELLS, min_modes=1), plain, rtol=SUM_RTOL
    )


@pytest.mark.parametrize("reducer", ["mean-square", "rms"])
def test_rotation_within_a_degenerate_shell_does_not_matter(reducer):
    rates = np.repeat([1.5, 3.0, 6.0], 4)
    V = symmetric(12)
    rotation = np.zeros((12, 12))
    for start in (0, 4, 8):
        block = slice(start, start + 4)
        rotation[block, block] = np.linalg.qr(symmetric(4, seed=start))[0]
    turned = rotation.T @ V @ rotation
    np.testing.assert_allclose(
        shell_coupling(0.5 * (turned + turned.T), rates, SHELLS, reducer=reducer),
        shell_coupling(V, rates, SHELLS, reducer=reducer),
        rtol=SUM_RTOL,
    )


def test_sparse_shells_are_masked():
    rates = np.array([1.1, 1.2, 1.3, 2.5, 4.1, 4.2, 4.3, 4.4])
    K = shell_coupling(symmetric(8), rates, SHELLS, min_modes=3)
    known = np.array([True, False, True, False, False])
    np.testing.assert_array_equal(~np.isnan(K), known[:, None] & known)
    mask = np.arange(8) != 0  # leaves two modes in the first shell
    K = shell_coupling(symmetric(8), rates, SHELLS, min_modes=3, mask=mask)
    assert np.flatnonzero(~np.isnan(K).all(axis=0)).tolist() == [2]


def test_modes_outside_the_partition():
    """Below the first edge they do not count, above the last one they are in the last shell."""
    rates = np.array([-1.0, 0.5, 1.5, 1.6, 100.0, 200.0])
    K = shell_coupling(np.ones((6, 6)), rates, SHELLS, normalization="raw", min_modes=2)
    assert np.flatnonzero(np.diagonal(K) == 1.0).tolist() == [0, 4]


def test_zero_couplings_give_zeros():
    K = shell_coupling(np.zeros((20, 20)), random_rates(20), SHELLS, min_modes=1)
    assert (K == 0.0).all()


def test_no_modes_mask_everything():
    K = shell_coupling(np.zeros((0, 0)), [], SHELLS)
    assert np.isnan(K).all()
    assert K.shape == (5, 5)


def test_scaled_noise_is_toeplitz_only_when_normalised():
    """D^½ W D^½ with 64 modes a shell: the known bounds are 0.05 and 0.8."""
    shells = ShellPartition(q=2.0, lambda_0=1.0, first=0, n_shells=10)
    rates = 2.0 ** (np.arange(640) / 64.0)
    V = np.sqrt(rates[:, None] * rates) * symmetric(640)
    assert toeplitz_residual(shell_coupling(V, rates, shells)) < 0.05
    assert toeplitz_residual(shell_coupling(V, rates, shells, normalization="raw")) > 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"V": np.zeros((3, 3))}, "V must have shape"),
        ({"V": np.full((4, 4), np.nan)}, "V holds NaN"),
        ({"V": np.triu(np.ones((4, 4)))}, "V must be symmetric"),
        ({"eigenvalues": [1.0, np.inf, 1.0, 1.0]}, "eigenvalues holds NaN or infinity"),
        ({"normalization": "none"}, "normalization must be one of"),
        ({"reducer": "mean"}, "reducer must be one of"),
        ({"diagonal": "full"}, "diagonal must be one of"),
        ({"min_modes": 0}, "min_modes must be an integer"),
        ({"mask": [1, 0, 1, 1]}, "mask must be boolean"),
        ({"mask": [True]}, "mask must be boolean"),
    ],
)
def test_wrong_input_is_named(changes, message):
    arguments = {"V": np.ones((4, 4)), "eigenvalues": np.ones(4), "partition": SHELLS} | changes
    with pytest.raises(ValueError, match=message):
        shell_coupling(**arguments)
