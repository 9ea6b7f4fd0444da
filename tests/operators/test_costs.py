"""Sizes as users write them."""

import numpy as np
import pytest
import torch

from spectralshell.operators import costs
from spectralshell.operators.costs import (
    DEFAULT_MEMORY,
    format_bytes,
    free_bytes,
    resolve_max_memory,
    working_bytes,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        (np.int64(5), 5),
        ("7", 7),
        ("7 b", 7),
        (" 2kB ", 2000),
        ("1.5 GB", 1_500_000_000),
        ("0.5 KiB", 512),
        ("3mib", 3 * 2**20),
        ("1 TB", 10**12),
        (10**400, 2**63 - 1),
    ],
)
def test_sizes(size, expected):
    assert resolve_max_memory(size) == expected


@pytest.mark.parametrize(
    ("size", "text"), [(1_500_000_000, "1.5 GB"), (2.5e6, "2.5 MB"), (1000, "1 KB"), (512, "512 B")]
)
def test_sizes_in_messages(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize("size", [0, -5, "0GB", "0.1 B"])
def test_sizes_must_be_positive(size):
    with pytest.raises(ValueError, match="max_memory must be positive"):
        resolve_max_memory(size)


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "1 XB", "1.GB", "1e9", "1 GB 2", "nan"])
def test_other_strings_are_named(size):
    with pytest.raises(ValueError, match="a number of bytes or a string such as '1GB'"):
        resolve_max_memory(size)


@pytest.mark.parametrize("size", [1e9, True, [1]])
def test_other_types_are_named(size):
    with pytest.raises(TypeError, match=f"got {type(size).__name__}"):
        resolve_max_memory(size)


def test_the_default_does_not_depend_on_what_is_free(monkeypatch):
    assert resolve_max_memory(None) == DEFAULT_MEMORY
    monkeypatch.setattr(costs, "free_bytes", lambda device: 1000)
    assert resolve_max_memory(None) == DEFAULT_MEMORY
    assert working_bytes(None, CPU) == 1000
    assert working_bytes("1 MB", CPU) == 10**6


def control_group(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("line", "group", "files"),
    [
        (
            "0::/a/b",
            "a",  # the limit of a group holds for those inside
            {"memory.max": "5000", "memory.current": "3000", "memory.stat": "inactive_file 500"},
        ),
        (
            "4:memory:/outside",
            "memory",  # in a container the path is that outside
            {
                "memory.limit_in_bytes": "5000",
                "memory.usage_in_bytes": "3000",
                "memory.stat": "total_inactive_file 500",
            },
        ),
    ],
    ids=["second version", "first version"],
)
def test_the_limit_of_a_control_group_is_seen(tmp_path, monkeypatch, line, group, files):
    monkeypatch.setattr(costs, "_CGROUPS", tmp_path)
    monkeypatch.setattr(costs, "_OWN_CGROUPS", tmp_path / "own")
    assert free_bytes(CPU) > 10**6  # a system without groups
    (tmp_path / "own").write_text(line + "\n")
    control_group(tmp_path / "a" / "b", {"memory.max": "max", "memory.current": "3000"})
    assert free_bytes(CPU) > 10**6
    control_group(tmp_path / group, files)
    assert free_bytes(CPU) == 2500
