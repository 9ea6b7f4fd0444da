"""Where one solver cannot differentiate a model the other does, and what none can is named."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spectralshell import ShellEnergyEstimator, ShellFluxEstimator
from spectralshell.measurements.solver import carry_out, plan_spectrum
from spectralshell.operators import build_exact_kernel, build_kernel, costs
from spectralshell.operators.jacobian.ladder import DifferentiationError
from spectralshell.operators.survey import survey_kernel
from spectralshell.snapshots import Snapshot
from spectralshell.statuses import solved_by
from tests.device import place_snapshot
from tests.hostile_models import Lambda

AMPLE = 10**12

TOLERANCE = 1e-8
"""Of energies and kernels from differences of order h⁴ with h = 1e-4, good to about 1e-11."""

STEP = 1e-4

UNABLE = solved_by("exact", unable="lanczos")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def ctc(m, x):
    """The loss of each sequence."""
    logs = m.b(torch.tanh(m.a(x))).log_softmax(-1).transpose(0, 1)
    n, steps = x.shape[:2]
    labels = torch.tensor([[1, 2]]).expand(n, 2)
    lengths = torch.full((n,), steps), torch.full((n,), 2)
    return F.ctc_loss(logs, labels, *lengths, reduction="none")[:, None]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(n):
    return torch.randint(0, 6, (n, 4), generator=torch.Generator().manual_seed(1))


def bag(mode, **more):
    model = Lambda(
        lambda m, t: m.b(m.e(t)), e=nn.EmbeddingBag(6, 3, mode=mode, **more), b=nn.Linear(3, 2)
    )
    return model, tokens(20)


ONCE = {
    "bag sum": lambda: bag("sum", sparse=True),
    "bag mean": lambda: bag("mean"),
    "bag max": lambda: bag("max"),
    "once differentiable": lambda: (
        Lambda(lambda m, x: m.b(Once.apply(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)),
        draw(20, 3),
    ),
    "distances": lambda: (
        Lambda(
            lambda m, x: m.b(torch.cdist(m.a(x), m.c, p=1.0)),
            a=nn.Linear(3, 3),
            b=nn.Linear(4, 2),
            c=nn.Parameter(torch.randn(4, 3)),
        ),
        draw(20, 3),
    ),
    "ctc": lambda: (Lambda(ctc, a=nn.Linear(3, 4), b=nn.Linear(4, 4)), draw(20, 6, 3)),
}
"""Models with a first derivative and no second one, nor forward mode."""


def make(name):
    torch.manual_seed(0)
    model, inputs = ONCE[name]()
    return model.double().eval(), inputs


def snapshot_of(model, inputs):
    outputs = model(inputs.clone()).detach()
    return place_snapshot(model, inputs, torch.ones_like(outputs))


def kernel_by_differences(model, inputs):
    model, columns = copy.deepcopy(model), []
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for i in range(flat.numel()):
                own = float(flat[i])

                def at(shift, flat=flat, i=i, own=own):
                    flat[i] = own + shift
                    outputs = model(inputs.clone()).reshape(-1)
                    flat[i] = own
                    return outputs

                near = (at(STEP) - at(-STEP)) / (2 * STEP)
                far = (at(2 * STEP) - at(-2 * STEP)) / (4 * STEP)
                columns.append((4 * near - far) / 3)
    jacobian = torch.stack(columns, 1)
    return jacobian @ jacobian.T / len(inputs)


@pytest.fixture
def cheap_lanczos(monkeypatch):
    """As for thousands of outputs."""
    monkeypatch.setattr(costs, "_lanczos_cost", lambda *sizes: 0.0)


@pytest.mark.usefixtures("cheap_lanczos")
@pytest.mark.parametrize("name", ONCE)
def test_auto_takes_the_solver_that_can(name):
    model, inputs = make(name)
    snapshot = snapshot_of(model, inputs)
    estimator = ShellEnergyEstimator(solver="auto").fit([snapshot])
    plan = estimator.plan_.iloc[0]
    assert (plan["solver"], plan["unable"], estimator.solver_) == ("exact", "lanczos", "exact")
    assert plan["lanczos_cost"] < plan["exact_cost"]
    assert all(UNABLE in status for status in estimator.shells_["status"])
    kernel = kernel_by_differences(model, inputs)
    with build_exact_kernel(snapshot) as exact:
        difference = exact.to_dense().cpu() - kernel
    assert float(difference.norm()) <= TOLERANCE * float(kernel.norm())
    assert estimator.lambda_max_ == pytest.approx(
        float(torch.linalg.eigvalsh(kernel)[-1]), rel=1e-8
    )
    pairs = ShellEnergyEstimator(solver="auto").eigenpairs([snapshot], k=2)[0]
    assert pairs.eigenvalues[0] == pytest.approx(estimator.lambda_max_)


def test_a_solver_that_was_asked_for_is_not_exchanged():
    snapshot = snapshot_of(*make("bag mean"))
    with pytest.raises(DifferentiationError, match=r"'e' \(EmbeddingBag\).*solver='exact'"):
        ShellEnergyEstimator(solver="lanczos").fit([snapshot])
    with pytest.raises(DifferentiationError, match="build_exact_kernel"):
        build_kernel(snapshot)
    assert ShellEnergyEstimator(solver="exact").fit([snapshot]).plan_["unable"].tolist() == [None]


@pytest.mark.usefixtures("cheap_lanczos")
def test_the_other_solver_must_fit():
    model, inputs = bag("mean")
    snapshot = snapshot_of(model.double(), inputs.repeat(10, 1))
    with pytest.raises(DifferentiationError, match="EmbeddingBag") as caught:
        ShellEnergyEstimator(solver="auto", n_steps=1, max_memory="1 MB").fit([snapshot])
    assert "tried as well" not in str(caught.value)


@pytest.mark.usefixtures("cheap_lanczos")
def test_where_both_fail_both_are_named():
    estimator = ShellFluxEstimator(solver="auto")
    with pytest.raises(DifferentiationError, match=r"EmbeddingBag.*was tried as well"):
        estimator.fit([snapshot_of(*make("bag mean"))])


@pytest.fixture
def plan():
    footprint = survey_kernel(snapshot_of(*make("once differentiable"))).footprint
    return plan_spectrum(footprint, AMPLE, n_steps=10)


@pytest.mark.parametrize("first", ["exact", "lanczos"])
def test_either_solver_stands_in_for_the_other(plan, first):
    second = {"exact": "lanczos", "lanczos": "exact"}[first]
    plan = dataclasses.replace(plan, solver=first, others=(second,))

    def measure(plan):
        if plan.solver == first:
            raise DifferentiationError("not with this one")
        return plan

    used = carry_out(plan, measure)
    assert (used.solver, used.unable, used.others) == (second, first, ())
    assert used.status == solved_by(second, unable=first)
    assert used.as_row()["unable"] == first


@pytest.mark.parametrize("error", [ValueError("shapes"), RuntimeError("mine"), MemoryError()])
def test_other_errors_are_not_tried_again(plan, error):
    tried = []

    def measure(plan):
        tried.append(plan.solver)
        raise error

    with pytest.raises(type(error)):
        carry_out(plan, measure)
    assert len(tried) == 1


def layers(forward):
    torch.manual_seed(0)
    return Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()


HOPELESS = {
    "heaviside": (
        lambda m, x: m.b(torch.heaviside(m.a(x), x.new_zeros(()))),
        "any solver.*heaviside",
    ),
    "reentrant checkpoint": (
        lambda m, x: m.b(checkpoint(torch.tanh, m.a(x), use_reentrant=True)),
        "any solver.*use_reentrant",
    ),
    "reentrant checkpoint of the inputs": (
        lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=True)),
        "set use_reentrant=False",
    ),
    "written to while recorded": (
        lambda m, x: (m.a.weight.mul_(1.0), m.b(m.a(x)))[1],
        "not where gradients are recorded.*leaf",
    ),
    "another dtype inside": (
        lambda m, x: m.b(m.a(x).to(torch.float32)),
        "dtype of its weights",
    ),
    "shapes": (lambda m, x: m.a(m.b(x)), "failed on the inputs of shape"),
}


@pytest.mark.parametrize("solver", ["auto", "exact", "lanczos"])
@pytest.mark.parametrize("name", HOPELESS)
def test_what_no_solver_can_is_an_error_that_names_it(name, solver):
    forward, message = HOPELESS[name]
    snapshot = place_snapshot(layers(forward), draw(5, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match=message):
        ShellEnergyEstimator(solver=solver, n_steps=3).fit([snapshot])


def test_a_float32_body_with_a_float64_head_is_measured_in_float64():
    torch.manual_seed(0)
    body, head = nn.Linear(3, 4), nn.Linear(4, 2).double()
    model = Lambda(lambda m, x: m.b(torch.tanh(m.a(x)).double()), a=body, b=head)
    x = draw(5, 3).float()
    kernel = kernel_by_differences(copy.deepcopy(model).double(), x.double())
    snapshot = place_snapshot(model, x, torch.zeros(5, 2))
    for build in (build_kernel, build_exact_kernel):
        difference = build(snapshot).to_dense().cpu() - kernel
        assert float(difference.norm()) <= TOLERANCE * float(kernel.norm())


REFUSED = {
    "sparse": (lambda x: x.to_sparse(), "inputs: .*sparse_coo.*to_dense"),
    "meta": (lambda x: x.to("meta"), "inputs: .*meta device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_without_values_or_samples_are_refused(name):
    change, message = REFUSED[name]
    model = layers(lambda m, x: m.b(torch.tanh(m.a(x))))
    snapshot = place_snapshot(model, draw(5, 3), torch.zeros(5, 2))
    snapshot.inputs = change(snapshot.inputs)
    with pytest.raises(ValueError, match=message):
        survey_kernel(snapshot)


def test_declared_parameters_take_their_values_from_the_state():
    forward = layers(lambda m, x: m.b(torch.tanh(m.a(x))))
    state = copy.deepcopy(forward.state_dict())
    declared = copy.deepcopy(forward).to("meta")
    x, y = draw(5, 3), torch.zeros(5, 2)
    expected = build_exact_kernel(place_snapshot(forward, x, y, state=state)).to_dense()
    found = build_exact_kernel(Snapshot(declared, x, y, state=state)).to_dense()
    assert torch.equal(found.cpu(), expected.cpu())
    assert all(p.is_meta for p in declared.parameters())
    with pytest.raises(ValueError, match=r"'a\.weight' is on the meta device"):
        build_kernel(Snapshot(declared, x, y))


@pytest.mark.parametrize("scale", [1e100, 1e-100])
@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_rates_whose_squares_leave_float64_are_refused(scale, solver):
    model = layers(lambda m, x: m.b(torch.tanh(m.a(x))) * scale)
    snapshot = place_snapshot(model, draw(5, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"rates near 1e[+-](199|2\d\d)"):
        ShellEnergyEstimator(solver=solver, n_steps=3).fit([snapshot])


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_rates_near_the_limit_are_right(solver):
    scale = 1e60
    model = layers(lambda m, x: m.b(torch.tanh(m.a(x))))
    large = layers(lambda m, x: m.b(torch.tanh(m.a(x))) * scale)
    x, y = draw(5, 3), torch.zeros(5, 2)
    small = ShellEnergyEstimator(solver=solver, n_steps=10).fit([place_snapshot(model, x, y)])
    found = ShellEnergyEstimator(solver=solver, n_steps=10).fit([place_snapshot(large, x, y)])
    assert found.lambda_max_ == pytest.approx(small.lambda_max_ * scale**2, rel=1e-12)
    total = small.shells_["energy"].sum() * scale**2
    assert found.shells_["energy"].sum() == pytest.approx(total, rel=1e-12)
