"""Models that differentiate inside their forward pass, against differences of plain calls."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, grad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap
from torch.func import grad as func_grad

from spectralshell import ShellEnergyEstimator, ShellFluxEstimator
from spectralshell.operators import build_exact_kernel
from tests.device import CPU, place, place_snapshot
from tests.zoo import build_on_rungs

N, D = 5, 2

TOLERANCE = 1e-8
"""Of a kernel from differences of order h⁴ with h = 1e-4: they are good to about 1e-11."""

STEP = 1e-4

RUNGS = ("linearize", "double-vjp", "jvp")


class Field(nn.Module):
    """A scalar field, and outputs made of it and its derivatives by the inputs."""

    def __init__(self, make):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.head = nn.Linear(5, 1)
        self.make = make
        self.register_buffer("direction", torch.tensor([0.7, -1.2]))

    def u(self, x):
        return self.head(self.net(x))

    def forward(self, x):
        return self.make(self, x)


def marked(m, x):
    x.requires_grad_()
    u = m.u(x)
    return torch.cat([u, grad(u.sum(), x, create_graph=True)[0]], 1)


def gradient_alone(m, x):
    x = x.detach().requires_grad_()
    return -grad(m.u(x).sum(), x, create_graph=True)[0]


def enabled(m, x):
    with torch.enable_grad():
        return marked(m, x)


def along(m, x):
    u, rate = jvp(m.u, (x,), (m.direction.expand_as(x),))
    return torch.cat([u, rate], 1)


def dual(m, x):
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(
            m.u(forward_ad.make_dual(x, m.direction.expand_as(x).clone()))
        )
    return torch.cat([primal, tangent], 1)


def accumulated(m, x):
    x.requires_grad_()
    u = m.u(x)
    u.sum().backward(create_graph=True, inputs=[x])
    return x.grad + u


def laplacian(m, x):
    x.requires_grad_()
    first = grad(m.u(x).sum(), x, create_graph=True)[0]
    parts = [grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(D)]
    return torch.stack(parts, 1).sum(1, keepdim=True)


def flow(m, x):
    """A continuous flow with the divergence along a fixed direction."""
    z, change = x, x.new_zeros(len(x), 1)
    with torch.enable_grad():
        for _ in range(2):
            z = z if z.requires_grad else z.requires_grad_()
            v = torch.tanh(m.u(z) + z)
            pulled = grad(v, z, m.direction.expand_as(z), create_graph=True)[0]
            change = change - 0.1 * (pulled * m.direction).sum(1, keepdim=True)
            z = z + 0.1 * v
    return torch.cat([z, change], 1)


def score(m, x):
    """The implicit score-matching loss of each sample."""

    def s(z):
        return m.u(z) * z

    divergence = vmap(jacrev(s))(x).diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    return 0.5 * s(x).square().sum(1, keepdim=True) + divergence


def adapted(m, x):
    """A step of gradient descent of the model's own parameters for every sample."""
    own = dict(m.net.named_parameters())

    def loss(p, z):
        return functional_call(m.net, p, (z,)).square().mean()

    def one(z):
        slopes = func_grad(loss)(own, z)
        moved = {name: p - 0.3 * slopes[name] for name, p in own.items()}
        return m.head(functional_call(m.net, moved, (z,)))

    return vmap(one)(x)


def adapted_in_place_of(m, x):
    """The same by torch.autograd, which needs parameters that require gradients."""
    own = dict(m.net.named_parameters())
    found = []
    for z in x:
        slopes = grad(m.net(z).square().mean(), list(own.values()), create_graph=True)
        moved = {name: p - 0.3 * s for (name, p), s in zip(own.items(), slopes, strict=True)}
        found.append(m.head(functional_call(m.net, moved, (z,))))
    return torch.stack(found)


WAYS = {
    "inputs marked": marked,
    "gradient alone": gradient_alone,
    "gradients enabled": enabled,
    "jacrev": lambda m, x: vmap(jacrev(m.u))(x)[:, 0],
    "grad of a sum": lambda m, x: func_grad(lambda z: m.u(z).sum())(x),
    "jacfwd": lambda m, x: vmap(jacfwd(m.u))(x)[:, 0],
    "jvp": along,
    "dual numbers": dual,
    "backward": accumulated,
    "laplacian": laplacian,
    "laplacian by hessian": lambda m, x: vmap(
        lambda z: hessian(lambda y: m.u(y)[0])(z).diagonal().sum()
    )(x)[:, None],
    "jacobian of a functional": lambda m, x: torch.autograd.functional.jacobian(
        lambda z: m.u(z).sum(0), x, create_graph=True
    )[0],
    "flow": flow,
    "score matching": score,
    "adapted by grad": adapted,
    "adapted by autograd": adapted_in_place_of,
}


