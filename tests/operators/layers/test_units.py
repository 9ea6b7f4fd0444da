"""Which parameters' kernels are kept apart."""

import pytest

from spectralshell.operators import build_exact_kernel
from spectralshell.operators.layers.units import resolve_layers
from tests.zoo import CASES_BY_NAME, make_snapshot

NAMES = ["body.0.weight", "body.0.bias", "body.1.gain", "head"]


@pytest.mark.parametrize(
    ("layers", "labels"),
    [
        (None, ["", "", "", ""]),
        ("module", ["body.0", "body.0", "body.1", ""]),
        ("parameter", NAMES),
        ({"bias": "shift", "^body": "body", "": "rest"}, ["body", "shift", "body", "rest"]),
        ({"": "all", "bias": "never"}, ["all"] * 4),
        (lambda name: name[0], ["b", "b", "b", "h"]),
    ],
)
def test_labels(layers, labels):
    assert list(map(resolve_layers(layers, NAMES), NAMES)) == labels


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("layer", ValueError, "'module', 'parameter', a mapping or a callable, got 'layer'"),
        (3, TypeError, "a mapping or a callable, got int"),
        ({"body": "b"}, ValueError, "no expression finds the parameter 'head'"),
        ({"(": "b"}, ValueError, r"'\(' is not a regular expression"),
        (lambda name: 1, TypeError, "the label 1 of type int to 'body.0.weight'"),
        ({"": None}, TypeError, "the label None of type NoneType"),
    ],
)
def test_what_is_no_label_is_named(layers, error, message):
    with pytest.raises(error, match=message):
        resolve_layers(layers, NAMES)


@pytest.mark.parametrize(
    ("layers", "labels"),
    [
        (None, set()),
        ("module", {"0", "2"}),
        ({"bias": "biases", "": "weights"}, {"biases", "weights"}),
        (lambda name: "one", {"one"}),
    ],
)
def test_kernels_are_kept_where_they_are_asked_for(layers, labels):
    kernel = build_exact_kernel(make_snapshot(CASES_BY_NAME["mlp"]), layers=layers)
    assert set(kernel.layers) == labels
    if labels:
        total = sum(kernel.layers.values())
        assert float((total - kernel.matrix).norm()) < 1e-14 * float(kernel.matrix.norm())
