"""What later snapshots of a model take from the first: the same numbers, for less."""

import warnings

import pytest
import torch
from torch import nn

from spectralshell import ShellEnergyEstimator
from spectralshell.models.caches import StaleStateError
from spectralshell.operators import build_exact_kernel, build_kernel
from spectralshell.operators.set_up import forget_set_ups
from spectralshell.operators.survey import survey_kernel
from spectralshell.warning_categories import DynamicsWarning
from tests.caching_models import STALE, fill, network
from tests.device import place, place_snapshot
from tests.zoo import CASES_BY_NAME, RESIDUALS, dense_reference, make_snapshot

FEW = 0.5  # of the probes of a first snapshot
PRODUCTS = 1e-10  # of the largest entry, the same operations in float64


def moved(snapshot, factor=1.1):
    """Return the batch at another state of its model."""
    trained = dict(snapshot.model.named_parameters())
    state = {
        name: factor * value if name in trained else value
        for name, value in snapshot.load_state().items()
    }
    return place_snapshot(snapshot.model, snapshot.inputs, snapshot.targets, tau=1.0, state=state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_nothing_depends_on_what_was_measured_before(name, dtype):
    first = make_snapshot(CASES_BY_NAME[name], dtype=dtype)
    alone = build_kernel(moved(first))
    forget_set_ups()
    build_kernel(first)
    later = build_kernel(moved(first))
    assert later.n_probes < FEW * alone.n_probes
    assert (later.status, later.rung, later.refused) == (alone.status, alone.rung, alone.refused)
    assert later.noise == alone.noise
    assert later.norm == alone.norm
    assert torch.equal(later.to_dense(), alone.to_dense())


@pytest.mark.parametrize("solver", ["lanczos", "exact"])
def test_rows_are_those_of_a_fit_alone(solver):
    first = make_snapshot(CASES_BY_NAME["residual cnn"], dtype=torch.float32)
    estimator = ShellEnergyEstimator(q=2.0, solver=solver)
    together = estimator.fit([first, moved(first)]).transform([first, moved(first)])
    forget_set_ups()
    alone = estimator.transform([moved(first)])
    assert together.iloc[[1]].equals(alone)


class OnceDifferentiable(torch.autograd.Function):
    """Has a backward pass and no more."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class Branching(nn.Linear):
    """Goes another way where its first weight is large."""

    def __init__(self, way):
        super().__init__(3, 2)
        self.way = way

    def forward(self, x):
        y = super().forward(x)
        # A loop over Python's numbers: no operation tells of the branch.
        return self.way(y) if self.weight.detach().flatten().tolist()[0] > 1.0 else torch.tanh(y)


def branches(way):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = place(Branching(way).double())
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    y = torch.ones(4, 2, dtype=torch.float64)
    state = model.state_dict() | {"weight": 3.0 * torch.ones(2, 3, dtype=torch.float64)}
    return place_snapshot(model, x, y), place_snapshot(model, x, y, tau=1.0, state=state)


def test_a_state_that_no_rung_is_right_for_is_refused():
    first, other = branches(OnceDifferentiable.apply)
    assert build_kernel(first).rung == "linearize"
    with pytest.raises(ValueError, match="multiplies by its Jacobian correctly"):
        build_kernel(other)


class NoForwardMode(torch.autograd.Function):
    """Can be differentiated backwards alone, as often as one likes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


def test_another_rung_gives_the_numbers_with_a_status():
    first, other = branches(NoForwardMode.apply)
    assert build_kernel(first).rung == "linearize"
    kernel = build_kernel(other)
    assert kernel.rung == "double-vjp"
    assert kernel.status.startswith("set up anew")
    # Settled now is the rung that works for both.
    again = build_kernel(first)
    assert (again.rung, again.status) == ("double-vjp", "ok")
    expected = build_kernel(branches(torch.sin)[1]).to_dense()
    difference = (kernel.to_dense() - expected).abs().max()
    assert float(difference) <= PRODUCTS * float(expected.abs().max())


def test_a_later_derivative_that_is_not_finite_is_named():
    first, other = branches(lambda y: (y - y.detach()).abs().sqrt())
    build_kernel(first)
    for build in (build_kernel, build_exact_kernel):
        with pytest.raises(ValueError, match="NaN or infinite"):
            build(other)


def test_a_later_jacobian_that_is_not_the_derivative_is_labelled():
    first, other = branches(lambda y: y + (torch.cos(y) - y).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_kernel(first)
    with pytest.warns(DynamicsWarning, match="do not change as the Jacobian says"):
        assert build_kernel(other).jacobian_defect > 0.1
    assert build_kernel(first).jacobian_defect == 0.0


def test_a_defect_that_the_last_sample_alone_shows_is_labelled():
    first, other = branches(lambda y: torch.cat([y[:3], y[3:] + (torch.cos(y[3:])).detach()]))
    build_kernel(first)
    with pytest.warns(DynamicsWarning, match="do not change as the Jacobian says"):
        build_kernel(other)


def test_what_the_model_keeps_since_is_found():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network(STALE[0](), torch.float64)
        x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    state = {name: 1.1 * value for name, value in model.state_dict().items()}
    build_kernel(place_snapshot(model, x, y))
    fill(model, x, grad=False)
    with pytest.raises(StaleStateError):
        build_kernel(place_snapshot(model, x, y, state=state))


def test_other_settings_are_looked_at_as_a_whole():
    snapshot = make_snapshot(CASES_BY_NAME["mlp"], "nll")

    def settled(residual="nll", **more):
        found = survey_kernel(snapshot, residual=residual, **more)
        return bool(found.evaluation.problem.set_up.rungs)

    build_kernel(snapshot, residual="nll")
    assert settled()
    assert not settled(residual="brier")
    assert not settled(parameters="weight")
    assert not settled(chunk_size=2)
    assert not settled(dtype="float32")
    snapshot.model.scale = 2.0  # any setting may change what runs
    assert not settled()


@pytest.mark.parametrize("kind", ["mse", "nll", "callable"])
def test_later_kernels_equal_the_dense_ones(kind):
    first = make_snapshot(CASES_BY_NAME["gpt-neox"], kind)
    build_kernel(first, residual=RESIDUALS[kind])
    later = moved(first, 0.9)
    kernel = build_kernel(later, residual=RESIDUALS[kind])
    later.model.load_state_dict(later.load_state(), strict=False)
    reference = dense_reference(later.model, later.inputs, later.targets, kind)["kernel"]
    difference = (kernel.to_dense().cpu() - reference).abs().max()
    assert float(difference) <= 1e-6 * float(reference.abs().max())  # it has float32 inside


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_what_becomes_random_or_coupled_later_is_found(chunk_size):
    noisy = branches(lambda y: y + 0.1 * torch.randn_like(y))
    build_kernel(noisy[0], chunk_size=chunk_size)
    with pytest.raises(ValueError, match="differ"):
        build_kernel(noisy[1], chunk_size=chunk_size)


def test_samples_that_interact_at_a_later_state_are_found():
    first, other = branches(lambda y: y - y.mean(0))
    build_kernel(first, chunk_size=2)
    with pytest.raises(ValueError, match="depend on the other samples"):
        build_kernel(other, chunk_size=2)


def test_a_backward_pass_that_reads_the_model_later_is_found():
    first, other = branches(None)
    first.model.way = None

    class Checkpointed(Branching):
        def __init__(self):
            super().__init__(None)
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            y = nn.Linear.forward(self, x)
            if self.weight.detach().flatten().tolist()[0] > 1.0:
                return torch.utils.checkpoint.checkpoint(
                    lambda h: torch.tanh(self.inner(h)), y, use_reentrant=False
                )
            return torch.tanh(self.inner(y))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = place(Checkpointed().double())
    state = model.state_dict() | {"weight": other.load_state()["weight"]}
    calm = place_snapshot(model, first.inputs, first.targets)
    later = place_snapshot(model, first.inputs, first.targets, tau=1.0, state=state)
    alone = build_kernel(later).to_dense()
    forget_set_ups()
    build_kernel(calm)
    kernel = build_kernel(later)
    assert kernel.status.startswith("set up anew")
    assert torch.equal(kernel.to_dense(), alone)


class Flat(torch.autograd.Function):
    """Its forward-mode derivative says that nothing changes."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent):
        return torch.zeros_like(tangent)


def test_a_rung_that_gives_zeros_later_is_found():
    first, other = branches(Flat.apply)
    build_kernel(first)
    assert build_kernel(other).rung == "double-vjp"
