"""Models of the hub, without a network: out of its cache, and fetched from a folder beside it."""

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import joblib
import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from spectralshell import Checkpoint, Snapshot
from spectralshell.models.checkpoints import hub
from spectralshell.runs import TrainingRun
from tests.models.checkpoints.kinds import SHARD_SIZE, copied, language_model, put_into_cache

REPO = "org/model"
ROWS = torch.zeros(1, 4, dtype=torch.long)
BATCH = ({"input_ids": ROWS, "labels": ROWS}, None)
STEPS = range(0, 50, 10)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_fetched_here", {})
    return tmp_path / "cache"


class Remote:
    """A hub: a cache in another folder, of which files are copied one by one."""

    def __init__(self, folder):
        self.root = folder / ("models--" + REPO.replace("/", "--"))
        self.fetched = []

    def model_info(self, repo, revision):
        return SimpleNamespace(sha=self._commit(revision))

    def _commit(self, revision):
        named = self.root / "refs" / revision
        return named.read_text() if named.exists() else revision

    def list_repo_refs(self, repo):
        names = [SimpleNamespace(name=path.name) for path in (self.root / "refs").iterdir()]
        return SimpleNamespace(branches=names[:1], tags=names[1:])

    def download(self, repo, name, revision):
        commit = self._commit(revision)
        source = self.root / "snapshots" / commit / name
        if not source.exists():
            raise EntryNotFoundError(name)
        own = Path(huggingface_hub.constants.HF_HUB_CACHE) / self.root.name
        blob, target = own / "blobs" / source.resolve().name, own / "snapshots" / commit / name
        for folder in (blob.parent, target.parent, own / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        if commit != revision:
            (own / "refs" / revision).write_text(commit)
        shutil.copy(source, blob)
        target.symlink_to(Path("../../blobs") / blob.name)
        self.fetched.append((name, revision))
        return str(target)


@pytest.fixture
def remote(tmp_path, cache, monkeypatch):
    for step in STEPS:
        options = {"max_shard_size": SHARD_SIZE} if step else {}
        put_into_cache(tmp_path / "remote", REPO, f"step{step}", language_model(step), **options)
    found = Remote(tmp_path / "remote")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: found)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", found.download)
    return found


def commits_in(cache):
    folder = cache / "models--org--model" / "snapshots"
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def check_equal(snapshot, model):
    expected = copied(model)
    assert all(torch.equal(t, expected[name]) for name, t in snapshot.load_state().items())


def test_a_revision_out_of_the_cache_in_shards(cache):
    put_into_cache(cache, REPO, "step7", language_model(7), max_shard_size=SHARD_SIZE)
    check_equal(Snapshot(language_model(), *BATCH, state=f"{REPO}@step7"), language_model(7))


def test_a_revision_that_is_not_there_is_named(cache):
    put_into_cache(cache, REPO, "step7", language_model(7))
    for name in (f"{REPO}@step8", "org/other@main"):
        with pytest.raises(FileNotFoundError, match=f"{name}' is not in the cache"):
            Snapshot(language_model(), *BATCH, state=name)


def test_the_revisions_of_a_pattern_without_a_network(cache):
    for step in (100, 20):
        put_into_cache(cache, REPO, f"step{step}", language_model(step))
    run = TrainingRun.from_checkpoints(f"{REPO}@step*", language_model(), tau="steps")
    assert run.states["step"].tolist() == [20, 100]
    for snapshot, step in zip(run.snapshots([BATCH]), (20, 100), strict=True):
        check_equal(snapshot, language_model(step))
    with pytest.raises(FileNotFoundError, match="no revision of"):
        TrainingRun.from_checkpoints(f"{REPO}@epoch*", language_model(), tau="steps")


def test_opening_fetches_nothing_and_a_loop_keeps_the_disk_of_a_few(cache, remote):
    present = put_into_cache(cache, REPO, "step0", language_model(0))
    run = TrainingRun.from_checkpoints(f"{REPO}@step*", language_model(), tau="steps", keep=2)
    assert remote.fetched == []
    assert commits_in(cache) == {present}
    sizes = []
    for snapshot, step in zip(run.snapshots([BATCH]), STEPS, strict=True):
        check_equal(snapshot, language_model(step))
        sizes.append(len(commits_in(cache)))
    # The one that was there before, and at most two beside it.
    assert sizes == [1, 2, 3, 3, 3]
    assert present in commits_in(cache)
    blobs = list((cache / "models--org--model" / "blobs").iterdir())
    linked = {p.resolve().name for p in (cache / "models--org--model" / "snapshots").rglob("*.*")}
    assert {blob.name for blob in blobs} <= linked


