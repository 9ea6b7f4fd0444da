"""Shell energies by layer, and leading eigenpairs, against dense references."""

import numpy as np
import pytest
import torch

from spectralshell import ShellEnergyEstimator
from tests.zoo import CASES_BY_NAME, dense_reference, make_snapshot

# Float64 eigenproblems of small matrices by two routes, relative.
TOLERANCE = 1e-10
CASES = ["mlp", "tied language model", "cnn batchnorm", "gru"]


@pytest.fixture(params=CASES)
def snapshot(request):
    return make_snapshot(CASES_BY_NAME[request.param])


def dense_spectrum(snapshot):
    reference = dense_reference(snapshot.model, snapshot.inputs, snapshot.targets, "mse")
    rates, modes = np.linalg.eigh(reference["kernel"].numpy())
    return rates[::-1], modes[:, ::-1]


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_leading_pairs_are_the_dense_ones(snapshot, solver):
    rates, modes = dense_spectrum(snapshot)
    (pairs,) = ShellEnergyEstimator(solver=solver).eigenpairs([snapshot], k=3)
    assert pairs.vectors.shape == (len(rates), 3)
    assert pairs.eigenvalues == pytest.approx(rates[:3], rel=TOLERANCE)
    overlaps = np.abs(pairs.vectors.cpu().numpy().T @ modes[:, :3])
    assert overlaps == pytest.approx(np.eye(3), abs=1e-5)
    assert pairs.converged(TOLERANCE).all()


def test_short_runs_say_which_pairs_are_not_converged(snapshot):
    (pairs,) = ShellEnergyEstimator(solver="lanczos", n_steps=3).eigenpairs([snapshot], k=3)
    assert not pairs.converged(TOLERANCE).all()


def test_layers_have_their_own_energies(snapshot):
    estimator = ShellEnergyEstimator().fit([snapshot])
    frame = estimator.layer_frame([snapshot], layers="parameter")
    assert frame.columns[0] == "layer"
    total = estimator.spectral_measures([snapshot])[0].total
    by_layer = frame.groupby("layer")["energy"].sum()
    names = [name for name, p in snapshot.model.named_parameters() if p.requires_grad]
    assert sorted(by_layer.index) == sorted(names)
    assert by_layer.to_numpy() == pytest.approx(total, rel=TOLERANCE)


def test_one_label_for_all_gives_the_frame_of_the_whole(snapshot):
    estimator = ShellEnergyEstimator(solver="exact").fit([snapshot])
    frame = estimator.layer_frame([snapshot], layers=lambda name: "all")
    whole = estimator.shell_frame([snapshot])
    assert set(frame.pop("layer")) == {"all"}
    assert frame["energy"].to_numpy() == pytest.approx(whole["energy"].to_numpy(), rel=TOLERANCE)


def test_a_layer_is_what_its_parameters_alone_give(snapshot):
    name = next(iter(dict(snapshot.model.named_parameters())))
    whole = ShellEnergyEstimator(lambda_0=1e-3).fit([snapshot])
    frame = whole.layer_frame([snapshot], layers="parameter")
    energies = frame.loc[frame["layer"] == name, "energy"].to_numpy()
    alone = ShellEnergyEstimator(parameters=lambda other: other == name, solver="exact")
    measure = alone.spectral_measures([snapshot])[0]
    (expected,) = [measure.energies(whole.edges_)[1:]]
    assert energies[-len(expected) :] == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_bad_layers_are_named(snapshot):
    estimator = ShellEnergyEstimator().fit([snapshot])
    with pytest.raises(ValueError, match="layers must be"):
        estimator.layer_frame([snapshot], layers="blocks")
    with pytest.raises(ValueError, match="no expression finds the parameter"):
        estimator.layer_frame([snapshot], layers={"nothing": "a"})
    with pytest.raises(ValueError, match="k must be"):
        estimator.eigenpairs([snapshot], k=0)


def test_queries_leave_the_model_alone(snapshot):
    before = {name: t.clone() for name, t in snapshot.model.state_dict().items()}
    estimator = ShellEnergyEstimator().fit([snapshot])
    estimator.layer_frame([snapshot])
    estimator.eigenpairs([snapshot], k=1)
    after = snapshot.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
