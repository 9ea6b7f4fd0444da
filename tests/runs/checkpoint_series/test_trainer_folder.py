"""Folders of a real Trainer: effective time out of its logs, moments by name."""

import itertools
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from spectralshell.models.trainer_optimizer import TrainerOptimizer
from spectralshell.runs import TrainingRun
from spectralshell.warning_categories import RunWarning
from tests.models.checkpoints.kinds import language_model, train_with_trainer

TOLERANCE = 1e-12
"""Of sums of a few rates in double precision."""


class Spy(TrainerCallback):
    """Sums the rates that the optimiser uses, and keeps it."""

    def __init__(self):
        self.tau, self.sums = 0.0, []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **others):
        self.optimizer = optimizer
        self.tau += optimizer.param_groups[0]["lr"]
        self.sums.append(self.tau)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, spy = tmp_path_factory.mktemp("trainer"), Spy()
    model = train_with_trainer(
        folder / "run",
        language_model(),
        n_steps=5,
        callbacks=[spy],
        warmup_steps=2,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
    )
    return folder / "run", model, spy


@pytest.fixture
def run_folder(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


def test_tau_is_the_sum_of_the_rates_that_were_used(trained):
    folder, _, spy = trained
    run = TrainingRun.from_checkpoints(folder, language_model())
    assert run.states["step"].tolist() == [2, 4, 5]
    assert np.allclose(
        run.states["tau"], [spy.sums[1], spy.sums[3], spy.sums[4]], rtol=0, atol=TOLERANCE
    )
    assert np.allclose(run.history["tau"], spy.sums, rtol=0, atol=TOLERANCE)
    assert run.history["loss"].notna().all()


def test_moments_are_those_of_each_parameter(trained):
    folder, model, spy = trained
    run = TrainingRun.from_checkpoints(folder, language_model())
    rows = torch.zeros(1, 4, dtype=torch.long)
    snapshot = run.snapshots([({"input_ids": rows}, rows)])[-1]
    found = snapshot.optimizer.load()
    live = spy.optimizer.optimizer if hasattr(spy.optimizer, "optimizer") else spy.optimizer
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for part in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found[name][part], live.state[parameter][part])
    decays = [group["weight_decay"] for group in snapshot.optimizer.groups]
    assert decays == [0.1, 0.0]
    assert snapshot.optimizer.group_of["transformer.ln_f.weight"] == 1


def test_moments_that_cannot_be_matched_are_left_out_with_a_warning(run_folder):
    for path in run_folder.glob("checkpoint-*/optimizer.pt"):
        content = torch.load(path, weights_only=True)
        first, second = content["param_groups"]
        second["params"], first["params"] = second["params"][:-1], [*first["params"], 15]
        torch.save(content, path)
    with pytest.warns(RunWarning, match=r"does not tell which parameter.*3 of 3 checkpoints"):
        run = TrainingRun.from_checkpoints(run_folder, language_model())
    assert run.states["moments"].isna().all()


ORDERS = {
    "norms by name": ([1, 2], ["b.weight", "a_norm.weight", "c_norm.weight"]),
    "before": ([3, 0], ["a_norm.weight", "b.weight", "c_norm.weight"]),
    "one group": ([3], ["a_norm.weight", "b.weight", "c_norm.weight"]),
}


def three_layers():
    names = ("a_norm", "b", "c_norm")
    return torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in names})


def save_groups(path, sizes, shape=(2, 2)):
    ends = np.cumsum([0, *sizes])
    groups = [{"params": list(range(a, b))} for a, b in itertools.pairwise(ends)]
    state = {key: {"exp_avg": torch.ones(shape)} for key in range(sum(sizes))}
    torch.save({"state": state, "param_groups": groups}, path)


@pytest.mark.parametrize("order", ORDERS)
def test_the_rules_of_versions_are_told_apart_by_the_sizes_of_groups(tmp_path, order):
    sizes, names = ORDERS[order]
    save_groups(tmp_path / "optimizer.pt", sizes)
    found = TrainerOptimizer.of(three_layers(), str(tmp_path / "optimizer.pt"))
    assert list(found.group_of) == names


@pytest.mark.parametrize(("sizes", "shape"), [([2, 1], (2, 2)), ([1, 1], (2, 2)), ([3], (4,))])
def test_groups_that_a_trainer_does_not_make_are_refused(tmp_path, sizes, shape):
    save_groups(tmp_path / "optimizer.pt", sizes, shape)
    with pytest.raises(ValueError, match="does not tell which parameter is which"):
        TrainerOptimizer.of(three_layers(), str(tmp_path / "optimizer.pt"))


def changed(folder, step, change):
    path = folder / f"checkpoint-{step}" / "trainer_state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def without_a_log(folder):
    changed(folder, 5, lambda state: state["log_history"].pop(2))


def with_the_next_rates(folder):
    """As transformers before 5 wrote them."""

    def shift(state):
        rates = [entry["learning_rate"] for entry in state["log_history"][1:5]]
        for entry, rate in zip(state["log_history"], [*rates, 0.0], strict=False):
            entry["learning_rate"] = rate

    changed(folder, 5, shift)
    of_version(folder, "4.40.0")


