"""The operator on the meta device, where any look at a value raises: what a GPU must not do."""

import pytest
import torch

from spectralshell.krylov.recurrence import lanczos_recurrence
from spectralshell.operators.build import build_kernel
from tests.zoo import CASES, CASES_BY_NAME, RESIDUALS, build_on_rungs, make_snapshot


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.get("meta")], ids=lambda case: case["name"]
)
@pytest.mark.parametrize("kind", ["mse", "nll", "cross-entropy"])
def test_products_run_without_values(case, kind):
    snapshot = make_snapshot(case, kind)
    rungs = None if kind == "mse" else ["double-vjp"]
    kernel = build_on_rungs(snapshot, residual=RESIDUALS[kind], device="meta", rungs=rungs)
    vector = kernel.residual_vector
    for _ in range(3):
        vector = kernel.matvec(vector) / vector.norm()
    assert vector.device.type == "meta"
    assert vector.shape == (kernel.n,)
    assert vector.dtype == torch.float64
    assert kernel.matmat(torch.stack([vector, vector], 1)).shape == (kernel.n, 2)
    assert kernel.to_dense().shape == (kernel.n, kernel.n)
    assert kernel.error_jvp(kernel.velocity()).shape == (kernel.n,)


def test_chunks_run_without_values():
    snapshot = make_snapshot(CASES[0])
    kernel = build_kernel(snapshot, device="meta", chunk_size=4)
    assert kernel.matvec(kernel.residual_vector).shape == (18,)


@pytest.mark.parametrize("name", ["mlp", "cnn batchnorm", "causal attention"])
def test_lanczos_runs_without_values(name):
    kernel = build_kernel(make_snapshot(CASES_BY_NAME[name]), device="meta")
    recurrence = lanczos_recurrence(kernel.matvec, kernel.residual_vector, 5)
    assert recurrence.basis.shape == (kernel.n, 5)
    assert recurrence.alpha.device.type == "meta"
    assert kernel.norm == 0.0
