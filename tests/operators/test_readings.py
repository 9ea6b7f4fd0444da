"""Which tensor counts samples, which dimension counts classes, and callables that mix samples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectralshell import ShellEnergyEstimator
from spectralshell.operators import build_exact_kernel, build_kernel
from tests.device import place_snapshot

# Sums of squares of a few dozen float64 numbers, in two orders.
RTOL = 1e-12
SIDE = 3


def random_values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class Pixels(nn.Module):
    """As many classes as rows and columns: the shape does not say which is which."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, SIDE, 1).double()

    def forward(self, x):
        return self.convolution(x)


class Tokens(nn.Module):
    """As many classes as tokens; the answer is a tensor, or an object with logits."""

    def __init__(self, *, wrapped):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(2, SIDE).double()
        self.wrapped = wrapped

    def forward(self, x):
        logits = self.head(x)
        return type("Output", (), {"logits": logits})() if self.wrapped else logits


class Graph(nn.Module):
    """One message along every edge: nodes count samples, edges do not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.node, self.edge = nn.Linear(3, 2).double(), nn.Linear(2, 3).double()

    def forward(self, x, edge_index, edge_attr, edge_weight):
        sent = (x[edge_index[0]] + self.edge(edge_attr)) * edge_weight[:, None]
        return self.node(x.index_add(0, edge_index[1], sent).tanh())


def energy_of(snapshot, residual):
    return float(build_kernel(snapshot, residual=residual).residual_vector.square().sum()) / 2


def brier_energy(outputs, labels, axis):
    """From torch's own one-hot and softmax, by the mean over rows."""
    hot = F.one_hot(labels, outputs.shape[axis]).movedim(-1, axis)
    return float((hot - outputs.detach().softmax(axis)).square().sum()) / 2 / labels.numel()


@pytest.fixture
def pixels():
    labels = torch.randint(SIDE, (4, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    return Pixels(), random_values(4, 2, SIDE, SIDE), labels


@pytest.mark.parametrize("axis", [1, -1, 3])
def test_the_user_says_which_dimension_counts_classes(pixels, axis):
    model, x, labels = pixels
    snapshot = place_snapshot(model, x, labels, class_axis=axis)
    expected = brier_energy(model(x), labels, axis)
    for residual in ("brier", "cross-entropy"):
        assert energy_of(snapshot, residual) == pytest.approx(expected, rel=RTOL)
    dense, exact = (
        build_kernel(snapshot, residual="brier"),
        build_exact_kernel(snapshot, residual="brier"),
    )
    torch.testing.assert_close(exact.to_dense(), dense.to_dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("residual", ["mse", "brier", "cross-entropy", "nll"])
def test_two_readings_of_the_classes_are_an_error(pixels, residual):
    snapshot = place_snapshot(*pixels)
    with pytest.raises(ValueError, match=r"dimension 1, as in torch.*class_axis=1.*class_axis=3"):
        build_kernel(snapshot, residual=residual)


def test_classes_are_where_torch_has_them():
    model, x = nn.Conv2d(2, 5, 1).double(), random_values(4, 2, 3, 2)
    labels = torch.randint(5, (4, 3, 2), generator=torch.Generator().manual_seed(1))
    labels[0, 0, 0] = -100
    nll = F.cross_entropy(model(x), labels, reduction="none")
    expected = float(nll.detach().square().sum()) / 2 / 23
    snapshot = place_snapshot(model, x, labels)
    for chunk_size in (None, 3):
        kernel = build_kernel(snapshot, residual="nll", chunk_size=chunk_size)
        assert float(kernel.residual_vector.square().sum()) / 2 == pytest.approx(expected, rel=RTOL)
        assert kernel.n_rows == 23


def test_classes_of_logits_are_last():
    x = random_values(4, SIDE, 2)
    labels = torch.randint(SIDE, (4, SIDE), generator=torch.Generator().manual_seed(1))
    told = place_snapshot(Tokens(wrapped=True), x, labels)
    expected = brier_energy(Tokens(wrapped=False)(x), labels, -1)
    assert energy_of(told, "brier") == pytest.approx(expected, rel=RTOL)
    with pytest.raises(ValueError, match="class_axis"):
        build_kernel(place_snapshot(Tokens(wrapped=False), x, labels), residual="brier")


@pytest.mark.parametrize("residual", ["mse", "brier", "cross-entropy", "nll"])
def test_labels_of_one_class_are_an_error(residual):
    labels = torch.zeros(4, dtype=torch.long)
    snapshot = place_snapshot(nn.Linear(3, 1), torch.ones(4, 3), labels)
    with pytest.raises(ValueError, match="a single class, or real values"):
        build_kernel(snapshot, residual=residual)


@pytest.mark.parametrize("class_axis", [0, 4, -4])
def test_the_first_dimension_counts_no_classes(pixels, class_axis):
    snapshot = place_snapshot(*pixels, class_axis=class_axis)
    with pytest.raises(ValueError, match=r"class_axis=.* cannot count the classes"):
        build_kernel(snapshot, residual="brier")


@pytest.mark.parametrize("n_samples", [None, 5])
@pytest.mark.parametrize("solver", ["lanczos", "exact"])
# Messages make samples interact: the layers' kernels are compared, and products taken instead.
@pytest.mark.filterwarnings("ignore::spectralshell.warning_categories.KernelWarning")
def test_the_outputs_count_the_samples_of_a_graph(n_samples, solver):
    model, edges = Graph(), torch.randint(5, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = (random_values(5, 3), edges, random_values(9, 2, seed=2), random_values(9, seed=3))
    targets = random_values(5, 2, seed=4)
    snapshot = place_snapshot(model, inputs, targets, n_samples=n_samples)
    expected = float((targets - model(*inputs).detach()).square().sum()) / 2 / 5
    estimator = ShellEnergyEstimator(solver=solver)
    total = estimator.fit_transform([snapshot]).to_numpy().sum()
    assert total == pytest.approx(expected, rel=RTOL)


def test_a_count_that_the_outputs_deny_is_an_error():
    snapshot = place_snapshot(nn.Linear(3, 2), torch.ones(4, 3), torch.zeros(4, 2), n_samples=3)
    with pytest.raises(ValueError, match=r"for 3 samples.*n_samples"):
        build_kernel(snapshot)


def broadcast(outputs, targets):
    return targets - outputs


def centred(outputs, targets):
    error = targets[:, None] - outputs
    return error - error.mean(0)


def paired(outputs, targets):
    error = targets[:, None] - outputs
    return error + error.reshape(-1, 2, 1).mean(1).repeat_interleave(2, 0)


def ranked(outputs, targets):
    return (targets[:, None] - outputs).sort(0).values


@pytest.mark.parametrize("residual", [broadcast, centred, paired, ranked])
@pytest.mark.parametrize("build", [build_kernel, build_exact_kernel])
def test_a_callable_that_mixes_samples_is_an_error(residual, build):
    snapshot = place_snapshot(
        nn.Linear(3, 1), random_values(6, 3).float(), random_values(6, seed=1).float()
    )
    with pytest.raises(ValueError, match=f"residual '{residual.__name__}' .*couples samples|fails"):
        build(snapshot, residual=residual)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_callable_that_does_not_mix_samples_is_measured(n):
    def right(outputs, targets):
        return targets[:, None] - outputs

    snapshot = place_snapshot(nn.Linear(3, 1), random_values(n, 3).float(), torch.arange(float(n)))
    assert build_kernel(snapshot, residual=right).n == n
