"""A series of checkpoints as the states of a run: order, what is left out, what is read."""

import pandas as pd
import pytest
import torch

from spectralshell import Checkpoint, ShellEnergyEstimator, Snapshot
from spectralshell.models.checkpoints.tensor_files import TensorFile
from spectralshell.runs import TrainingRun
from spectralshell.warning_categories import RunWarning
from tests.models.checkpoints.kinds import copied, plain_model, train_with_lightning

MODEL = plain_model()
STEPS = (0, 20, 100, 1000)
BATCHES = [(torch.ones(5, 3), torch.ones(5, 2)), (torch.zeros(5, 3), torch.ones(5, 2))]


def state_of(step):
    return copied(plain_model(step))


@pytest.fixture
def folder(tmp_path):
    for step in STEPS:
        torch.save(state_of(step), tmp_path / f"step-{step}.pt")
    return tmp_path


def opened(checkpoints, **options):
    return TrainingRun.from_checkpoints(checkpoints, MODEL, **({"tau": "steps"} | options))


def forms(folder):
    paths = [folder / f"step-{step}.pt" for step in (1000, 0, 100, 20)]
    return {
        "pattern": str(folder / "step-*.pt"),
        "list": paths,
        "requests": [Checkpoint(path) for path in paths],
        "mapping": dict(zip((1000, 0, 100, 20), map(str, paths), strict=True)),
    }


