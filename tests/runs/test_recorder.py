"""The recorder writes what it promises, within its budget, and never touches the training."""

import errno
import random

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectralshell import ShellEnergyEstimator
from spectralshell.runs import TrainingRecorder, TrainingRun
from spectralshell.runs import atomic_files as files_module
from spectralshell.runs import history as history_module
from spectralshell.warning_categories import RunWarning
from tests.runs.loops import make_model, make_optimizer, record, take_step


def _run(directory):
    return TrainingRun(directory, make_model())


@pytest.mark.parametrize(
    ("states", "steps"),
    [
        ("log:8", [0, 1, 2, 3, 4, 6, 7, 10, 13, 18, 24, 30]),
        ("every:12", [0, 12, 24, 30]),
        ([5, 9, 90], [0, 5, 9]),
        (lambda step: step % 11 == 0, [0, 11, 22]),
    ],
    ids=["log", "every", "list", "function"],
)
def test_states_are_kept_where_they_are_due(tmp_path, states, steps):
    record(tmp_path, 30, states=states)
    frame = _run(tmp_path).states
    assert frame["step"].tolist() == steps
    assert (frame["bytes"] > 0).all()


def test_a_saved_state_is_the_models_at_that_step(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    kept = [{k: v.clone() for k, v in model.state_dict().items()}]
    with TrainingRecorder(model, optimizer, tmp_path, states="every:1"):
        for step in range(3):
            take_step(model, optimizer, step)
            kept.append({k: v.clone() for k, v in model.state_dict().items()})
    snapshots = _run(tmp_path).snapshots([(torch.ones(4, 3), torch.zeros(4, 1))])
    for snapshot, state in zip(snapshots, kept, strict=True):
        loaded = snapshot.load_state()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
    for name, parameter in model.named_parameters():
        held = snapshots[-1].optimizer.load()[name]
        assert torch.equal(held["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])
    assert [s.tau for s in snapshots] == _run(tmp_path).states["tau"].tolist()


def test_the_history_holds_each_step(tmp_path):
    record(tmp_path, 20)
    history = _run(tmp_path).history
    assert list(history) == list(history_module.COLUMNS)
    assert history["step"].tolist() == list(range(1, 21))
    rates = [0.02 / (1 + 0.01 * step) for step in range(20)]
    np.testing.assert_array_equal(history["lr"], rates)
    np.testing.assert_allclose(history["tau"], np.cumsum(rates), rtol=1e-12)
    assert history["loss"].notna().all()
    assert history["grad_norm"].isna().all()
    assert (history["seconds"].diff().dropna() > 0).all()


def _trained(directory=None, *, estimator=None):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    model = make_model()
    model.append(nn.Dropout(0.5))
    optimizer = make_optimizer(model)
    if directory is None:
        for step in range(12):
            take_step(model, optimizer, step)
    else:
        batch = [(torch.ones(4, 3), torch.zeros(4, 1))] if estimator else None
        with TrainingRecorder(
            model, optimizer, directory, estimator=estimator, probe_batches=batch
        ) as recorder:
            for step in range(12):
                take_step(model, optimizer, step, recorder)
    grads = [p.grad for p in model.parameters()]
    draws = (torch.rand(1).item(), random.random(), np.random.rand())  # noqa: NPY002
    return [*model.state_dict().values(), *grads], draws, optimizer


class _Draws:
    """An estimator that takes from every source of random numbers."""

    def __init__(self):
        self.fitted_ = True

    def transform(self, X):
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        return pd.DataFrame({"tau": [s.tau for s in X]})


@pytest.mark.parametrize("estimator", [None, ShellEnergyEstimator(n_steps=5), _Draws()])
def test_training_is_the_same_to_the_last_bit(tmp_path, estimator):
    (plain, draws, _), (recorded, other, optimizer) = (
        _trained(),
        _trained(tmp_path, estimator=estimator),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert draws == other
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("first", [True, False], ids=["before the step", "after the step"])
def test_values_go_to_their_step_before_or_after_it(tmp_path, first):
    model = make_model()
    optimizer = make_optimizer(model)
    with TrainingRecorder(model, optimizer, tmp_path) as recorder:
        for step in range(4):
            if first:
                recorder.log(loss=torch.tensor(float(step)), grad_norm=1)
            take_step(model, optimizer, step)
            if not first:
                recorder.log(loss=torch.tensor(float(step)), grad_norm=1)
    assert _run(tmp_path).history["loss"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_logging_takes_no_graph_and_no_later_value(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    with TrainingRecorder(model, optimizer, tmp_path) as recorder:
        take_step(model, optimizer, 0)
        loss = (model(torch.ones(2, 3)) * 0 + 3).mean()
        recorder.log(loss=loss)
        with torch.no_grad():
            loss.mul_(7)
        with pytest.raises(TypeError, match=r"loss must be one number, got a tensor of \(2,\)"):
            recorder.log(loss=torch.ones(2))
        with pytest.raises(TypeError, match="tokens must be a number"):
            recorder.log(tokens="many")
    assert _run(tmp_path).history["loss"].tolist() == [3.0]


class _ReadsNothing(TorchDispatchMode):
    """Fails where a tensor's value is asked for, which on a GPU waits for all that came before."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_value_is_read_at_a_step(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, fused=True)
    with TrainingRecorder(model, optimizer, tmp_path, states=[]) as recorder:
        optimizer.found_inf = torch.tensor(0.0)  # as a scaler sets it
        with _ReadsNothing():
            for step in range(5):
                take_step(model, optimizer, step, recorder)
        del optimizer.found_inf
        with pytest.raises(AssertionError), _ReadsNothing():
            torch.ones(1).item()  # it would be seen
    assert len(_run(tmp_path).history) == 5


def test_the_buffer_is_written_on_the_way(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    with TrainingRecorder(model, optimizer, tmp_path, states=[]) as recorder:
        for step in range(300):
            take_step(model, optimizer, step, recorder)
        assert 250 <= len(_run(tmp_path).history) < 300
        recorder.flush()
        recorder.flush()
        assert len(_run(tmp_path).history) == 300
        recorder.log(grad_norm=5.0)  # of the last step, which is on disk already
    assert _run(tmp_path).history["grad_norm"].iloc[-1] == 5.0


def test_max_bytes_thins_the_densest_states(tmp_path):
    record(tmp_path / "all", 60, states="every:5")
    one = _run(tmp_path / "all").states["bytes"].iloc[-1]
    record(tmp_path / "few", 60, states="every:5", max_bytes=int(6.5 * one) + 60 * 100)
    steps = _run(tmp_path / "few").states["step"].tolist()
    total = sum(p.stat().st_size for p in (tmp_path / "few").rglob("*.safetensors"))
    assert total <= 6.5 * one + 6000
    assert steps[0] == 0
    assert steps[-1] == 60
    assert len(steps) >= 5
    assert max(np.diff(steps)) <= 4 * min(np.diff(steps))


def test_no_room_is_told_once(tmp_path):
    with pytest.warns(RunWarning, match="max_bytes=100 has no room") as caught:
        record(tmp_path, 10, max_bytes=100)
    assert len(caught) == 1
    assert len(_run(tmp_path).history) == 10


def test_max_overhead_leaves_states_out(tmp_path, monkeypatch):
    record(tmp_path / "free", 30, states="every:1")
    _, _, recorder = record(tmp_path / "held", 30, states="every:1", max_overhead=0.0)
    assert len(_run(tmp_path / "free").states) == 31
    assert _run(tmp_path / "held").states["step"].tolist() == [0]
    assert recorder.overhead > 0


def test_measures_in_the_loop_are_those_of_the_states(tmp_path):
    batches = [(torch.randn(6, 3), torch.randn(6, 1)) for _ in range(2)]
    options = {"estimator": ShellEnergyEstimator(n_steps=6), "probe_batches": batches}
    record(tmp_path / "kept", 10, **options)
    record(tmp_path / "none", 10, max_bytes=0, **options)
    run = _run(tmp_path / "kept")
    assert _run(tmp_path / "none").states.empty
    in_the_loop = _run(tmp_path / "none").measures
    pd.testing.assert_frame_equal(in_the_loop, run.measures)
    assert in_the_loop["step"].unique().tolist() == run.states["step"].tolist()
    for step in (0, 10):
        X = run.snapshots(batches, steps=[step])
        later = ShellEnergyEstimator(n_steps=6).fit(X).shells_.reset_index(drop=True)
        rows = in_the_loop[in_the_loop["step"] == step].drop(columns="step")
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), later)
    resumed = record(tmp_path / "kept", 13, resume=True, **options)[0]
    assert TrainingRun(tmp_path / "kept", resumed).measures["step"].max() == 13


def test_a_fitted_estimator_measures_by_its_own_edges(tmp_path):
    batches = [(torch.randn(6, 3), torch.randn(6, 1))]
    fitted = ShellEnergyEstimator(n_steps=6).fit([(make_model(), *batches[0])])
    record(tmp_path, 4, estimator=fitted, probe_batches=batches)
    measured = _run(tmp_path).measures
    shells = measured[measured["resolved"] & (measured["lambda_lo"] > 0)]
    assert len(shells)
    assert set(shells["lambda_lo"]) <= set(fitted.edges_)


def test_a_measure_that_fails_lets_training_go_on(tmp_path):
    class Fails:
        def __init__(self):
            self.fitted_ = True

        def transform(self, X):
            raise RuntimeError("no luck")

    batches = [(torch.randn(6, 3), torch.randn(6, 1))]
    with pytest.warns(RunWarning, match="could not measure a state .*no luck"):
        record(tmp_path, 6, estimator=Fails(), probe_batches=batches)
    assert len(_run(tmp_path).history) == 6


@pytest.mark.parametrize("bad", [lambda _: "much", lambda _: 1 / 0], ids=["a word", "an error"])
def test_a_step_that_cannot_be_counted_ends_the_recording(tmp_path, bad):
    with pytest.warns(RunWarning, match="ended: a step could not be counted"):
        model, optimizer, _ = record(tmp_path, 5, tau=bad)
    assert not optimizer._optimizer_step_post_hooks
    assert float(optimizer.state[model[0].weight]["step"]) == 5
    assert _run(tmp_path).history.empty


def test_steps_before_one_that_cannot_be_counted_are_written(tmp_path):
    increments = iter([0.5, 0.5, 0.5, "much", 0.5])
    with pytest.warns(RunWarning, match="ended: a step could not be counted"):
        record(tmp_path, 5, kind="adam", states=[], tau=lambda _: next(increments))
    assert _run(tmp_path).history["tau"].tolist() == [0.5, 1.0, 1.5]


def test_the_last_state_is_that_of_the_last_step(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    with TrainingRecorder(model, optimizer, tmp_path, states="every:100") as recorder:
        take_step(model, optimizer, 0)
        trained = model[0].weight.detach().clone()
        recorder.keep_last()
        with torch.no_grad():
            model[0].weight.zero_()  # as an average or the best weights are loaded
    last = _run(tmp_path).snapshots([(torch.ones(4, 3), torch.zeros(4, 1))])[-1].load_state()
    assert torch.equal(last["0.weight"], trained)


@pytest.mark.parametrize("full_from", ["replace", "write"])
def test_a_full_disk_leaves_a_run_that_opens(tmp_path, monkeypatch, full_from):
    model = make_model()
    optimizer = make_optimizer(model)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    recorder = TrainingRecorder(model, optimizer, tmp_path).open()
    for step in range(5):
        take_step(model, optimizer, step, recorder)
    with monkeypatch.context() as patched:
        if full_from == "replace":
            patched.setattr(files_module.os, "fsync", full)
        else:
            patched.setattr("builtins.open", full)
        with pytest.warns(RunWarning, match="No space left"):
            _take_steps(model, optimizer, range(5, 10), recorder)
    assert _run(tmp_path).states["step"].tolist() == [0, 1, 2, 3, 4]
    assert not list(tmp_path.rglob("*.unfinished"))
    for step in range(10, 13):  # there is room again
        take_step(model, optimizer, step, recorder)
    recorder.close()
    run = _run(tmp_path)
    assert run.history["step"].tolist() == list(range(1, 14))
    assert run.states["step"].tolist() == [0, 1, 2, 3, 4, 13]


def test_a_disk_that_is_full_at_the_beginning_is_an_error(tmp_path, monkeypatch):
    model = make_model()
    optimizer = make_optimizer(model)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        TrainingRecorder(model, optimizer, tmp_path).open()
    assert not optimizer._optimizer_step_post_hooks


def _take_steps(model, optimizer, steps, recorder):
    for step in steps:
        take_step(model, optimizer, step, recorder)
    recorder.flush()


def _interrupted(directory):
    model = make_model()
    optimizer = make_optimizer(model)
    with TrainingRecorder(model, optimizer, directory):
        for step in range(5):
            take_step(model, optimizer, step)
        raise KeyboardInterrupt


def test_a_failed_loop_keeps_its_history(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path)
    assert len(_run(tmp_path).history) == 5
    assert _run(tmp_path).states["step"].tolist() == [0, 1, 2, 3, 4]


def test_a_recorder_left_open_is_closed_by_the_next(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    left = TrainingRecorder(model, optimizer, tmp_path).open()
    take_step(model, optimizer, 0)
    recorder = TrainingRecorder(model, optimizer, tmp_path, resume=True)
    with pytest.warns(RunWarning, match="was still open.*closed at step 1"):
        recorder.open()
    assert recorder.step == 1
    take_step(model, optimizer, 1)
    recorder.close()
    assert left.step == 1
    assert _run(tmp_path).history["step"].tolist() == [1, 2]


def test_wrappers_are_taken_off(tmp_path):
    model = make_model()
    optimizer = make_optimizer(model)
    with TrainingRecorder(nn.DataParallel(model), optimizer, tmp_path) as recorder:
        take_step(model, optimizer, 0)
    assert recorder.model is model


def test_tied_and_viewed_parameters_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    flat = torch.zeros(20)
    model[0].bias.data = flat[4:7]
    model.register_buffer("passing", torch.ones(2), persistent=False)
    with TrainingRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path):
        pass
    (snapshot,) = TrainingRun(tmp_path, model).snapshots([(torch.ones(4, 3), torch.zeros(4, 3))])
    assert sorted(snapshot.load_state()) == ["0.bias", "0.weight", "1.bias", "passing"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"states": "log"}, ValueError, r'states must be "log:8".*got \'log\''),
        ({"states": "every:0"}, ValueError, "states must be"),
        ({"states": 5}, TypeError, "states must be .*got int"),
        ({"states": [-1]}, ValueError, "states"),
        ({"max_bytes": -1}, ValueError, "max_bytes"),
        ({"max_overhead": 2.0}, ValueError, "max_overhead"),
        ({"name": ""}, ValueError, "name"),
        ({"step": 3}, ValueError, "needs resume=True"),
        ({"resume": True, "overwrite": True}, ValueError, "both set"),
        ({"estimator": ShellEnergyEstimator()}, ValueError, "belong together"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be"),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())},
            ValueError,
            "holds no parameter of the model",
        ),
        ({"model": 3}, TypeError, "model must be"),
    ],
)
def test_wrong_parameters_are_named(tmp_path, options, error, message):
    model = make_model()
    arguments = {"model": model, "optimizer": make_optimizer(model), **options}
    with pytest.raises(error, match=message):
        TrainingRecorder(directory=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


class Factored(torch.optim.SGD):
    """Keeps the means of rows, as Adafactor does."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None and p.ndim > 1:
                        self.state[p]["row"] = p.grad.square().mean(1)
        return super().step(closure)


def test_moments_of_other_shapes_are_told_and_left_out(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = Factored(model.parameters(), lr=0.1, momentum=0.9)

    def train(n_steps, **options):
        with TrainingRecorder(model, optimizer, tmp_path / "run", tau=0.1, **options):
            for _ in range(n_steps):
                model(torch.ones(4, 3)).square().mean().backward()
                optimizer.step()

    with pytest.warns(RunWarning, match="keeps no moments of Factored"):
        train(5)
    run = TrainingRun(tmp_path / "run", model)
    batch = (torch.ones(4, 3), torch.zeros(4, 2))
    assert len(run.snapshots([batch])) == len(run.states) > 1
    recorder = TrainingRecorder(model, optimizer, tmp_path / "run", tau=0.1, resume=True)
    with pytest.raises(ValueError, match="needs the moments of step 5"):
        recorder.restore()
    assert len(TrainingRun(tmp_path / "run", model).states) == len(run.states)


def grouped(still):
    """Return a model and an optimiser whose first group does not move."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    first = {"params": list(model[0].parameters()), "lr": 0.3}
    if still == "frozen":
        model[0].requires_grad_(False)
    elif still == "empty":
        first = {"params": [], "lr": 0.3}
    else:
        first["lr"] = 0.0
    groups = [first, {"params": list(model[1].parameters()), "weight_decay": 0.5}]
    return model, torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0)


@pytest.mark.parametrize("still", ["frozen", "empty", "rate 0"])
def test_tau_is_that_of_the_first_group_that_moves(still, tmp_path):
    model, optimizer = grouped(still)

    def train(n_steps):
        for _ in range(n_steps):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().mean().backward()
            optimizer.step()

    with TrainingRecorder(model, optimizer, tmp_path / "run", states=[5]) as recorder:
        train(8)
    # From a row of the history, which has no state.
    with TrainingRecorder(model, optimizer, tmp_path / "run", states=[10], resume=True, step=8):
        train(2)
    run = TrainingRun(tmp_path / "run", model)
    assert np.allclose(run.history["tau"], 0.1 * np.arange(1, 11), rtol=0, atol=1e-12)
    assert np.allclose(run.history["tau_weight_decay"], 0.05 * np.arange(1, 11), rtol=0, atol=1e-12)
    batch = (torch.ones(4, 3), torch.zeros(4, 2))
    assert [round(s.tau, 9) for s in run.snapshots([batch])] == [0.0, 0.5, 1.0]
    assert recorder.step == 8


def test_a_group_of_reference_that_stops_is_told(tmp_path):
    model, optimizer = grouped("rate 0")
    optimizer.param_groups[0]["lr"] = 0.2

    def train():
        with TrainingRecorder(model, optimizer, tmp_path / "run", states=[6]):
            for step in range(6):
                if step == 2:
                    optimizer.param_groups[0]["lr"] = 0.0
                optimizer.zero_grad()
                model(torch.ones(4, 3)).square().mean().backward()
                optimizer.step()

    with pytest.warns(RunWarning, match="group 0, which stood still at 4 steps"):
        train()
