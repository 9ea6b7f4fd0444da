"""The digits trajectory: deterministic, cached, learning, and without side effects."""

import numpy as np
import pytest
import torch

from spectralshell.datasets import digits, load_digits_trajectory

SMALL = {"n_snapshots": 4, "n_batches": 3, "batch_size": 5, "hidden": (6,), "max_iter": 30}


def weights(X):
    return [X[k].load_state()["0.weight"].numpy() for k in range(0, len(X), 3)]


def test_shape_and_times():
    X = load_digits_trajectory(**SMALL, learning_rate=0.5)
    assert [(s.tau, s.batch) for s in X[:4]] == [(0.0, 0), (0.0, 1), (0.0, 2), (0.5, 0)]
    assert X[-1].tau == 15.0
    assert len(X) == 12
    assert len({s.tau for s in X}) == 4
    assert X[0].inputs.shape == (5, 64)


def test_batches_are_disjoint_and_the_same_at_all_times():
    X = load_digits_trajectory(**SMALL)
    images = torch.cat([s.inputs for s in X[:3]])
    assert len(torch.unique(images, dim=0)) == 15
    assert torch.equal(X[0].inputs, X[3].inputs)


def test_seed_decides():
    first, again, other = (load_digits_trajectory(**SMALL, random_state=s) for s in (1, 1, 2))
    for one, two in zip(weights(first), weights(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(weights(first)[0], weights(other)[0])
    assert not torch.equal(first[0].inputs, other[0].inputs)


@pytest.mark.parametrize("loss", ["mse", "brier", "cross-entropy"])
def test_it_learns(loss):
    X = load_digits_trajectory(**{**SMALL, "max_iter": 300}, loss=loss, learning_rate=0.5)

    def accuracy(snapshot):
        outputs = torch.func.functional_call(snapshot.model, snapshot.load_state(), snapshot.inputs)
        return (outputs.argmax(1) == snapshot.targets).double().mean().item()

    assert np.mean([accuracy(s) for s in X[-3:]]) > np.mean([accuracy(s) for s in X[:3]]) + 0.2


def test_global_random_state_stays():
    before = torch.get_rng_state()
    load_digits_trajectory(**SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_keeps_the_training(tmp_path, monkeypatch):
    first = load_digits_trajectory(**SMALL, memory=tmp_path)
    monkeypatch.setattr(digits, "_training_loss", None)  # a second training would fail
    second = load_digits_trajectory(**SMALL, memory=str(tmp_path))
    np.testing.assert_array_equal(weights(first)[-1], weights(second)[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_snapshots": 1}, "n_snapshots"),
        ({"n_snapshots": 50}, "n_snapshots must be at most"),
        ({"batch_size": 900}, "n_batches \\* batch_size"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"hidden": 12}, "hidden must be a sequence"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_wrong_parameters_are_named(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_digits_trajectory(**{**SMALL, **changes})


def test_steps_are_distinct():
    assert digits._log_spaced_steps(5, 4) == [0, 1, 2, 3, 4]
    assert digits._log_spaced_steps(2, 100) == [0, 100]
    assert digits._log_spaced_steps(4, 100) == [0, 1, 10, 100]
