"""Digests of what a model keeps: large containers in one go, and no change in them unseen."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from spectralshell.models.fingerprint import model_digest, value_digest

MANY = 300  # more than are looked at one by one


def table():
    return [{"word": [k, (str(k), {"count": 2.0 * k})]} for k in range(MANY)]


def change_number(rows):
    rows[200]["word"][1][1]["count"] += 1.0


def change_type(rows):
    rows[1]["word"][0] = True


def change_key(rows):
    rows[200]["ward"] = rows[200].pop("word")


def change_sign_of_zero(rows):
    rows[0]["word"][1][1]["count"] = -0.0


def hide_an_array(rows):
    rows[3]["word"][0] = np.ones(2, dtype=np.int32)


def hide_a_tensor(rows):
    rows[3]["word"][0] = torch.ones(2)


@pytest.mark.parametrize(
    "change",
    [change_number, change_type, change_key, change_sign_of_zero, hide_an_array, hide_a_tensor],
)
def test_changes_deep_inside_a_large_container_count(change):
    model = nn.Linear(3, 2)
    model.table = table()
    before = model_digest(model)
    model.table = copy.deepcopy(model.table)
    assert model_digest(model) == before
    change(model.table)
    assert model_digest(model) != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros(2), np.zeros(4, dtype=np.float32)),  # the same bytes
        (Counter("ab"), {"a": 1, "b": 1}),
        (slice(1), slice(2)),
    ],
)
def test_what_is_not_plain_is_told_apart_in_large_containers(one, other):
    assert value_digest([one] * MANY) != value_digest([other] * MANY)


def test_a_circle_comes_to_an_end():
    rows = [[0] for _ in range(MANY)]
    rows[5].append(rows)
    assert value_digest(rows)


def test_objects_of_compiled_classes_are_digested():
    model = nn.Linear(3, 2)
    model.generator = np.random.default_rng(0)  # its metaclass has a descriptor for its module
    assert model_digest(model) == model_digest(model)


class Stubborn:
    """Says what it is, and answers to nothing else."""

    def __getattribute__(self, name):
        if name == "__class__":
            return Stubborn
        raise LookupError(name)


def test_what_cannot_be_looked_at_is_like_nothing_else():
    model = nn.Linear(3, 2)
    model.stubborn = Stubborn()
    assert model_digest(model) != model_digest(model)


def test_where_a_module_stands_again_counts():
    a, b = nn.Tanh(), nn.ReLU()
    first, other = nn.Sequential(a, b, a), nn.Sequential(a, b, b)
    assert model_digest(first) != model_digest(other)


def test_which_weights_are_tied_counts():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    before = model_digest(model)
    model[1].weight = model[2].weight
    assert model_digest(model) != before


@pytest.mark.parametrize("own", [True, False])
def test_what_autograd_made_of_other_weights_counts_by_value(own):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    home = model if own else other
    model.scale = home.weight.abs().sum()
    before = model_digest(model)
    model.scale = 3.0 * home.weight.abs().sum()
    assert (model_digest(model) == before) == own
