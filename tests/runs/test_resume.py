"""A run that was killed or stopped goes on, and equals the run that never was."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spectralshell.runs import TrainingRecorder, TrainingRun
from spectralshell.runs.history import HistoryFile
from spectralshell.warning_categories import RunWarning
from tests.runs.loops import make_model, make_optimizer, record, take_step

STEPS = 150


def _assert_equal_runs(one, other):
    """Histories but for the seconds, states and moments, to the last bit."""
    runs = [TrainingRun(directory, make_model()) for directory in (one, other)]
    histories = [run.history.drop(columns="seconds") for run in runs]
    for name in histories[0]:
        np.testing.assert_array_equal(histories[0][name], histories[1][name], err_msg=name)
    steps = [run.states["step"].tolist() for run in runs]
    assert steps[0] == steps[1]
    for column in ("path", "moments"):
        for a, b in zip(*(run.states[column] for run in runs), strict=True):
            left, right = load_file(a), load_file(b)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)


def _killed_after(seconds, directory, kind):
    """Record in a process of its own and kill it; tell whether it had not come to its end."""
    child = os.fork()
    if child == 0:
        try:
            record(directory, STEPS, kind=kind, states="every:7", resume=True)
        except BaseException:
            os._exit(1)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def _kill_often(tmp_path, kind, n_kills):
    record(tmp_path / "warm-up", 3, kind=kind)  # what torch imports at its first step
    began = time.perf_counter()
    record(tmp_path / "whole", STEPS, kind=kind, states="every:7")
    longest = 0.6 * (time.perf_counter() - began)
    drawn = random.Random(n_kills)
    kills = 0
    for attempt in range(50 * n_kills):
        directory = (
            tmp_path / f"killed-{kills // 3}"
        )  # a new run after some, as runs come to an end
        kills += _killed_after(drawn.uniform(0, longest), directory, kind)
        if (directory / "run.json").exists() and attempt % 3 == 0:
            TrainingRun(directory, make_model())  # opens as the kill left it
        if kills == n_kills:
            break
    assert kills == n_kills
    for directory in tmp_path.glob("killed-*"):
        record(directory, STEPS, kind=kind, states="every:7", resume=True)
        _assert_equal_runs(directory, tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes to kill")
@pytest.mark.parametrize(
    ("kind", "n_kills"),
    [
        ("adamw", 3),
        ("sgd", 3),
        pytest.param("adamw", 20, marks=pytest.mark.slow),
        pytest.param("sgd", 20, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_and_resumed_equals_never_killed(tmp_path, kind, n_kills):
    _kill_often(tmp_path, kind, n_kills)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_checkpoint_of_the_user_goes_on_at_its_step(tmp_path, kind):
    record(tmp_path / "whole", 40, kind=kind)
    model = make_model()
    optimizer = make_optimizer(model, kind)
    with TrainingRecorder(model, optimizer, tmp_path / "resumed") as recorder:
        for step in range(30):
            take_step(model, optimizer, step, recorder)
            if step + 1 == 25:  # between two states
                saved = {k: v.clone() for k, v in model.state_dict().items()}
                moments = optimizer.state_dict()
                moments = torch.load(_saved(moments, tmp_path), weights_only=True)
                recorder.flush()
        recorder.abandon()  # no last state
    model = make_model()
    model.load_state_dict(saved)
    optimizer = make_optimizer(model, kind)
    optimizer.load_state_dict(moments)
    # Adam counts its steps; for SGD they are said.
    given = None if kind == "adamw" else 25
    again = TrainingRecorder(model, optimizer, tmp_path / "resumed", resume=True, step=given)
    with again:
        assert again.step == 25
        for step in range(25, 40):
            take_step(model, optimizer, step, again)
    whole, resumed = (
        TrainingRun(tmp_path / name, make_model()).history for name in ("whole", "resumed")
    )
    for name in ("step", "tau", "tau_weight_decay", "lr", "loss"):
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)


def _saved(content, tmp_path):
    torch.save(content, tmp_path / "optimizer.pt")
    return tmp_path / "optimizer.pt"


def test_a_stopped_run_finds_its_state_by_the_model(tmp_path):
    model, optimizer, _ = record(tmp_path, 10, kind="sgd")
    with TrainingRecorder(model, optimizer, tmp_path, resume=True) as recorder:
        assert recorder.step == 10
    assert len(TrainingRun(tmp_path, model).history) == 10


def test_restoring_gives_model_optimiser_and_place(tmp_path):
    model, optimizer, _ = record(tmp_path, 10)
    other = make_model()
    with torch.no_grad():
        other[0].weight.zero_()
    held = make_optimizer(other)
    recorder = TrainingRecorder(other, held, tmp_path, resume=True)
    assert recorder.restore() == 10
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        saved, loaded = optimizer.state[p], held.state[q]
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert held.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert held.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]


def test_a_recorder_that_is_opened_again_goes_on_where_it_ended(tmp_path):
    record(tmp_path, 10)
    model = make_model()
    optimizer = make_optimizer(model)
    recorder = TrainingRecorder(model, optimizer, tmp_path, resume=True)
    recorder.restore()
    for steps in (range(10, 15), range(15, 20)):
        with recorder:
            for step in steps:
                take_step(model, optimizer, step, recorder)
    assert TrainingRun(tmp_path, model).history["step"].tolist() == list(range(1, 21))


def test_what_came_after_the_restored_step_is_dropped(tmp_path):
    record(tmp_path, 40, states="every:5")
    model = make_model()
    state = load_file(tmp_path / "states" / "step-0000000020.safetensors")
    model.load_state_dict(state, strict=False)
    with TrainingRecorder(
        model, make_optimizer(model), tmp_path, states="every:5", resume=True
    ) as recorder:
        assert recorder.step == 20
    run = TrainingRun(tmp_path, model)
    assert run.history["step"].iloc[-1] == 20
    assert run.states["step"].tolist() == [0, 5, 10, 15, 20]
    assert len(list((tmp_path / "moments").iterdir())) == 5


def test_a_state_whose_row_was_lost_is_not_gone_on_from(tmp_path):
    record(tmp_path, 10)
    HistoryFile(tmp_path / "history.bin").resume(8)
    model = make_model()
    assert TrainingRun(tmp_path, model).states["step"].iloc[-1] == 10  # still read
    assert TrainingRecorder(model, make_optimizer(model), tmp_path, resume=True).restore() == 7


def test_a_new_directory_begins_at_zero(tmp_path):
    model = make_model()
    recorder = TrainingRecorder(model, make_optimizer(model), tmp_path / "new", resume=True)
    assert recorder.restore() == 0


def _first_state():
    model = make_model()
    return model, make_optimizer(model, "sgd")


def _changed_state():
    model, optimizer = _first_state()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    return model, optimizer


def _other_model():
    model = torch.nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _files(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (_first_state, {}, "holds a run already. Pass resume=True"),
        (_other_model, {"resume": True}, "run of another model, Sequential"),
        (_first_state, {"resume": True}, "would be dropped"),
        (_changed_state, {"resume": True}, "equals no state of the run"),
        (_changed_state, {"resume": True, "step": 11}, "history ends at step 10"),
    ],
)
def test_a_directory_that_does_not_fit_stays_as_it_is(tmp_path, make, options, message):
    record(tmp_path, 10, kind="sgd")
    before = _files(tmp_path)
    model, optimizer = make()
    own = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        TrainingRecorder(model, optimizer, tmp_path, **options).open()
    assert _files(tmp_path) == before
    assert all(torch.equal(own[k], v) for k, v in model.state_dict().items())
    assert not optimizer._optimizer_step_post_hooks
    record(tmp_path, 3, kind="sgd", overwrite=True)  # the lock is free again
    assert TrainingRun(tmp_path, make_model()).states["step"].tolist() == [0, 1, 2, 3]


def test_what_does_not_fit_the_optimiser_leaves_the_model(tmp_path):
    record(tmp_path, 4)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())  # one group where the run has six
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recorder = TrainingRecorder(model, optimizer, tmp_path, resume=True)
    with pytest.raises(ValueError, match="build it as it was"):
        recorder.restore()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_broken_last_state_is_passed_over(tmp_path):
    record(tmp_path, 10)
    last = tmp_path / "states" / "step-0000000010.safetensors"
    last.write_bytes(last.read_bytes()[:100])
    with pytest.warns(RunWarning, match="step-0000000010.*cannot be read"):
        run = TrainingRun(tmp_path, make_model())
    assert run.states["step"].iloc[-1] == 7
    model = make_model()
    recorder = TrainingRecorder(model, make_optimizer(model), tmp_path, resume=True)
    with pytest.warns(RunWarning, match="The state before is restored"):
        assert recorder.restore() == 7


def test_a_run_without_moments_cannot_restore_adam(tmp_path):
    record(tmp_path, 4, moments=False)
    model = make_model()
    recorder = TrainingRecorder(model, make_optimizer(model), tmp_path, resume=True)
    with pytest.raises(ValueError, match="needs the moments of step 4"):
        recorder.restore()


def test_two_recorders_do_not_write_to_one_directory(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("no locks")
    model = make_model()
    with TrainingRecorder(model, make_optimizer(model), tmp_path):
        child = os.fork()
        if child == 0:
            from spectralshell.runs import recorder as module

            module._OPEN.clear()  # as in a process of its own
            try:
                record(tmp_path, 3, overwrite=True)
            except ValueError as error:
                os._exit(0 if "another recorder is writing" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_files_without_a_card_are_not_removed(tmp_path, options):
    record(tmp_path / "lost", 10)
    (tmp_path / "lost" / "run.json").unlink()
    (tmp_path / "own" / "states").mkdir(parents=True)
    (tmp_path / "own" / "states" / "step-100.safetensors").write_text("mine")
    before = _files(tmp_path)
    for name, held in (("lost", "history.bin"), ("own", "step-100")):
        with pytest.raises(ValueError, match=f"{name}' has no run.json, but holds .*{held}"):
            record(tmp_path / name, 3, **options)
    assert _files(tmp_path) == before
    record(tmp_path / "lost", 3, overwrite=True)
    assert TrainingRun(tmp_path / "lost", make_model()).states["step"].tolist() == [0, 1, 2, 3]


def test_states_of_other_names_are_passed_over(tmp_path):
    (tmp_path / "states").mkdir()
    other = tmp_path / "states" / "step-final.safetensors"
    other.write_text("mine")
    record(tmp_path, 3)
    assert other.read_text() == "mine"
    assert TrainingRun(tmp_path, make_model()).states["step"].tolist() == [0, 1, 2, 3]
