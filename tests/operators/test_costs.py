"""Sizes as users write them."""

import numpy as np
import psutil
import pytest
import torch

from spectralshell.operators.costs import FREE_SHARE, format_bytes, resolve_max_memory

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
    ],
)
def test_sizes(size, expected):
    assert resolve_max_memory(size, CPU) == expected


@pytest.mark.parametrize(
    ("size", "text"), [(1_500_000_000, "1.5 GB"), (2.5e6, "2.5 MB"), (1000, "1 KB"), (512, "512 B")]
)
def test_sizes_in_messages(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize("size", [0, -5, "0GB", "0.1 B"])
def test_sizes_must_be_positive(size):
    with pytest.raises(ValueError, match="max_memory must be positive"):
        resolve_max_memory(size, CPU)


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "1 XB", "1.GB", "1e9", "1 GB 2", "nan"])
def test_other_strings_are_named(size):
    with pytest.raises(ValueError, match="a number of bytes or a string such as '1GB'"):
        resolve_max_memory(size, CPU)


@pytest.mark.parametrize("size", [1e9, True, [1]])
def test_other_types_are_named(size):
    with pytest.raises(TypeError, match=f"got {type(size).__name__}"):
        resolve_max_memory(size, CPU)


def test_the_default_is_a_part_of_what_is_free():
    free = psutil.virtual_memory().available
    # What is free changes between two readings.
    assert 0.5 * FREE_SHARE * free < resolve_max_memory(None, CPU) < 1.5 * FREE_SHARE * free
    assert resolve_max_memory(None, torch.device("meta")) > 0