def case(way):
    torch.manual_seed(0)
    model = Field(WAYS[way]).double()
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, x


def kernel_by_differences(model, x):
    """M over N by central differences of the model's outputs, each from an ordinary call."""
    model = copy.deepcopy(model)
    columns = []
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for place_ in range(flat.numel()):
            own = float(flat[place_])

            def at(shift, flat=flat, place_=place_, own=own):
                flat[place_] = own + shift
                outputs = model(x.clone()).detach().reshape(-1)
                flat[place_] = own
                return outputs

            near = (at(STEP) - at(-STEP)) / (2 * STEP)
            far = (at(2 * STEP) - at(-2 * STEP)) / (4 * STEP)
            columns.append((4 * near - far) / 3)
    jacobian = torch.stack(columns, 1)
    return jacobian @ jacobian.T / len(x)


def assert_close(found, expected):
    assert float((found.cpu() - expected).norm()) <= TOLERANCE * float(expected.norm())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_and_solver_gives_the_kernel_of_differences(way):
    model, x = case(way)
    expected = kernel_by_differences(model, x)
    snapshot = place_snapshot(model, x, torch.zeros(N, expected.shape[0] // N).double())
    refused = []
    for rung in RUNGS:
        try:
            kernel = build_on_rungs(snapshot, rungs=(rung,))
        except ValueError:
            refused.append(rung)
            continue
        with kernel:
            assert_close(kernel.to_dense(), expected)
    assert "double-vjp" not in refused  # what others refuse is left to it
    with build_exact_kernel(snapshot) as exact:
        assert_close(exact.to_dense(), expected)
    assert not snapshot.inputs.requires_grad
    assert snapshot.inputs.grad is None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", ["inputs marked", "jacrev"])
def test_chunks_and_a_caller_without_gradients_change_nothing(way):
    model, x = case(way)
    expected = kernel_by_differences(model, x)
    snapshot = place_snapshot(model, x, torch.zeros(N, expected.shape[0] // N).double())
    with torch.no_grad(), build_on_rungs(snapshot, chunk_size=2) as kernel:
        assert_close(kernel.to_dense(), expected)


def test_inputs_that_their_owner_marked_are_differentiated_by():
    def forward(m, x):
        return grad(m.u(x).sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    model = Field(forward).double()
    x = place(torch.randn(N, D).double()).requires_grad_()
    truth = copy.deepcopy(model).to(CPU)
    truth.make = gradient_alone
    snapshot = place_snapshot(model, x, torch.zeros(N, D).double())
    for build in (build_on_rungs, build_exact_kernel):
        assert_close(build(snapshot).to_dense(), kernel_by_differences(truth, x.detach().cpu()))
    assert x.grad is None


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_energy_and_force_models_through_the_estimators(solver):
    model, x = case("inputs marked")
    targets = torch.ones(N, 1 + D, dtype=torch.float64)
    X = [place_snapshot(model, x, targets)]
    energies = ShellEnergyEstimator(solver=solver, n_steps=60).fit(X)
    half = 0.5 * float((targets - model(x.clone()).detach()).square().sum()) / N
    assert float(energies.shells_["energy"].sum()) == pytest.approx(half, rel=TOLERANCE)
    fluxes = ShellFluxEstimator(solver=solver, n_steps=60, derivative="difference").fit(X)
    assert fluxes.fluxes_["flux_down"].abs().max() > 0.0


SILENT = "differentiates without create_graph=True"


def test_a_gradient_without_its_graph_is_an_error_that_says_so():
    def forward(m, x):
        x.requires_grad_()
        return grad(m.u(x).sum(), x, create_graph=m.training)[0]

    torch.manual_seed(0)
    snapshot = place_snapshot(Field(forward).double(), torch.ones(N, D).double(), torch.zeros(N, D))
    with pytest.raises(ValueError, match=SILENT):
        build_on_rungs(snapshot)


def test_a_freed_graph_is_an_error_that_names_the_remedy():
    def forward(m, x):
        x.requires_grad_()
        u = m.u(x)
        return torch.cat([u, grad(u.sum(), x)[0]], 1)

    torch.manual_seed(0)
    model = Field(forward).double()
    snapshot = place_snapshot(model, torch.ones(N, D).double(), torch.zeros(N, 1 + D))
    with pytest.raises(ValueError, match=r"cannot be differentiated by any solver.*create_graph"):
        build_on_rungs(snapshot)
