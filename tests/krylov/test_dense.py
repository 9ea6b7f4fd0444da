"""The dense reference against constructed spectra."""

import numpy as np
import pytest
import torch

from spectralshell.krylov import eigenmeasure
from tests.device import DEVICE, make_tensor
from tests.krylov.zoo import KINDS, random_case

# Eigenvalues are good to the float64 noise of the design, relative to the norm.
EIGENVALUES = 4e-15


@pytest.mark.parametrize("seed", range(2 * len(KINDS)))
def test_spectrum_and_energies(seed):
    case = random_case(seed)
    spectrum = eigenmeasure(make_tensor(case.matrix), make_tensor(case.start), 0.0, vectors=True)
    scale = case.lambda_max
    np.testing.assert_allclose(
        spectrum.eigenvalues, np.sort(case.eigenvalues), atol=EIGENVALUES * scale
    )
    np.testing.assert_allclose(spectrum.energies.sum(), case.mass, rtol=1e-12)
    np.testing.assert_allclose(spectrum.mass, case.mass, rtol=1e-12)
    vectors = spectrum.vectors.cpu().numpy()
    np.testing.assert_allclose(
        (vectors * spectrum.eigenvalues) @ vectors.T, case.matrix, atol=10 * EIGENVALUES * scale
    )
    assert spectrum.status == "ok"


@pytest.mark.parametrize("seed", range(2 * len(KINDS)))
def test_without_vectors_the_spectrum_is_the_same(seed):
    case = random_case(seed)
    matrix, start = make_tensor(case.matrix), make_tensor(case.start)
    both = [eigenmeasure(matrix, start, 0.0, vectors=vectors) for vectors in (False, True)]
    np.testing.assert_allclose(
        both[0].eigenvalues, both[1].eigenvalues, atol=EIGENVALUES * case.lambda_max
    )
    np.testing.assert_allclose(both[0].energies.sum(), case.mass, rtol=1e-12)
    assert both[0].vectors is None
    # Energies of a cluster belong to it, not to its members: compare them between gaps.
    nodes = both[1].eigenvalues
    edges = (0.5 * (nodes[1:] + nodes[:-1]))[np.diff(nodes) > 1e-6 * case.lambda_max]
    below = [np.array([s.energies[s.eigenvalues < x].sum() for x in edges]) for s in both]
    # Rounding of 4e-15 over a gap of 1e-6 turns an eigenvector by 4e-9 at most.
    np.testing.assert_allclose(below[0], below[1], atol=4e-9 * case.mass)


def test_asymmetry_is_removed_and_reported():
    matrix = make_tensor([[1.0, 0.5], [0.0, 1.0]])
    spectrum = eigenmeasure(matrix, torch.ones(2, device=DEVICE), 1e-6)
    np.testing.assert_allclose(spectrum.eigenvalues, [0.75, 1.25])
    assert spectrum.asymmetry == pytest.approx(0.25)  # per column
    assert spectrum.status.startswith("asymmetry 2.5e-01")
    assert spectrum.vectors is None


def test_zero_start_and_zero_matrix():
    spectrum = eigenmeasure(torch.zeros(3, 3, device=DEVICE), torch.zeros(3, device=DEVICE), 0.0)
    assert spectrum.mass == 0.0
    assert spectrum.bounds().at([1.0]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("matrix", "start", "error", "match"),
    [
        (np.eye(2), torch.ones(2), TypeError, "must be torch tensors"),
        (torch.eye(2), torch.ones(3), ValueError, "must have shape"),
        (torch.ones(2, 3), torch.ones(2), ValueError, "must have shape"),
        (torch.zeros(0, 0), torch.zeros(0), ValueError, "must have shape"),
        (torch.eye(2) * float("nan"), torch.ones(2), ValueError, "must be finite"),
    ],
)
def test_wrong_input_is_named(matrix, start, error, match):
    with pytest.raises(error, match=match):
        eigenmeasure(matrix, start, 0.0)
