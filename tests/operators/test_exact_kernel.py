"""The exact kernel against dense float64 references, over the zoo."""

import pytest
import torch
from torch import nn

from spectralshell.operators import build_exact_kernel, build_kernel
from spectralshell.operators.layers.assembly import contract_layers
from spectralshell.operators.layers.units import GRADIENTS, PAIRS
from spectralshell.operators.problem import pose_problem
from spectralshell.snapshots import Snapshot
from tests.device import place_snapshot
from tests.fingerprints import model_fingerprint
from tests.zoo import CASES, CASES_BY_NAME, RESIDUALS, dense_reference, make_snapshot

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative Frobenius norm; what the package promises. Float64 comes out near 1e-15."""

SAME = 1e-12
"""Float64 sums in another order."""

BY_SAMPLES = {
    "gru": {f"recurrent.{part}_l0" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    "encoder layer": {
        f"encoder.self_attn.{part}"
        for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    },
    "weight norm": {f"0.parametrizations.weight.original{i}" for i in (0, 1)},
}
"""What has no rule of its own: everything else in the zoo must be contracted by layers."""

case_names = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().cpu(), b.cpu()
    return float((a - b).norm() / b.norm())


def reference_of(snapshot: Snapshot, kind: str) -> dict[str, torch.Tensor]:
    return dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, kind)


@case_names
@dtypes
@pytest.mark.parametrize("kind", RESIDUALS)
def test_the_kernel_and_its_layers_equal_the_dense_ones(case, kind, dtype):
    snapshot = make_snapshot(case, kind, dtype)
    reference = reference_of(snapshot, kind)
    kernel = build_exact_kernel(snapshot, residual=RESIDUALS[kind], layers="module")
    assert kernel.rung == "layers"
    assert kernel.dtype == kernel.matrix.dtype == dtype
    assert kernel.n_matvecs == 0
    assert relative(kernel.matrix, reference["kernel"]) < TOLERANCE[dtype]
    assert relative(kernel.residual_vector, reference["error"]) < TOLERANCE[dtype]
    assert torch.equal(kernel.matrix, kernel.matrix.T)
    total = sum(layer.double() for layer in kernel.layers.values())
    assert relative(total, kernel.to_dense()) < TOLERANCE[dtype]
    named = {name for name, order in kernel.orders.items() if order == "samples"}
    assert named == BY_SAMPLES.get(case["name"], set())


@case_names
def test_float32_knows_its_error(case):
    for kind in ("mse", "nll"):
        snapshot = make_snapshot(case, kind, torch.float32)
        reference = reference_of(snapshot, kind)["kernel"]
        kernel = build_exact_kernel(snapshot, residual=kind)
        error = torch.linalg.matrix_norm(kernel.to_dense().cpu() - reference, 2)
        assert float(error / torch.linalg.matrix_norm(reference, 2)) <= kernel.noise < 1e-5


@case_names
def test_every_parameter_has_its_own_kernel(case):
    snapshot = make_snapshot(case, "callable")
    reference = reference_of(snapshot, "callable")
    kernel = build_exact_kernel(snapshot, residual=RESIDUALS["callable"], layers="parameter")
    trainable = [p for p in snapshot.model.parameters() if p.requires_grad]
    columns = reference["jacobian"].split([p.numel() for p in trainable], dim=1)
    assert tuple(kernel.layers) == kernel.parameter_names
    scale = reference["kernel"].norm()
    for part, found in zip(columns, kernel.layers.values(), strict=True):
        assert float((found.cpu() - part @ part.T).norm()) <= SAME * float(scale)


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["mse", "nll", "callable"])
@pytest.mark.parametrize(
    "name", ["mlp", "residual cnn", "tied language model", "causal attention", "weight norm"]
)
def test_chunks_change_nothing(name, kind, chunk_size):
    snapshot = make_snapshot(CASES_BY_NAME[name], kind)
    whole = build_exact_kernel(snapshot, residual=RESIDUALS[kind])
    parts = build_exact_kernel(snapshot, residual=RESIDUALS[kind], chunk_size=chunk_size)
    assert relative(parts.matrix, whole.matrix) < SAME
    assert parts.rung == "layers"
    assert parts.orders == whole.orders
    assert parts.chunk_size == (None if chunk_size >= parts.n_samples else chunk_size)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", ["residual cnn", "causal attention", "tied language model", "gru"])
def test_groups_of_layers_change_nothing(name, chunk_size):
    snapshot = make_snapshot(CASES_BY_NAME[name])
    problem = pose_problem(snapshot)
    evaluation = problem.evaluate(chunk_size)
    found = []
    with problem.function.guard(), problem.function.installed():
        for max_bytes in (1, 10**4, 10**9):  # the first holds one layer at a time
            found.append(contract_layers(evaluation, label_of=lambda name: "", max_bytes=max_bytes))
    expected = reference_of(snapshot, "mse")["kernel"]
    for kernels in found:
        assert relative(kernels.total(), expected) < SAME
        assert kernels.orders == found[0].orders


def test_memory_that_does_not_suffice_is_an_error():
    with pytest.raises(ValueError, match="max_memory: the exact kernel of n = 18 entries needs"):
        build_exact_kernel(make_snapshot(CASES_BY_NAME["mlp"]), max_memory=1)


@pytest.mark.parametrize("left_out", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("width", [4, 40], ids=["gradients", "pairs"])
def test_a_sample_without_a_label_may_be_a_chunk_of_its_own(width, left_out):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)).double()
        inputs = torch.randn(3, 2, width).double()
    labels = torch.tensor([[0, 1], [2, -100], [1, 1]])
    labels[left_out] = -100
    snapshot = place_snapshot(model, inputs, labels)
    kernel = build_exact_kernel(snapshot, residual="nll", chunk_size=1)
    assert relative(kernel.matrix, reference_of(snapshot, "nll")["kernel"]) < SAME
    assert kernel.orders["0.weight"] == (GRADIENTS if width == 4 else PAIRS)


@pytest.mark.parametrize("name", ["mlp", "cnn batchnorm", "gru"])
def test_selected_parameters_have_their_own_kernel(name):
    snapshot = make_snapshot(CASES_BY_NAME[name])
    for expression in ("bias", "weight", r"^(0\.|recurrent)"):
        kernel = build_exact_kernel(snapshot, parameters=expression)
        expected = build_kernel(snapshot, parameters=expression)
        assert kernel.parameter_names == expected.parameter_names
        assert relative(kernel.matrix, expected.to_dense()) < SAME


def test_a_float32_model_is_measured_in_float64_on_request():
    snapshot = make_snapshot(CASES_BY_NAME["residual cnn"], dtype=torch.float32)
    kernel = build_exact_kernel(snapshot, dtype="float64")
    assert relative(kernel.matrix, reference_of(snapshot, "mse")["kernel"]) < SAME
    assert kernel.noise < 1e-14


def test_half_precision_is_raised_to_float32():
    snapshot = make_snapshot(CASES_BY_NAME["mlp"], dtype=torch.bfloat16)
    kernel = build_exact_kernel(snapshot)
    assert "measured in float32" in kernel.status
    assert (
        relative(kernel.matrix, reference_of(snapshot, "mse")["kernel"]) < TOLERANCE[torch.float32]
    )


def test_products_are_those_of_the_matrix_free_kernel():
    snapshot = make_snapshot(CASES_BY_NAME["groupnorm cnn"], "brier")
    exact = build_exact_kernel(snapshot, residual="brier")
    free = build_kernel(snapshot, residual="brier")
    block = torch.randn(exact.n, 3, generator=torch.Generator().manual_seed(1)).double()
    assert relative(exact.matmat(block), free.matmat(block)) < SAME
    assert relative(exact.matvec(block[:, 0]), free.matvec(block[:, 0])) < SAME
    assert torch.equal(exact.residual_vector, free.residual_vector)
    for name in ("n", "n_rows", "n_samples", "n_parameters", "parameter_names", "residual"):
        assert getattr(exact, name) == getattr(free, name)
    with pytest.raises(ValueError, match=r"shape \(5,\), expected \(12,\)"):
        exact.matvec(torch.ones(5))


@pytest.mark.parametrize("name", ["mlp", "cnn batchnorm", "gru", "checkpointed", "weight norm"])
def test_the_model_is_left_alone(name):
    snapshot = make_snapshot(CASES_BY_NAME[name], dtype=torch.float32)
    before = model_fingerprint(snapshot.model)
    build_exact_kernel(snapshot, chunk_size=2, layers="module").noise  # noqa: B018  it is computed
    assert model_fingerprint(snapshot.model) == before


@pytest.mark.parametrize("call", range(5))
def test_the_model_is_left_alone_after_an_exception(call):
    calls = iter(range(100))

    class Interrupted(nn.Linear):
        def forward(self, x):
            if next(calls) == call:
                raise KeyboardInterrupt
            return super().forward(x)

    x = torch.ones(4, 3)
    model = nn.Sequential(Interrupted(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    snapshot = place_snapshot(model, x, torch.zeros(4, 3))
    before = model_fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        build_exact_kernel(snapshot)
    assert model_fingerprint(model) == before


def test_building_draws_nothing_and_repeats_itself():
    snapshot = make_snapshot(CASES_BY_NAME["residual cnn"], dtype=torch.float32)
    first, second = (build_exact_kernel(snapshot, layers="module") for _ in range(2))
    assert torch.equal(first.matrix, second.matrix)
    assert first.noise == second.noise
    assert list(first.layers) == list(second.layers)


def test_a_closed_kernel_keeps_its_matrix_and_refuses_its_noise():
    with build_exact_kernel(make_snapshot(CASES_BY_NAME["mlp"], dtype=torch.float32)) as kernel:
        pass
    assert kernel.matvec(kernel.residual_vector).shape == (kernel.n,)
    with pytest.raises(ValueError, match="closed before its noise was read"):
        kernel.noise  # noqa: B018  reading it raises


def test_zero_inputs_give_a_zero_kernel():
    model = nn.Linear(3, 2, bias=False)
    kernel = build_exact_kernel(place_snapshot(model, torch.zeros(4, 3), torch.zeros(4, 2)))
    assert float(kernel.matrix.abs().max()) == 0.0
    assert kernel.status == "zero Jacobian of weight"
    assert kernel.noise > 0.0


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.get("meta")], ids=lambda case: case["name"]
)
@pytest.mark.parametrize("kind", ["nll", "callable"])
def test_kernels_are_built_without_values(case, kind):
    snapshot = make_snapshot(case, kind, torch.float32)
    kernel = build_exact_kernel(
        snapshot, residual=RESIDUALS[kind], device="meta", layers="module", chunk_size=2
    )
    assert kernel.rung == "layers"
    assert kernel.matrix.device.type == "meta"
    assert kernel.matrix.shape == (kernel.n, kernel.n)
    assert kernel.noise > 0.0


def test_what_does_not_depend_on_the_parameters_is_named():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    snapshot = place_snapshot(Detached(3, 2), torch.ones(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="does not depend on the selected parameters"):
        build_exact_kernel(snapshot)