@pytest.mark.parametrize("form", ["pattern", "list", "requests", "mapping"])
def test_states_are_in_the_order_of_their_steps(folder, form):
    run = opened(forms(folder)[form], name="a")
    assert run.states["step"].tolist() == list(STEPS)
    assert [s.tau for s in run.snapshots(BATCHES[:1])] == [float(step) for step in STEPS]
    assert run.history["tau"].tolist() == [float(step) for step in STEPS]
    assert run.left_out.empty
    for snapshot, step in zip(run.snapshots(BATCHES[:1]), STEPS, strict=True):
        expected = state_of(step)
        found = snapshot.load_state()
        assert snapshot.name == "a"
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_the_frames_are_those_of_the_states_in_memory(folder):
    X = opened(folder / "step-*.pt").snapshots(BATCHES)
    expected = [
        Snapshot(MODEL, *batch, tau=step, batch=position, state=state_of(step))
        for step in STEPS
        for position, batch in enumerate(BATCHES)
    ]
    frames = [ShellEnergyEstimator(solver="exact").fit_transform(part) for part in (X, expected)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


NAMES = {
    "checkpoint-500": 500,
    "step1000": 1000,
    "step_7.pt": 7,
    "epoch=1-step=4.ckpt": 4,
    "model_iter-30.safetensors": 30,
    "global_step12": 12,
    "12.pt": 12,
    "run7/epoch_3.pt": 3,
    "step-40/model.safetensors": 40,
    "gpt2-100M-step30.pt": 30,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_the_number_in_the_name(tmp_path, name):
    path = tmp_path / "none" / name
    path.parent.mkdir(parents=True)
    if path.suffix:
        torch.save(copied(MODEL), path)
    else:
        path.mkdir()
        torch.save(copied(MODEL), path / "pytorch_model.bin")
    assert opened([path]).states["step"].tolist() == [NAMES[name]]


@pytest.mark.parametrize(
    "name",
    [
        *("model.pt", "epoch_3_of_10.pt", "step1_step2.pt"),
        *("step_10k.pt", "step1e4.pt", "step_1_000.pt", "step-1.2M.pt", "tokens-5B.pt"),
    ],
)
def test_a_name_that_does_not_tell_the_step_is_refused(tmp_path, name):
    (tmp_path / "none").mkdir()
    torch.save(copied(MODEL), tmp_path / "none" / name)
    with pytest.raises(ValueError, match="pass a mapping of steps"):
        opened([tmp_path / "none" / name])
    assert opened({5: tmp_path / "none" / name}).states["step"].tolist() == [5]


def test_lightning_notes_the_step(tmp_path):
    train_with_lightning(tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    moved = path.rename(tmp_path / "last.ckpt")
    assert opened([moved], prefix="model.").states["step"].tolist() == [4]


def test_a_bad_checkpoint_is_raised_or_left_out(folder):
    torch.save(copied(torch.nn.Linear(3, 2)), folder / "step-50.pt")
    (folder / "step-60.pt").write_bytes(b"")
    before = copied(MODEL)
    with pytest.raises(ValueError, match=r"step-50\.pt' does not fit"):
        opened(folder / "step-*.pt")
    with pytest.warns(RunWarning, match=r"2 of 6 checkpoints were skipped: .*step-50.*step-60"):
        run = opened(folder / "step-*.pt", on_error="skip")
    assert run.states["step"].tolist() == list(STEPS)
    assert run.left_out["path"].tolist() == [str(folder / f"step-{n}.pt") for n in (50, 60)]
    assert run.left_out["status"].str.startswith("skipped: state: ").all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in MODEL.state_dict().items())


def test_where_all_are_bad_the_first_is_raised(tmp_path):
    (tmp_path / "step-60.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        opened(tmp_path / "step-60.pt", on_error="skip")


def test_only_headers_are_read(folder, monkeypatch):
    devices = []
    read = TensorFile.content
    monkeypatch.setattr(
        TensorFile, "content", lambda file, device: devices.append(device) or read(file, device)
    )
    opened(folder / "step-*.pt").snapshots(BATCHES)
    assert devices == ["meta"] * len(STEPS)


def test_states_share_what_is_not_in_the_files(folder):
    MODEL.register_buffer("mask", torch.ones(3), persistent=False)
    try:
        states = [s.state for s in opened(folder / "step-*.pt").snapshots(BATCHES[:1])]
        first, *others = [state.unsaved["mask"] for state in states]
        assert all(other is first for other in others)
        MODEL.mask.zero_()
        (later,) = opened([folder / "step-20.pt"]).snapshots(BATCHES[:1])
        assert (later.load_state()["mask"] == 0).all()
        assert (first == 1).all()
    finally:
        del MODEL.mask


WRONG = {
    "nothing there": (lambda f: str(f / "none-*"), {}, "nothing is at"),
    "no list": (lambda f: 3, {}, "must be a pattern"),
    "empty": (lambda f: [], {}, "checkpoints is empty"),
    "steps that are no numbers": (lambda f: {"a": f / "step-0.pt"}, {}, "the keys are steps"),
    "one step twice": (lambda f: [f / "step-0.pt", str(f / "step-0.pt")], {}, "both of step 0"),
    "on_error": (lambda f: f / "step-*.pt", {"on_error": "warn"}, "on_error must be one of"),
    "keep": (lambda f: f / "step-*.pt", {"keep": 0}, "keep must be at least 1"),
    "no times": (lambda f: f / "step-*.pt", {"tau": None}, "does not tell its learning rates"),
    "other word": (lambda f: f / "step-*.pt", {"tau": "epochs"}, "tau must be a mapping"),
    "too few times": (lambda f: f / "step-*.pt", {"tau": [1.0]}, "1 effective times for 4"),
    "a time missing": (lambda f: f / "step-*.pt", {"tau": {0: 0.0}}, "no effective time of step"),
    "times that go back": (lambda f: f / "step-*.pt", {"tau": [0, 2, 1, 3]}, "tau goes back from"),
    "times that are none": (lambda f: f / "step-*.pt", {"tau": [0, 1, 2, "a"]}, "tau must be"),
    "a number": (lambda f: f / "step-*.pt", {"tau": 0.1}, "tau must be a mapping"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arguments_are_named(folder, kind):
    make, options, message = WRONG[kind]
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        opened(make(folder), **options)


def test_a_model_is_asked_for(folder):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        TrainingRun.from_checkpoints(folder / "step-*.pt", copied(MODEL))


@pytest.mark.parametrize(
    "tau", [{0: 0.0, 20: 1.0, 100: 2.0, 1000: 3.0, 7: 9.0}, [0, 1, 2, 3], STEPS.index]
)
def test_times_are_given_in_several_forms(folder, tau):
    assert opened(folder / "step-*.pt", tau=tau).states["tau"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_version_of_a_name_is_not_its_step(tmp_path):
    torch.save(state_of(0), tmp_path / "v1.5-step-300.pt")
    assert opened(tmp_path / "*.pt").states["step"].tolist() == [300]