def test_what_was_let_go_is_fetched_again_at_the_same_commit(cache, remote):
    asked = [Checkpoint(f"{REPO}@step{step}", keep=1) for step in (10, 20)]
    one, other = (Snapshot(language_model(), *BATCH, state=state) for state in asked)
    for snapshot, step in ((one, 10), (other, 20), (one, 10)):
        check_equal(snapshot, language_model(step))
        assert len(commits_in(cache)) == 1
    commit = one.state.stamp[2]
    check_equal(other, language_model(20))
    (remote.root / "refs" / "step10").write_text(other.state.stamp[2])  # a tag that is moved
    check_equal(one, language_model(10))
    assert commits_in(cache) == {commit}


def test_what_was_fetched_is_found_by_its_name_without_a_network(cache, remote, monkeypatch):
    Snapshot(language_model(), *BATCH, state=f"{REPO}@step10").load_state()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    check_equal(Snapshot(language_model(), *BATCH, state=f"{REPO}@step10"), language_model(10))


FAULTS = {
    "no such revision": (RevisionNotFoundError, "has no revision 'step10'"),
    "no such model": (RepositoryNotFoundError, "no hub model 'org/model' that you may read"),
    "server": (HfHubHTTPError, r"could not be fetched \(told\)"),
    "network": (RuntimeError, r"could not be fetched \(told\)"),
    "offline": (LocalEntryNotFoundError, "is not in the cache"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_hub_refuses_is_named(cache, remote, monkeypatch, fault):
    kind, message = FAULTS[fault]
    error = kind.__new__(kind, "told")  # its own constructor asks for a response
    error.args = ("told",)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(remote, "model_info", fail)
    with pytest.raises((ValueError, FileNotFoundError), match=f"state: .*{message}"):
        Snapshot(language_model(), *BATCH, state=f"{REPO}@step10")


def test_without_keep_all_stay(cache, remote):
    for step in STEPS[:3]:
        Snapshot(language_model(), *BATCH, state=f"{REPO}@step{step}").load_state()
    assert len(commits_in(cache)) == 3


def test_only_weights_and_their_index_are_fetched(cache, remote):
    Snapshot(language_model(), *BATCH, state=f"{REPO}@step10").load_state()
    assert {Path(name).suffix for name, _ in remote.fetched} == {".json", ".safetensors"}
    assert {name for name, _ in remote.fetched if name.endswith("json")} == {
        "model.safetensors.index.json"
    }


def test_a_fetched_revision_of_another_model_is_named_when_it_is_read(cache, remote):
    snapshot = Snapshot(
        torch.nn.Linear(3, 2), torch.ones(1, 3), torch.ones(1, 2), state=f"{REPO}@step10"
    )
    with pytest.raises(ValueError, match="does not fit Linear"):
        snapshot.load_state()


def test_keys_are_the_same_before_and_after_it_is_fetched(cache, remote):
    half = language_model(3).to(torch.bfloat16)
    put_into_cache(remote.root.parent, REPO, "half", half)
    state = Snapshot(language_model(), *BATCH, state=f"{REPO}@half").state
    before = joblib.hash(state)
    state.load(language_model())
    assert state.narrow == ("bfloat16",)
    assert joblib.hash(state) == before
    assert pickle.loads(pickle.dumps(state)).stamp == state.stamp
    again = Snapshot(language_model(), *BATCH, state=f"{REPO}@half").state
    assert again.narrow == ("bfloat16",)
    assert joblib.hash(again) == before


def test_a_revision_that_was_there_in_part_stays(cache, remote):
    commit = (remote.root / "refs" / "step10").read_text()
    folder = cache / "models--org--model" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for step in (10, 20, 30):
        state = Checkpoint(f"{REPO}@step{step}", keep=1)
        Snapshot(language_model(), *BATCH, state=state).load_state()
    assert len(commits_in(cache)) == 2
    assert commit in commits_in(cache)


def test_a_path_that_exists_is_no_hub_model(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    torch.save(copied(torch.nn.Linear(3, 2)), "org/model@step1")
    state = Snapshot(
        torch.nn.Linear(3, 2), torch.ones(1, 3), torch.ones(1, 2), state="org/model@step1"
    ).load_state()
    assert set(state) == {"weight", "bias"}
    for name in ("org/model", "a/b/model@step1", "org/model@step1.pt"):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
            Snapshot(torch.nn.Linear(3, 2), torch.ones(1, 3), torch.ones(1, 2), state=name)


def test_an_index_that_leaves_the_folder_fetches_nothing_else(cache, remote):
    commit = (remote.root / "refs" / "step10").read_text()
    index = remote.root / "snapshots" / commit / "model.safetensors.index.json"
    index.resolve().write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    with pytest.raises(ValueError, match="lies outside its folder"):
        Snapshot(language_model(), *BATCH, state=f"{REPO}@step10").load_state()
    assert [name for name, _ in remote.fetched] == ["model.safetensors.index.json"]
