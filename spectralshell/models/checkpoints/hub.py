"""A model of the hub at a revision, in the cache that transformers keeps.

What is in the cache is read from there without a question to the hub; the rest is fetched by the
hub's own client: weights and their index, no code.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from spectralshell.models.checkpoints.folders import WEIGHT_FILES
from spectralshell.models.checkpoints.request import Checkpoint
from spectralshell.models.checkpoints.shards import INDEX_ENDING, read_index

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@(?P<revision>[^@\s]+)")

_FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json")

_COMMIT = re.compile(r"[0-9a-f]{40}")

_fetched_here: dict[str, list[str]] = {}
"""The commits of each model that this process brought into the cache, the oldest first."""

_turn = threading.RLock()


@dataclass(frozen=True)
class HubModel:
    """A model of the hub at a branch, tag or commit."""

    repo: str
    revision: str

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"the hub model {f'{self.repo}@{self.revision}'!r}"


def named_by(checkpoint: Checkpoint) -> HubModel | None:
    """Return the hub model that ``"org/model@revision"`` names; None for what is a path."""
    given = str(checkpoint.path)
    found = _NAME.fullmatch(given)
    if found is None or given.endswith(_FILE_ENDINGS) or os.path.exists(given):
        return None
    return HubModel(found["repo"], found["revision"])


def cached_folder(model: HubModel) -> str | None:
    """Return the folder of a revision whose weights are all in the cache, None for others."""
    client = _client()
    for name in WEIGHT_FILES:
        path = client.try_to_load_from_cache(model.repo, name, revision=model.revision)
        if not isinstance(path, str):
            continue
        wanted = _shards(path, model) if name.endswith(INDEX_ENDING) else []
        found = [
            client.try_to_load_from_cache(model.repo, shard, revision=model.revision)
            for shard in wanted
        ]
        if all(isinstance(shard, str) for shard in found):
            return os.path.dirname(path)
    return None


def stamp(model: HubModel) -> tuple[str, str, str]:
    """Return model, revision and commit; one small request where the cache does not know it."""
    folder = cached_folder(model)
    if folder is not None:
        return model.repo, model.revision, os.path.basename(folder)
    if _COMMIT.fullmatch(model.revision):
        return model.repo, model.revision, model.revision
    with _as_checkpoint_error(model):
        return model.repo, model.revision, _commit_of(model)


def folder_of(mark: tuple[str, str, str]) -> str | None:
    """Return the folder of the commit of a stamp, None where it has to be fetched."""
    return cached_folder(HubModel(mark[0], mark[2]))


@contextmanager
def fetched(model: HubModel, mark: tuple[Any, ...], keep: int | None) -> Iterator[str]:
    """Give the folder of the commit of a stamp, fetched if need be; older ones are let go first."""
    with _turn:
        folder = cached_folder(HubModel(model.repo, mark[2]))
        if folder is None:
            if keep is not None:
                _let_go(model.repo, keep - 1)
            folder = _fetch(model, mark[2])
        yield folder


def revisions(repo: str, pattern: str) -> list[str]:
    """Return the branches and tags of a model that match a pattern, of the hub or its cache."""
    client = _client()
    if client.constants.HF_HUB_OFFLINE:
        names = _cached_refs(repo)
    else:
        with _as_checkpoint_error(HubModel(repo, pattern)):
            refs = client.HfApi().list_repo_refs(repo)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return sorted({name for name in names if fnmatchcase(name, pattern)})


def _cached_refs(repo: str) -> list[str]:
    root = os.path.join(_repo_folder(repo), "refs")
    return [
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root)
        for name in names
    ]


def _repo_folder(repo: str) -> str:
    return os.path.join(_client().constants.HF_HUB_CACHE, "models--" + repo.replace("/", "--"))


def _fetch(model: HubModel, commit: str) -> str:
    before = _present(model.repo)
    with _as_checkpoint_error(model):
        # By its name where it still is that commit, so that the cache knows it by its name.
        moved = _commit_of(model) != commit
        folder = _download(HubModel(model.repo, commit) if moved else model)
    if os.path.basename(folder) not in before:
        _fetched_here.setdefault(model.repo, []).append(os.path.basename(folder))
    return folder


def _commit_of(model: HubModel) -> str:
    return str(_client().HfApi().model_info(model.repo, revision=model.revision).sha)


def _download(model: HubModel) -> str:
    client = _client()
    for name in WEIGHT_FILES:
        try:
            path = client.hf_hub_download(model.repo, name, revision=model.revision)
        except client.errors.LocalEntryNotFoundError:
            raise  # the hub cannot be reached: another name would not help
        except client.errors.EntryNotFoundError:
            continue
        for shard in _shards(path, model) if name.endswith(INDEX_ENDING) else []:
            client.hf_hub_download(model.repo, shard, revision=model.revision)
        return os.path.dirname(path)
    raise ValueError(
        f"state: {model.label} has none of {', '.join(WEIGHT_FILES)}; fetch it with its own tool "
        "and pass the path of a file."
    )


def _let_go(repo: str, n_kept: int) -> None:
    """Delete the oldest revisions that were fetched here; what others share with them stays."""
    known = [commit for commit in _fetched_here.get(repo, []) if commit in _present(repo)]
    old, kept = known[: max(len(known) - n_kept, 0)], known[max(len(known) - n_kept, 0) :]
    if old:
        client = _client()
        cache = client.scan_cache_dir(client.constants.HF_HUB_CACHE)
        cache.delete_revisions(*old).execute()
        left = [commit for commit in old if commit in _present(repo)]
        if left:
            warnings.warn(
                f"keep: {len(left)} revisions of {repo!r} could not be deleted from the cache "
                f"{client.constants.HF_HUB_CACHE!r}; it may be damaged (see `hf cache verify`).",
                stacklevel=2,
            )
    _fetched_here[repo] = kept


def _present(repo: str) -> set[str]:
    folder = os.path.join(_repo_folder(repo), "snapshots")
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def _shards(index: str, model: HubModel) -> list[str]:
    names = sorted(set(read_index(index, f"the index of {model.label}").values()))
    foreign = [name for name in names if os.path.isabs(name) or ".." in name.split("/")]
    if foreign:
        raise ValueError(
            f"state: {model.label} names {foreign[0]!r}, which lies outside its folder, so it is "
            "not read."
        )
    return names


@contextmanager
def _as_checkpoint_error(model: HubModel) -> Iterator[None]:
    """Say in the words of a checkpoint what the client of the hub says."""
    errors = _client().errors
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"state: the hub model {model.repo!r} has no revision {model.revision!r}; its "
            "branches and tags are on its page."
        ) from error
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise FileNotFoundError(
            f"state: there is no hub model {model.repo!r} that you may read; check its name, or "
            "log in with `hf auth login`. If a path was meant, there is no such file."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"state: {model.label} is not in the cache {_client().constants.HF_HUB_CACHE!r}, and "
            "the hub cannot be reached or HF_HUB_OFFLINE is set; fetch it once while online."
        ) from error
    except Exception as error:  # whatever its client, and the one below that, raise
        if str(error).startswith("state: "):
            raise
        what = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"state: {model.label} could not be fetched ({what}).") from error


def _client() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            "state: models of the hub need the package huggingface_hub; install "
            "spectralshell[transformers]."
        ) from error
    return huggingface_hub
