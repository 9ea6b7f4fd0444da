"""Bad input of every kind, everywhere: a clear error, and all as it was before."""

import pytest

from tests.fuzz import all_cases, fault, random_pairs

# What the list must have at least, so that it does not shrink unseen.
N_BAD = 1000
N_PAIRS = 100

CASES = all_cases()
GROUPS = sorted({case.name.partition("(")[0].partition(":")[0] for case in CASES})


def faults(cases):
    return {case.name: text for case in cases if (text := fault(case))}


def test_the_list_is_long():
    assert sum(not case.legal for case in CASES) >= N_BAD


@pytest.mark.parametrize("group", GROUPS)
def test_every_bad_value_is_refused_by_name(group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = [c for c in CASES if c.name.partition("(")[0].partition(":")[0] == group]
    assert faults(cases) == {}


def test_one_of_two_bad_values_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert faults(random_pairs(0, N_PAIRS)) == {}
