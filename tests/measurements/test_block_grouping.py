"""Blocks by depth from the module tree, and as the user names them."""

import pytest
import torch
from torch import nn

from spectralshell.measurements.blocks import group_parameters


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.stage1 = nn.Sequential(ResidualBlock(4), ResidualBlock(4))
        self.stage2 = nn.Sequential(ResidualBlock(4))
        self.head = nn.Linear(4, 2)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.position = nn.Parameter(torch.zeros(3, 4))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8) for _ in range(3))
        self.norm = nn.LayerNorm(4)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.encoder.tokens.weight


def names_of(model):
    return [name for name, _ in model.named_parameters()]


AUTOMATIC = {
    # name: model, labels by depth, block of one parameter
    "linear": (lambda: nn.Linear(3, 2), ["weight"], ("bias", "weight")),
    "norm alone": (lambda: nn.LayerNorm(3), ["LayerNorm"], ("weight", "LayerNorm")),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 2))),
        ["0", "2.0"],
        ("2.0.bias", "2.0"),
    ),
    "norm first": (
        lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)),
        ["1"],
        ("0.weight", "1"),
    ),
    "residual network": (
        ResNet,
        ["stem", "stage1.0", "stage1.1", "stage2.0", "head"],
        ("norm.bias", "stem"),
    ),
    "transformer": (
        Transformer,
        [
            "encoder.position",
            "encoder.tokens",
            "encoder.layers.0",
            "encoder.layers.1",
            "encoder.layers.2",
        ],
        ("encoder.norm.weight", "encoder.layers.2"),
    ),
}


@pytest.mark.parametrize("case", AUTOMATIC)
def test_automatic_blocks(case):
    build, labels, (name, label) = AUTOMATIC[case]
    model = build()
    grouping = group_parameters(model, "auto", names_of(model))
    assert list(grouping.labels) == labels
    assert grouping.label_of(name) == label
    assert sorted(sum(grouping.members.values(), ())) == sorted(names_of(model))


def test_order_of_a_mapping_is_the_depth():
    model = ResNet()
    blocks = {"^head": "end", "^stage": "middle", "": "start"}
    grouping = group_parameters(model, blocks, names_of(model))
    assert grouping.labels == ("end", "middle", "start")
    assert grouping.members["end"] == ("head.weight", "head.bias")


def test_a_callable_names_blocks_in_the_order_of_the_model():
    model = ResNet()
    grouping = group_parameters(model, lambda name: name.split(".")[0], names_of(model))
    assert grouping.labels == ("stem", "norm", "stage1", "stage2", "head")


def test_chosen_parameters_leave_other_blocks_out():
    grouping = group_parameters(ResNet(), "auto", ["stem.weight", "head.weight"])
    assert grouping.members == {"stem": ("stem.weight",), "head": ("head.weight",)}


@pytest.mark.parametrize(
    ("blocks", "error", "match"),
    [
        ("depth", ValueError, "blocks must be one of 'auto'"),
        (3, TypeError, "blocks must be one of 'auto'"),
        ({"^stem": "a", "^haed": "b", "": "c"}, ValueError, "no parameter got the label 'b'"),
        ({"^stem": "a"}, ValueError, "blocks: no expression finds the parameter"),
        ({"(": "a"}, ValueError, "blocks: .* is not a regular expression"),
        (lambda name: 1, TypeError, "blocks gave the label 1"),
    ],
)
def test_wrong_blocks_are_named(blocks, error, match):
    with pytest.raises(error, match=match):
        group_parameters(ResNet(), blocks, names_of(ResNet()))
