"""A state that is spread over several files, with an index of which tensor lies where."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from spectralshell.models.checkpoints.messages import listed
from spectralshell.models.checkpoints.places import file_inside
from spectralshell.models.checkpoints.tensor_files import TensorFile

INDEX_ENDING = ".index.json"


@dataclass(frozen=True)
class ShardedFiles:
    """The shards that an index of ``save_pretrained`` names, beside it in its folder."""

    index: str

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"the index of shards {self.index!r}"

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read, the index first."""
        folder = os.path.dirname(self.index)
        shards = sorted(set(self._places.values()))
        return (self.index, *(file_inside(folder, name, self.label) for name in shards))

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Return the tensors of all shards; ValueError where these are not what the index says."""
        found: dict[str, Tensor] = {}
        for path in self.files[1:]:
            shard = TensorFile(path).tensors(device)
            twice = [name for name in shard if name in found]
            if twice:
                raise ValueError(
                    f"state: {self.label}: {listed(twice)} is in {os.path.basename(path)!r} and in "
                    "another shard; the files are of different saves. Save the model again."
                )
            found.update(shard)
        missing = [name for name in self._places if name not in found]
        if missing:
            raise ValueError(
                f"state: {self.label} names {listed(missing)}, which its shards do not hold; the "
                "files are of different saves. Save the model again."
            )
        return found

    @cached_property
    def _places(self) -> dict[str, str]:
        return read_index(self.index, self.label)


def read_index(path: str, source: str) -> dict[str, str]:
    """Return the file of each tensor that an index names."""
    content = read_json(path, source)
    places = content.get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(name, str) for name in places.values())
    ):
        raise ValueError(
            f"state: {source} has no 'weight_map' of tensors and files; pass the index that "
            "save_pretrained wrote, or its folder."
        )
    return places


def read_json(path: str, source: str) -> dict[str, object]:
    """Return the mapping that a JSON file holds; ValueError for what is none."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    # The last for lists within lists, as deep as no index is.
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"state: {source} is not a readable file of JSON ({type(error).__name__}: "
            f"{str(error)[:100]}); it may be incomplete."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"state: {source} holds a JSON {type(content).__name__} where a mapping was expected."
        )
    return content
