"""The exact kernel of models that mislead anything which looks at layers."""

import re

import pytest
import torch
from torch import nn

from spectralshell.operators import DifferentiationError, build_exact_kernel, build_kernel
from spectralshell.warning_categories import KernelWarning
from tests.device import place_snapshot
from tests.hostile_models import (
    HOSTILE,
    HOSTILE_BY_NAME,
    Lambda,
    OnceSquare,
    build_llama,
)
from tests.zoo import dense_reference, make_snapshot

TOLERANCE = 1e-10
"""Relative Frobenius norm in float64; what comes out is near 1e-15."""

ROUNDING = 1e-13
"""Of a parameter's own kernel, relative to the whole: some of them vanish."""

quiet = [case for case in HOSTILE if case["warns"] is None]
coupled = [case for case in HOSTILE if case["warns"] is not None]


def relative(a, b):
    a, b = a.double().cpu(), b.cpu()
    return float((a - b).norm() / b.norm())


def reference_of(snapshot, kind):
    return dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, kind)


def check_parameters(kernel, snapshot, reference):
    """Compare the kernel of every parameter with that of its columns of the Jacobian."""
    trainable = [p for p in snapshot.model.parameters() if p.requires_grad]
    columns = reference["jacobian"].split([p.numel() for p in trainable], dim=1)
    scale = float(reference["kernel"].norm())
    for name, part in zip(kernel.parameter_names, columns, strict=True):
        assert float((kernel.layers[name].cpu() - part @ part.T).norm()) <= ROUNDING * scale, name


@pytest.mark.parametrize("case", quiet, ids=lambda case: case["name"])
def test_layers_are_seen_as_what_they_compute(case):
    snapshot = make_snapshot(case, "mse")
    kernel = build_exact_kernel(snapshot)
    assert relative(kernel.matrix, reference_of(snapshot, "mse")["kernel"]) < TOLERANCE
    assert kernel.rung == "layers"
    samples = {name for name, order in kernel.orders.items() if order == "samples"}
    assert samples == {n for n in kernel.parameter_names if re.search(case["samples"], n)}


@pytest.mark.parametrize("case", quiet, ids=lambda case: case["name"])
def test_every_parameter_of_a_hostile_model_has_its_own_kernel(case):
    kind = "cross-entropy" if case["n_classes"] > 1 else "mse"
    snapshot = make_snapshot(case, kind)
    reference = reference_of(snapshot, kind)
    kernel = build_exact_kernel(snapshot, residual=kind, layers="parameter")
    assert relative(kernel.matrix, reference["kernel"]) < TOLERANCE
    check_parameters(kernel, snapshot, reference)


@pytest.mark.parametrize("case", coupled, ids=lambda case: case["name"])
def test_layers_that_mislead_are_named_and_the_kernel_is_right(case):
    snapshot = make_snapshot(case, "mse")
    reference = reference_of(snapshot, "mse")
    for layers in (None, "parameter"):
        with pytest.warns(KernelWarning, match=case["warns"]):
            kernel = build_exact_kernel(snapshot, layers=layers)
        assert relative(kernel.matrix, reference["kernel"]) < TOLERANCE
        if layers is not None:
            check_parameters(kernel, snapshot, reference)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "name",
    [
        "sub-batches",
        "experts",
        "experts by branches",
        "low-rank update",
        "two batch-sized axes",
        "linear called twice",
        "frames flattened into the batch",
    ],
)
def test_chunks_may_differ_in_structure(name, chunk_size):
    snapshot = make_snapshot(HOSTILE_BY_NAME[name], "mse")
    kernel = build_exact_kernel(snapshot, chunk_size=chunk_size)
    assert relative(kernel.matrix, reference_of(snapshot, "mse")["kernel"]) < TOLERANCE
    assert kernel.rung == "layers"


def test_outputs_that_couple_samples_are_found():
    def centred(m, x):
        outputs = m.b(m.a(x).tanh())
        return outputs - outputs.mean(0, keepdim=True)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Lambda(centred, a=nn.Linear(4, 5), b=nn.Linear(5, 3)).double()
        snapshot = place_snapshot(model, torch.randn(5, 4).double(), torch.zeros(5, 3).double())
    with pytest.warns(KernelWarning, match="'a', 'b'"):
        kernel = build_exact_kernel(snapshot)
    expected = build_kernel(snapshot).to_dense()
    assert relative(kernel.matrix, expected) < TOLERANCE
    assert kernel.n_matvecs == kernel.n
    assert "columns are products" in kernel.status


def test_outputs_without_a_second_dimension():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Lambda(lambda m, x: m.a(x).tanh().sum(1), a=nn.Linear(4, 3)).double()
        x = torch.randn(5, 4).double()
    snapshot = place_snapshot(model, x, torch.zeros(5).double())
    kernel = build_exact_kernel(snapshot)
    assert kernel.n == 5
    assert relative(kernel.matrix, reference_of(snapshot, "mse")["kernel"]) < TOLERANCE


def test_a_function_that_is_differentiable_once_is_enough_or_refused():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Lambda(
            lambda m, x: m.b(OnceSquare.apply(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3)
        ).double()
        x = torch.randn(5, 4).double()
    snapshot = place_snapshot(model, x, torch.zeros(5, 3).double())
    try:
        kernel = build_exact_kernel(snapshot)
    except DifferentiationError:
        return
    assert relative(kernel.matrix, reference_of(snapshot, "mse")["kernel"]) < TOLERANCE


def test_language_models_that_compute_norms_in_float32():
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_llama()
    tokens = {"input_ids": torch.randint(0, 5, (2, 3), generator=generator)}
    labels = torch.tensor([[0, 1, -100], [4, 2, 2]])
    snapshot = place_snapshot(model, tokens, labels)
    kernel = build_exact_kernel(snapshot, residual="nll")
    # The reference computes the norms in float32 too: a few roundings remain between the two.
    assert relative(kernel.matrix, reference_of(snapshot, "nll")["kernel"]) < 1e-5
    assert "samples" not in kernel.orders.values()
    assert kernel.noise < 1e-5
