"""Status phrases: each once, and joined without repetition."""

import ast
import inspect
from collections import Counter

import pytest

from spectralshell import statuses as module
from spectralshell.statuses import join_statuses


@pytest.mark.parametrize(
    ("statuses", "joined"),
    [
        ([], "ok"),
        (["ok", "ok"], "ok"),
        (["ok", "a; b", "a"], "a; b"),
        (["", "a"], "a"),
    ],
)
def test_statuses_are_joined_without_repetition(statuses, joined):
    assert join_statuses(statuses) == joined


def test_every_phrase_and_every_name_stands_once():
    names, phrases = Counter(), Counter()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets)
            phrases[ast.literal_eval(node.value)] += 1
        elif isinstance(node, ast.FunctionDef):
            names[node.name] += 1
    assert [text for text, count in (names + phrases).items() if count > 1] == []
