"""A run on disk gives snapshots; what it is not is said."""

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spectralshell import ShellEnergyEstimator
from spectralshell.models.state import copy_state
from spectralshell.runs import TrainingRun
from spectralshell.runs.saved_states import SavedState
from spectralshell.warning_categories import RunWarning
from tests.runs.loops import make_model, record


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(6, 3, generator=generator), torch.randn(6, 1, generator=generator))
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "a"
    record(directory, 10, name="a")
    return directory


def test_snapshots_carry_time_batch_name_and_moments(directory, batches):
    run = TrainingRun(directory, make_model())
    X = run.snapshots(batches)
    assert len(X) == 2 * len(run.states)
    assert [s.batch for s in X[:3]] == [0, 1, 0]
    assert {s.name for s in X} == {"a"}
    assert {s.name for s in run.snapshots(batches, name="b")} == {"b"}
    assert X[0].optimizer.name == "AdamW"
    assert X[0].optimizer.load() == {}
    assert X[-1].optimizer.load()["3.bias"]["exp_avg"].shape == (1,)
    frame = ShellEnergyEstimator(n_steps=5).fit(X).transform(X)
    assert len(frame) == len(X)


def test_steps_are_chosen(directory, batches):
    run = TrainingRun(directory, make_model())
    X = run.snapshots(batches, steps=[10, 0])
    assert [s.tau for s in X[::2]] == [run.history["tau"].iloc[-1], 0.0]
    with pytest.raises(ValueError, match=r"no state was kept at \[5\]; the run has \[0, 1, 2"):
        run.snapshots(batches, steps=[5])


def test_where_tau_stands_still_the_first_state_is_taken(batches):
    model = make_model()
    state = copy_state(model)
    saved = [SavedState(step, tau, state) for step, tau in ((0, 0.0), (1, 0.0), (2, 0.1))]
    run = TrainingRun._of_states(model, saved[::-1], pd.DataFrame())
    assert run.states["step"].tolist() == [0, 1, 2]
    assert [s.tau for s in run.snapshots(batches)] == [0.0, 0.0, 0.1, 0.1]


def test_the_run_of_another_model_is_refused(directory):
    with pytest.raises(ValueError, match=r"run of another model, Sequential; not in the model: 0"):
        TrainingRun(directory, nn.Linear(3, 1))
    other = make_model()
    other[3] = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"of another shape: 3.weight, 3.bias"):
        TrainingRun(directory, other)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "has no run.json.*from_checkpoints"),
        ("{", ValueError, "cannot be read"),
        ('{"kind": "other", "version": 1, "tensors": {}}', ValueError, "not the card"),
        ('{"kind": "spectralshell run", "version": 9, "tensors": {}}', ValueError, "not the card"),
    ],
)
def test_a_directory_that_is_no_run_is_refused(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(error, match=message):
        TrainingRun(tmp_path, make_model())


@pytest.mark.parametrize(
    ("probe", "error", "message"),
    [
        ([], ValueError, "probe_batches is empty"),
        ([torch.ones(4, 3)], ValueError, r"probe_batches\[0\] must be a pair.*without labels"),
        ([(torch.ones(4, 3),)], ValueError, "got tuple of 1: a batch without labels"),
        ([{"input_ids": torch.ones(4, 3)}], ValueError, "has no 'labels', only input_ids"),
        (torch.ones(4, 3), ValueError, "must be a pair"),
        ({"labels": torch.ones(4)}, TypeError, "must be an iterable of batches"),
        (3, TypeError, "must be an iterable of batches"),
    ],
)
def test_probe_batches_that_cannot_be_measured_are_named(directory, probe, error, message):
    with pytest.raises(error, match=message):
        TrainingRun(directory, make_model()).snapshots(probe)


def test_a_loader_that_shuffles_is_warned_of_and_read_once(directory):
    data = TensorDataset(torch.randn(12, 3), torch.randn(12, 1))
    run = TrainingRun(directory, make_model())
    with pytest.warns(RunWarning, match="draws its samples at random"):
        X = run.snapshots(DataLoader(data, batch_size=4, shuffle=True))
    first, last = X[0], X[-3]
    assert first.batch == last.batch
    assert torch.equal(first.inputs, last.inputs)
    run.snapshots(DataLoader(data, batch_size=4))  # no warning
