"""Wrong input gives one clear error, and leaves the user's model as it was."""

import random
from array import array

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spectralshell.operators import build_kernel
from spectralshell.snapshots import Snapshot, as_snapshots, make_snapshots
from tests.fingerprints import model_fingerprint
from tests.zoo import build_on_rungs

X = torch.linspace(-1, 1, 24).reshape(6, 4)
Y = torch.linspace(1, -1, 18).reshape(6, 3)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class ForcedDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


class ReadsNumpyNoise(nn.Module):
    def forward(self, x):
        return x + np.random.normal() + random.random()  # noqa: NPY002


class BatchMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class RootAtZero(nn.Module):
    def forward(self, x):
        return (x * 0).sqrt() + x


class Total(nn.Module):
    def forward(self, x):
        return x.sum()


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, x


class OnceOnly(torch.autograd.Function):
    """Its backward hides the dependence on the gradient: double reverse mode is silently wrong."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad.detach() + 0 * grad


class OnceOnlyLayer(nn.Module):
    def forward(self, x):
        return OnceOnly.apply(x)


def network(*between):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.grad = torch.ones_like(parameter)
    model[0].register_forward_hook(_user_hook)
    model[0].eval()  # modes are mixed
    return model


def _user_hook(module, inputs, output):
    return output


def with_value(model, value):
    with torch.no_grad():
        model[0].weight[1, 2] = value
    return model


def measure(model, x=X, y=Y, **options):
    keywords = {k: options.pop(k) for k in ("tau", "batch", "state", "name") if k in options}
    return build_kernel(Snapshot(model, x, y, **keywords), **options)


def frozen(model):
    return model.requires_grad_(False)


def other_architecture(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"0.weight": torch.ones(4, 4), "0.bias": torch.ones(5), "9.weight": X}, path)
    return path


def corrupt(tmp_path, suffix):
    path = tmp_path / f"corrupt{suffix}"
    path.write_bytes(bytes(range(200)))
    return path


def truncated(tmp_path):
    path = tmp_path / "short.pt"
    torch.save({"0.weight": torch.ones(5, 4)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def whole_model_pickle(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(nn.Tanh(), path)
    return path


def mean_error(outputs, targets):
    return (outputs - targets).square().mean()


def changed_in_place(model):
    x = X.clone()
    snapshot = Snapshot(model, x, Y)
    x[0] = 0
    build_kernel(snapshot)


def two_alike(model):
    as_snapshots([Snapshot(model, X, Y), Snapshot(model, X, Y)])


# name, between the layers, what goes wrong, the error, what its message names
CASES = [
    ("NaN weight", [], lambda m, p: measure(with_value(m, torch.nan)), ValueError, "'0.weight'"),
    ("inf weight", [], lambda m, p: measure(with_value(m, torch.inf)), ValueError, "'0.weight'"),
    ("NaN inputs", [], lambda m, p: measure(m, X * torch.nan), ValueError, "inputs hold NaN"),
    ("NaN targets", [], lambda m, p: measure(m, y=Y * torch.nan), ValueError, "targets hold NaN"),
    ("overflow", [], lambda m, p: measure(m, X * 1e38), ValueError, r"first in module '0' \(Lin"),
    ("dropout forced on", [ForcedDropout()], lambda m, p: measure(m), ValueError, r"module '1' \("),
    ("numpy noise", [ReadsNumpyNoise()], lambda m, p: measure(m), ValueError, "ReadsNumpyNoise"),
    ("targets too short", [], lambda m, p: measure(m, y=Y[:4]), ValueError, r"shape \(4, 3\)"),
    ("targets to broadcast", [], lambda m, p: measure(m, y=Y[:, :1]), ValueError, r"\(6, 1\)"),
    (
        "labels too short",
        [],
        lambda m, p: measure(m, y=LABELS[:4], residual="nll"),
        ValueError,
        r"shape \(4,\) do not fit outputs of shape \(6, 3\)",
    ),
    (
        "class out of range",
        [],
        lambda m, p: measure(m, y=LABELS + 1, residual="brier"),
        ValueError,
        "class index 3, out of range for 3 classes",
    ),
    (
        "negative class",
        [],
        lambda m, p: measure(m, y=LABELS - 1),
        ValueError,
        "class index -1",
    ),
    (
        "real labels",
        [],
        lambda m, p: measure(m, y=Y, residual="cross-entropy"),
        TypeError,
        "integer class labels",
    ),
    (
        "no row labelled",
        [],
        lambda m, p: measure(m, y=LABELS * 0 - 100, residual="nll"),
        ValueError,
        "all -100",
    ),
    ("empty batch", [], lambda m, p: measure(m, X[:0], Y[:0]), ValueError, "no sample"),
    ("no parameters", None, lambda m, p: measure(m, y=X), ValueError, "Tanh has no parameters"),
    ("all frozen", [], lambda m, p: measure(frozen(m)), ValueError, "requires_grad=False"),
    (
        "nothing selected",
        [],
        lambda m, p: measure(m, parameters="conv"),
        ValueError,
        "'conv' selects none .*0.weight, 0.bias",
    ),
    ("bad expression", [], lambda m, p: measure(m, parameters="("), ValueError, "regular express"),
    (
        "other architecture",
        [],
        lambda m, p: measure(m, state=other_architecture(p)),
        ValueError,
        r"missing keys: 1.weight, 1.bias; unexpected keys: 9.weight; different shapes: 0.weight",
    ),
    (
        "corrupt safetensors",
        [],
        lambda m, p: measure(m, state=corrupt(p, ".safetensors")),
        ValueError,
        "corrupt.safetensors' is not a readable",
    ),
    (
        "corrupt pickle",
        [],
        lambda m, p: measure(m, state=corrupt(p, ".pt")),
        ValueError,
        "corrupt.pt' is not a readable",
    ),
    (
        "truncated",
        [],
        lambda m, p: measure(m, state=truncated(p)),
        ValueError,
        "short.pt' is not a readable",
    ),
    (
        "pickled objects",
        [],
        lambda m, p: measure(m, state=whole_model_pickle(p)),
        ValueError,
        "model.pt' holds Python objects .* refused",
    ),
    (
        "missing file",
        [],
        lambda m, p: measure(m, state=p / "none.pt"),
        FileNotFoundError,
        "none.pt",
    ),
    ("state of a wrong type", [], lambda m, p: measure(m, state=3), TypeError, "state must be"),
    ("NaN tau", [], lambda m, p: measure(m, tau=float("nan")), ValueError, "tau must be finite"),
    ("tau as text", [], lambda m, p: measure(m, tau="0"), TypeError, "tau must be a real"),
    ("two alike", [], lambda m, p: two_alike(m), ValueError, r"X\[0\] and X\[1\] both have tau=0"),
    ("X a number", [], lambda m, p: as_snapshots([m, 3]), TypeError, r"X\[0\] must be a Snapshot"),
    ("X empty", [], lambda m, p: as_snapshots([]), ValueError, "X is empty"),
    ("no batches", [], lambda m, p: make_snapshots(m, []), ValueError, "batches is empty"),
    ("inputs as text", [], lambda m, p: measure(m, "abc"), TypeError, "inputs must be a tensor"),
    ("inputs too wide", [], lambda m, p: measure(m, X[:, :2]), ValueError, "failed on the inputs"),
    ("outputs a sum", [Total()], lambda m, p: measure(m[:2]), ValueError, "sample dimension"),
    ("outputs a tuple", [TwoOutputs()], lambda m, p: measure(m[:2]), TypeError, "returned tuple"),
    (
        "residual a mean",
        [],
        lambda m, p: measure(m, residual=mean_error),
        ValueError,
        r"'mean_error' returned shape \(\)",
    ),
    ("unknown residual", [], lambda m, p: measure(m, residual="mae"), ValueError, "'mae'"),
    (
        "coupled samples in chunks",
        [BatchMean()],
        lambda m, p: measure(m, chunk_size=2),
        ValueError,
        "depend on the other samples",
    ),
    (
        "batch statistics in chunks",
        [nn.BatchNorm1d(5, track_running_stats=False)],
        lambda m, p: measure(m, chunk_size=2),
        ValueError,
        "inputs of shape .* Expected more than 1 value",
    ),
    (
        "detached outputs",
        [Detached()],
        lambda m, p: measure(m[:2], y=LABELS),
        ValueError,
        "does not depend",
    ),
    ("root at zero", [RootAtZero()], lambda m, p: measure(m), ValueError, "with respect to '0.w"),
    (
        "cannot be differentiated twice",
        [OnceOnlyLayer()],
        lambda m, p: measure(m),
        ValueError,
        r"starts in module '1' \(OnceOnlyLayer\)",
    ),
    ("half dtype", [], lambda m, p: measure(m, dtype="float16"), ValueError, "dtype must be None"),
    ("missing device", [], lambda m, p: measure(m, device="cuda:99"), ValueError, "not available"),
    ("unknown device", [], lambda m, p: measure(m, device="abacus"), ValueError, "'abacus'"),
    ("chunk size 0", [], lambda m, p: measure(m, chunk_size=0), ValueError, "chunk_size must be"),
    ("changed in place", [], lambda m, p: changed_in_place(m), ValueError, "changed in place"),
]


@pytest.mark.parametrize(
    ("between", "act", "error", "message"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_one_clear_error_and_an_untouched_model(between, act, error, message, tmp_path):
    model = nn.Tanh() if between is None else network(*between)
    prepared = model_fingerprint(model)
    with pytest.raises(error, match=message):
        act(model, tmp_path)
    after = model_fingerprint(model)
    allowed = changes_made_by_the_case(message)
    assert {k: v for k, v in after.items() if k not in allowed} == {
        k: v for k, v in prepared.items() if k not in allowed
    }


def changes_made_by_the_case(message):
    return {"'0.weight'": {"parameters"}, "requires_grad=False": {"requires_grad"}}.get(
        message, set()
    )


class Interrupting(nn.Module):
    """Presses Ctrl-C when it is called for the n-th time."""

    def __init__(self):
        super().__init__()
        # A list would be put back after each call.
        self.calls = array("q", [0])
        self.at = array("q", [-1])

    def forward(self, x):
        self.calls[0] += 1
        if self.calls[0] == self.at[0]:
            torch.manual_seed(99)
            raise KeyboardInterrupt
        return x.tanh()


class CheckpointedInterrupting(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Interrupting()

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("layer", "rungs"),
    [(Interrupting, ["jvp"]), (CheckpointedInterrupting, ["double-vjp"])],
    ids=["forward", "backward"],
)
def test_an_interrupted_product_leaves_no_trace(layer, rungs):
    model = network(layer())
    stopper = next(m for m in model.modules() if isinstance(m, Interrupting))
    kernel = build_on_rungs(Snapshot(model, X, Y), rungs=rungs)
    before = model_fingerprint(model)
    expected = kernel.matvec(kernel.residual_vector)
    stopper.at[0] = stopper.calls[0] + 1
    with pytest.raises(KeyboardInterrupt):
        kernel.matvec(kernel.residual_vector)
    assert model_fingerprint(model) == before
    assert torch.equal(kernel.matvec(kernel.residual_vector), expected)
    assert model_fingerprint(model) == before


@pytest.mark.parametrize("call", range(1, 7))
def test_an_interrupt_while_building_leaves_no_trace(call):
    model = network(Interrupting())
    model[1].at[0] = call
    before = model_fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        build_kernel(Snapshot(model, X, Y))
    assert model_fingerprint(model) == before


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"dtype": "float64"}])
def test_a_successful_measurement_leaves_no_trace(options):
    model = network(nn.Dropout(), nn.BatchNorm1d(5)).train()
    before = model_fingerprint(model)
    kernel = measure(model, **options)
    kernel.matmat(torch.ones(kernel.n, 3))
    kernel.error_jvp(kernel.velocity())
    assert model_fingerprint(model) == before


def test_the_users_gradient_mode_is_his_own():
    model = network()
    with torch.no_grad():
        kernel = measure(model)
        assert kernel.matvec(kernel.residual_vector).norm() > 0
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        kernel = measure(model)
        assert kernel.matvec(torch.ones(kernel.n)).norm() > 0