def of_version(folder, version):
    path = folder / "checkpoint-5" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": version}))


def with_momentum(folder):
    path = folder / "checkpoint-5" / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    for group in content["param_groups"]:
        group["momentum"] = 0.9
    torch.save(content, path)


def with_skipped_steps(folder):
    path = folder / "checkpoint-5" / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    for held in content["state"].values():
        held["step"] -= 1
    torch.save(content, path)


UNKNOWN = {
    "a log missing": (without_a_log, r"of 4 of 5 steps \(not of step 3;.*logging_steps=1\).*tau="),
    "next rates": (with_the_next_rates, "the rate of the next, as transformers before 5"),
    "momentum": (with_momentum, "has momentum 0.9"),
    "skipped steps": (with_skipped_steps, "took 4 of 5 steps"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_rates_that_do_not_tell_tau_are_refused(run_folder, kind):
    change, message = UNKNOWN[kind]
    change(run_folder)
    with pytest.raises(ValueError, match=message):
        TrainingRun.from_checkpoints(run_folder / "checkpoint-5", language_model())
    run = TrainingRun.from_checkpoints(run_folder, language_model(), tau="steps")
    assert run.states["tau"].tolist() == [2.0, 4.0, 5.0]


def test_an_older_log_whose_rates_are_those_of_their_steps_is_told_by_the_scheduler(
    run_folder, trained
):
    of_version(run_folder, "4.57.0")
    changed(run_folder, 5, lambda state: None)
    path = run_folder / "checkpoint-5"
    following = torch.load(path / "scheduler.pt", weights_only=True)["_last_lr"][0]
    assert following != pytest.approx(
        json.loads((path / "trainer_state.json").read_text())["log_history"][4]["learning_rate"]
    )
    run = TrainingRun.from_checkpoints(path, language_model())
    assert run.states["tau"].tolist() == pytest.approx([trained[2].sums[-1]], abs=TOLERANCE)


def test_without_the_optimiser_the_sum_is_taken_with_a_warning(run_folder, trained):
    for path in run_folder.glob("checkpoint-*/optimizer.pt"):
        path.unlink()
    with pytest.warns(RunWarning, match=r"no optimizer\.pt, so τ is the sum"):
        run = TrainingRun.from_checkpoints(run_folder, language_model())
    assert run.states["tau"].tolist()[-1] == pytest.approx(trained[2].sums[-1], abs=TOLERANCE)
    assert run.states["moments"].isna().all()


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "config.json"])
def test_notes_behind_a_link_are_not_read(run_folder, name):
    of_version(run_folder, "4.57.0")
    path = run_folder / "checkpoint-5" / name
    path.rename(run_folder.parent / name)
    path.symlink_to(run_folder.parent / name)
    with pytest.raises(ValueError, match="lies outside its folder"):
        TrainingRun.from_checkpoints(run_folder / "checkpoint-5", language_model())


def test_an_output_folder_with_a_state_of_its_own_is_still_its_checkpoints(run_folder):
    # save_state() at the end of a script writes it.
    shutil.copy(run_folder / "checkpoint-5" / "trainer_state.json", run_folder)
    run = TrainingRun.from_checkpoints(run_folder, language_model())
    assert run.states["step"].tolist() == [2, 4, 5]


def of_another_run(folder):
    def faster(state):
        for entry in state["log_history"]:
            if "learning_rate" in entry:
                entry["learning_rate"] *= 10.0

    changed(folder, 4, faster)


def with_a_negative_rate(folder):
    changed(folder, 5, lambda state: state["log_history"][1].update(learning_rate=-1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_run, "tau goes back.*more than one run"),
        (with_a_negative_rate, "a logged learning rate is negative"),
    ],
)
def test_logs_that_do_not_belong_together_are_refused(run_folder, change, message):
    change(run_folder)
    with pytest.raises(ValueError, match=message):
        TrainingRun.from_checkpoints(run_folder, language_model())


NO_OPTIMIZERS = [{"foo": 1}, [1], {"param_groups": [1, 2]}]


@pytest.mark.parametrize("content", NO_OPTIMIZERS, ids=str)
def test_a_file_that_is_no_optimiser_leaves_the_weights(run_folder, content):
    torch.save(content, run_folder / "checkpoint-5" / "optimizer.pt")
    with pytest.warns(RunWarning, match="moments of 1 of 3 checkpoints are left out"):
        run = TrainingRun.from_checkpoints(run_folder, language_model(), tau="steps")
    assert run.states["moments"].notna().tolist() == [True, True, False]
    with pytest.raises(ValueError, match="no state of an optimiser"):
        TrainingRun.from_checkpoints(run_folder / "checkpoint-5", language_model())


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "config.json"])
def test_a_side_file_that_was_cut_off_leaves_the_weights(run_folder, name):
    of_version(run_folder, "4.40.0")
    path = run_folder / "checkpoint-5" / name
    path.write_bytes(path.read_bytes()[:40])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        run = TrainingRun.from_checkpoints(run_folder, language_model(), tau="steps")
    assert run.states["step"].tolist() == [2, 4, 5]
