"""The matrix-free kernel against dense float64 references, over the zoo."""

import pytest
import torch

from spectralshell.operators import build_kernel
from tests.device import place_snapshot
from tests.zoo import (
    CASES,
    CASES_BY_NAME,
    RESIDUALS,
    build_model,
    build_on_rungs,
    dense_reference,
    make_inputs,
    make_snapshot,
    make_targets,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Relative to the largest entry norm; a few hundred roundings of the respective precision."""

SMALL_MODELS = ["mlp", "tied language model", "cnn batchnorm", "weight norm"]
# Tracing takes a second for the larger members: the whole ladder on two kinds, the rung that all
# members share on the others.
LADDER_OF = {kind: ["double-vjp"] for kind in ("mse labels", "brier", "cross-entropy", "callable")}
case_names = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.cpu(), b.cpu()
    return float((a - b).norm() / b.norm())


@case_names
@dtypes
@pytest.mark.parametrize("kind", RESIDUALS)
def test_products_equal_the_dense_kernel(case, kind, dtype):
    snapshot = make_snapshot(case, kind, dtype)
    reference = dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, kind)
    kernel = build_on_rungs(snapshot, residual=RESIDUALS[kind], rungs=LADDER_OF.get(kind))
    block = torch.randn(kernel.n, 3, generator=torch.Generator().manual_seed(1)).double()
    expected = reference["kernel"] @ block
    assert relative(kernel.matmat(block), expected) < TOLERANCE[dtype]
    assert relative(kernel.matvec(block[:, 0]), expected[:, 0]) < TOLERANCE[dtype]
    assert relative(kernel.residual_vector, reference["error"]) < TOLERANCE[dtype]
    assert kernel.residual_vector.dtype == torch.float64
    assert kernel.n_matvecs == 4
    if kind not in LADDER_OF:
        assert kernel.rung == case.get("rung", "linearize")


@pytest.mark.parametrize("rung", ["linearize", "double-vjp", "jvp"])
@pytest.mark.parametrize("name", ["mlp", "tied language model", "cnn batchnorm", "checkpointed"])
def test_every_rung_gives_the_same_kernel(name, rung):
    snapshot = make_snapshot(CASES_BY_NAME[name], "brier")
    reference = dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, "brier")
    kernel = build_on_rungs(snapshot, residual="brier", rungs=[rung])
    assert kernel.rung == rung
    assert relative(kernel.to_dense(), reference["kernel"]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["nll", "mse", "callable"])
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_chunks_change_nothing(name, kind, chunk_size):
    snapshot = make_snapshot(CASES_BY_NAME[name], kind)
    reference = dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, kind)
    kernel = build_kernel(snapshot, residual=RESIDUALS[kind], chunk_size=chunk_size)
    assert relative(kernel.to_dense(), reference["kernel"]) < TOLERANCE[torch.float64]
    assert relative(kernel.residual_vector, reference["error"]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("kind", ["mse", "mse labels", "brier", "nll", "callable"])
def test_error_moves_by_minus_the_kernel_along_its_velocity(kind):
    kernel = build_kernel(make_snapshot(CASES_BY_NAME["mlp"], kind), residual=RESIDUALS[kind])
    rate = kernel.error_jvp(kernel.velocity())
    assert relative(rate, -kernel.matvec(kernel.residual_vector)) < 1e-10


@pytest.mark.parametrize("kind", ["brier", "cross-entropy", "nll", "mse labels"])
@pytest.mark.parametrize("name", ["mlp", "tied language model"])
def test_error_jvp_is_the_derivative_of_the_error(name, kind):
    case = CASES_BY_NAME[name]
    kernel = build_kernel(make_snapshot(case, kind), residual=RESIDUALS[kind])
    velocity = kernel.velocity()
    errors = []
    step = 1e-5  # cube root of eps: truncation and rounding balance near 1e-10
    for sign in (1, -1):
        model = build_model(case)
        with torch.no_grad():
            for parameter, rate in zip(model.parameters(), velocity, strict=True):
                parameter.add_(sign * step * rate)
        moved = dense_reference(model, make_inputs(case), make_targets(case, kind), kind)
        errors.append(moved["error"])
    difference = (errors[0] - errors[1]) / (2 * step)
    assert relative(kernel.error_jvp(velocity), difference) < 1e-7


def test_cross_entropy_dissipates_its_own_loss():
    case = CASES_BY_NAME["mlp"]
    snapshot = make_snapshot(case, "cross-entropy")
    kernel = build_kernel(snapshot, residual="cross-entropy")
    model = build_model(case)
    loss = torch.nn.functional.cross_entropy(model(snapshot.inputs), snapshot.targets)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    for velocity, slope in zip(kernel.velocity(), gradient, strict=True):
        torch.testing.assert_close(velocity, -slope)
    e = kernel.residual_vector
    assert float(e @ kernel.matvec(e)) == pytest.approx(
        float(sum((g**2).sum() for g in gradient)), rel=1e-10
    )


def test_training_velocity_of_nll_descends_the_mean_loss():
    case = CASES_BY_NAME["tied language model"]
    snapshot = make_snapshot(case, "nll")
    model = build_model(case)
    loss = torch.nn.functional.cross_entropy(
        model(snapshot.inputs).flatten(0, 1), snapshot.targets.flatten()
    )
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    kernel = build_kernel(snapshot, residual="nll")
    for velocity, slope in zip(kernel.training_velocity(), gradient, strict=True):
        torch.testing.assert_close(velocity, -slope)


@pytest.mark.parametrize("kind", ["mse", "nll", "callable"])
def test_duplicated_data_leave_the_spectrum_unchanged(kind):
    case = CASES_BY_NAME["mlp"]
    inputs, targets = make_inputs(case), make_targets(case, kind)
    model = build_model(case)
    once = build_kernel(place_snapshot(model, inputs, targets), residual=RESIDUALS[kind])
    twice = build_kernel(
        place_snapshot(model, torch.cat([inputs, inputs]), torch.cat([targets, targets])),
        residual=RESIDUALS[kind],
    )
    few = torch.linalg.eigvalsh(once.to_dense())
    many = torch.linalg.eigvalsh(twice.to_dense())
    assert relative(many[-len(few) :], few) < 1e-10
    assert float(many[: -len(few)].abs().max()) < 1e-10 * float(few[-1])
    assert float(once.residual_vector.norm()) == pytest.approx(
        float(twice.residual_vector.norm()), rel=1e-12
    )


@pytest.mark.parametrize("selection", [r"^2\.", lambda name: name.startswith("2.")])
def test_parameters_select_a_layer_s_own_kernel(selection):
    snapshot = make_snapshot(CASES_BY_NAME["mlp"])
    kernel = build_kernel(snapshot, parameters=selection)
    reference = dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, "mse")
    layer = reference["jacobian"][:, -18:]
    assert kernel.parameter_names == ("2.weight", "2.bias")
    assert kernel.n_parameters == 18
    assert relative(kernel.to_dense(), layer @ layer.T) < TOLERANCE[torch.float64]


def test_layer_kernels_add_up():
    snapshot = make_snapshot(CASES_BY_NAME["mlp"])
    layers = [build_kernel(snapshot, parameters=p).to_dense() for p in (r"^0\.", r"^2\.")]
    assert relative(sum(layers), build_kernel(snapshot).to_dense()) < TOLERANCE[torch.float64]


def test_tied_parameters_count_once():
    kernel = build_kernel(make_snapshot(CASES_BY_NAME["tied language model"], "nll"))
    assert kernel.parameter_names == ("embedding.weight", "mix.weight", "mix.bias")
    assert kernel.n_parameters == 40
    by_alias = build_kernel(
        make_snapshot(CASES_BY_NAME["tied language model"], "nll"), parameters="head"
    )
    assert by_alias.parameter_names == ("embedding.weight",)


def test_frozen_parameters_do_not_count():
    kernel = build_kernel(make_snapshot(CASES_BY_NAME["two inputs, frozen layer"]))
    assert not any(name.startswith("left") for name in kernel.parameter_names)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_measured_in_float32(half):
    snapshot = make_snapshot(CASES_BY_NAME["mlp"], dtype=half)
    kernel = build_kernel(snapshot)
    reference = dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, "mse")
    assert kernel.dtype == torch.float32
    assert "measured in float32" in kernel.status
    assert relative(kernel.to_dense(), reference["kernel"]) < TOLERANCE[torch.float32]


def test_dtype_raises_the_precision_of_a_float32_model():
    snapshot = make_snapshot(CASES_BY_NAME["mlp"], dtype=torch.float32)
    reference = dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, "mse")
    kernel = build_kernel(snapshot, dtype="float64")
    assert relative(kernel.to_dense(), reference["kernel"]) < TOLERANCE[torch.float64]


def test_adjoints_fit_together():
    kernel = build_kernel(make_snapshot(CASES_BY_NAME["mlp"]))
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(kernel.n, generator=generator).double()
    t = [torch.randn(p.shape, generator=generator).double() for p in kernel.rmatvec(u)]
    pulled = kernel.rmatvec(u)
    expected = sum(float((a.cpu() * b).sum()) for a, b in zip(pulled, t, strict=True))
    assert float(u @ kernel.jvp(t).cpu()) == pytest.approx(expected, rel=1e-12)


def test_a_rung_that_fails_is_refused_with_its_reason():
    kernel = build_kernel(make_snapshot(CASES_BY_NAME["weight norm"]))
    assert kernel.rung == "double-vjp"
    assert "forward AD" in kernel.refused["linearize"]


def test_a_snapshot_is_measured_at_its_own_state():
    case = CASES_BY_NAME["checkpointed"]
    snapshot = make_snapshot(case)
    before = build_kernel(snapshot).to_dense()
    with torch.no_grad():
        for parameter in snapshot.model.parameters():
            parameter.mul_(0.5)
    assert relative(build_kernel(snapshot).to_dense(), before) < 1e-14


def test_a_kernel_survives_training_of_the_model():
    # Checkpointing reads the model again during the backward pass.
    for name in ("checkpointed", "mlp"):
        snapshot = make_snapshot(CASES_BY_NAME[name])
        kernel = build_kernel(snapshot)
        before = kernel.to_dense()
        with torch.no_grad():
            for parameter in snapshot.model.parameters():
                parameter.mul_(0.5)
        assert kernel.jacobian.reads_model is (name == "checkpointed")
        assert relative(kernel.to_dense(), before) < 1e-14


def test_a_closed_kernel_refuses():
    with build_kernel(make_snapshot(CASES_BY_NAME["mlp"])) as kernel:
        kernel.matvec(kernel.residual_vector)
    with pytest.raises(ValueError, match="closed"):
        kernel.matvec(kernel.residual_vector)


def test_operands_of_another_length_are_named():
    kernel = build_kernel(make_snapshot(CASES_BY_NAME["mlp"]))
    with pytest.raises(ValueError, match=r"shape \(5,\), expected \(18,\)"):
        kernel.matvec(torch.ones(5))


@dtypes
@pytest.mark.parametrize("kind", ["mse", "callable"])
@pytest.mark.parametrize("name", ["layernorm mlp", "custom function", "gpt-neox", "residual cnn"])
def test_noise_covers_the_error_of_the_products(name, kind, dtype):
    snapshot = make_snapshot(CASES_BY_NAME[name], kind, dtype)
    reference = dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, kind)["kernel"]
    kernel = build_on_rungs(snapshot, residual=RESIDUALS[kind], rungs=["double-vjp"])
    assert kernel.noise >= {torch.float64: 4e-15, torch.float32: 6e-7}[dtype]
    error = torch.linalg.matrix_norm(kernel.to_dense().cpu() - reference, 2)
    assert float(error / torch.linalg.matrix_norm(reference, 2)) <= kernel.noise


def test_noise_grows_with_the_rounding_of_the_model():
    class Rapid(torch.nn.Linear):
        def forward(self, x):
            return torch.sin(300.0 * super().forward(x))  # the phase loses three digits

    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        snapshot = place_snapshot(Rapid(4, 2), x, torch.zeros(6, 2))
    coarse, fine = (build_kernel(snapshot, dtype=dtype) for dtype in ("float32", "float64"))
    error = torch.linalg.matrix_norm(coarse.to_dense() - fine.to_dense(), 2)
    relative_error = float(error / torch.linalg.matrix_norm(fine.to_dense(), 2))
    assert 6e-6 < relative_error <= coarse.noise


class Greedy(torch.nn.Linear):
    """Has memory for two samples."""

    def forward(self, x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_chunks_take_over_when_memory_runs_out():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    model = Greedy(4, 2, dtype=torch.float64)
    kernel = build_kernel(place_snapshot(model, x, torch.zeros(9, 2)))
    assert kernel.chunk_size == 2
    assert kernel.status == "memory ran out: computed in chunks of 2 samples"
    gram = (x @ x.T + 1) / 9
    expected = torch.kron(gram, torch.eye(2, dtype=torch.float64))
    assert relative(kernel.to_dense(), expected) < TOLERANCE[torch.float64]


def test_no_memory_for_one_sample_is_an_error():
    class Hungry(torch.nn.Linear):
        def forward(self, x):
            raise RuntimeError("[enforce fail] not enough memory: you tried to allocate")

    with pytest.raises(MemoryError, match="a single sample"):
        build_kernel(place_snapshot(Hungry(4, 2), torch.ones(3, 4), torch.zeros(3, 2)))


def test_blocks_fall_back_on_a_loop_where_vmap_has_no_rule():
    class Looped(torch.autograd.Function):
        """Twice differentiable, but opaque to vmap."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            if grad.sum().item() is None:  # looks at a value, which vmap forbids
                return None
            return 2 * x * grad

    class Squares(torch.nn.Linear):
        def forward(self, x):
            return Looped.apply(super().forward(x))

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    snapshot = place_snapshot(Squares(3, 2, dtype=torch.float64), x, torch.zeros(4, 2))
    reference = dense_reference(snapshot.model, x, snapshot.targets, "mse")["kernel"]
    kernel = build_kernel(snapshot)
    assert relative(kernel.to_dense(), reference) < TOLERANCE[torch.float64]
    assert kernel.blocks_work is False


def test_zero_error_and_zero_kernel_are_ordinary():
    model = torch.nn.Linear(3, 2, bias=False)
    kernel = build_kernel(place_snapshot(model, torch.zeros(4, 3), torch.zeros(4, 2)))
    assert float(kernel.residual_vector.norm()) == 0.0
    assert float(kernel.to_dense().abs().max()) == 0.0


def test_probes_are_counted_apart_and_builds_are_deterministic():
    first, second = (build_kernel(make_snapshot(CASES_BY_NAME["mlp"])) for _ in range(2))
    assert (first.n_matvecs, first.n_probes, second.n_probes) == (0, 11, 2)
    assert first.forward_flops == second.forward_flops > 0
    assert torch.equal(first.to_dense(), second.to_dense())
    assert first.n_matvecs == first.n
