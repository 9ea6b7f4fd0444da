"""Blocks so wide that the matrix is cheaper than their products."""

import pytest
import torch

from spectralshell.operators import build_kernel
from tests.zoo import CASES_BY_NAME, dense_reference, make_snapshot

# Float64 rounding of a product by either way.
TOLERANCE = 1e-10
NAMES = ["mlp", "cnn batchnorm", "tied language model", "gru"]


@pytest.fixture(params=NAMES)
def kernel(request):
    return build_kernel(make_snapshot(CASES_BY_NAME[request.param]))


def count_pulls(kernel, monkeypatch):
    pulls = []
    for part in kernel.jacobian.parts:
        pull, pull_block = part.linearization.pull, part.linearization.pull_block
        monkeypatch.setattr(part.linearization, "pull", lambda v, f=pull: pulls.append(1) or f(v))
        monkeypatch.setattr(
            part.linearization, "pull_block", lambda v, f=pull_block: pulls.append(len(v)) or f(v)
        )
    return pulls


def with_matrix_from(kernel, n_columns):
    return kernel.with_matrix(n_columns, kernel._build_matrix)


def wide_block(kernel):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(kernel.n, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_a_wide_block_is_the_product_with_the_dense_kernel(name):
    snapshot = make_snapshot(CASES_BY_NAME[name])
    reference = dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, "mse")
    kernel = build_kernel(snapshot)
    kernel = with_matrix_from(kernel, 5)
    block = wide_block(kernel)
    expected = reference["kernel"] @ block
    assert float((kernel.matmat(block).cpu() - expected).norm()) < TOLERANCE * float(
        expected.norm()
    )
    assert kernel.n_matvecs == 5


def test_only_wide_blocks_use_the_matrix(kernel, monkeypatch):
    pulls = count_pulls(kernel, monkeypatch)
    kernel = with_matrix_from(kernel, 5)
    block = wide_block(kernel)
    kernel.matmat(block)
    assert not pulls
    kernel.matmat(block[:, :4])
    kernel.matvec(block[:, 0])
    assert sum(pulls) >= 5


def test_a_dense_kernel_asked_for_is_made_of_products(kernel, monkeypatch):
    pulls = count_pulls(kernel, monkeypatch)
    kernel = with_matrix_from(kernel, 1)
    kernel.to_dense()
    assert sum(pulls) >= kernel.n


def test_the_width_follows_from_counts(kernel):
    again = build_kernel(make_snapshot(CASES_BY_NAME["mlp"]))
    same = build_kernel(make_snapshot(CASES_BY_NAME["mlp"]))
    assert again.matrix_from == same.matrix_from > 1


def test_a_closed_kernel_holds_no_matrix(kernel):
    kernel = with_matrix_from(kernel, 5)
    block = wide_block(kernel)
    kernel.matmat(block)
    kernel.close()
    assert kernel._matrix is None
    with pytest.raises(ValueError, match="was closed"):
        kernel.matmat(block)
