"""The layout of the package, its public names and its docstrings, held to their rules."""

import ast
import importlib
import inspect
import pkgutil

import pytest

import spectralshell
from tests.public_names import PUBLIC_NAMES
from tools import import_graph, trace_files

LONGEST_INTERNAL = 3
"""Lines of an internal docstring: what a maintainer cannot see from signature and body."""

PLANTED = {
    "circle": {
        "spectralshell.shells.measure": {"spectralshell.shells.frames": {"frame"}},
        "spectralshell.shells.frames": {"spectralshell.shells.measure": {"Measure"}},
    },
    "not lie to its left": {
        "spectralshell.krylov.bounds": {"spectralshell.estimators.base": {"Base"}}
    },
    "own door": {"spectralshell.krylov.bounds": {"spectralshell.krylov": {"gauss"}}},
    "knows nothing of the package": {
        "spectralshell.models.state": {"spectralshell.statuses": {"OK"}}
    },
    "shells knows": {"spectralshell.shells.measure": {"torch": {""}}},
    "shares its name": {
        "spectralshell.krylov": {"spectralshell.krylov.run": {"lanczos"}},
        "spectralshell.krylov.lanczos": {},
    },
    "at no place": {"spectralshell.utils": {}},
}


@pytest.fixture(scope="module")
def graph():
    return import_graph.read_graph()


def test_imports_follow_the_data(graph):
    assert list(import_graph.faults(graph)) == []


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault):
    found = list(import_graph.faults(PLANTED[fault]))
    assert [line for line in found if fault in line], found


def test_the_drawing_names_every_folder(graph):
    drawn = import_graph.draw(graph)
    folders = [p.name for p in import_graph.PACKAGE.iterdir() if (p / "__init__.py").exists()]
    assert [name for name in folders if name not in drawn] == []


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names_stay(module):
    offered = importlib.import_module(module)
    assert {name for name in PUBLIC_NAMES[module] if not hasattr(offered, name)} == set()
    if hasattr(offered, "__all__"):
        assert set(offered.__all__) == PUBLIC_NAMES[module]


def test_a_call_enters_few_files():
    for name, call in trace_files.entry_points().items():
        entered = trace_files.files_entered(call)
        assert 0 < len(entered) <= trace_files.MOST_FILES[name], (name, sorted(entered))


def _modules():
    names = [spectralshell.__name__]
    names += [m.name for m in pkgutil.walk_packages(spectralshell.__path__, "spectralshell.")]
    return [importlib.import_module(name) for name in names]


def _public_code():
    """Return module and qualified name of all functions and classes that users reach."""
    found = set()
    for module, names in PUBLIC_NAMES.items():
        for name in names - {"__version__"}:
            thing = getattr(importlib.import_module(module), name)
            found.add((thing.__module__, thing.__qualname__))
            members = inspect.getmembers(thing) if inspect.isclass(thing) else []
            for label, member in members:
                plain = next(
                    (
                        getattr(member, a)
                        for a in ("fget", "func", "__func__")
                        if hasattr(member, a)
                    ),
                    member,
                )
                if not label.startswith("_") and inspect.isfunction(plain):
                    found.add((plain.__module__, plain.__qualname__))
    return found


def _documented(tree, prefix=""):
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield prefix + node.name, ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, f"{prefix}{node.name}.")


def test_internal_docstrings_are_short():
    public = _public_code()
    long = []
    for module in _modules():
        for name, text in _documented(ast.parse(inspect.getsource(module))):
            n_lines = len((text or "").splitlines())
            if n_lines > LONGEST_INTERNAL and (module.__name__, name) not in public:
                long.append(f"{module.__name__}.{name}: {n_lines}")
    assert long == []


def test_module_docstrings_say_what_the_module_is():
    questions = ("What ", "How ", "Where ", "Which ", "Whether ", "Who ", "Why ")
    asking = [m.__name__ for m in _modules() if (m.__doc__ or "What ").startswith(questions)]
    assert asking == []
