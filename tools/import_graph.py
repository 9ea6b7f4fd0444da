"""The package's imports as a graph, held against the architecture.

Run ``python tools/import_graph.py`` to draw the folders with what they import, left to right in
the data flow, and to list what breaks a rule. The architecture tests run the same checks. Imports
inside functions and under ``TYPE_CHECKING`` count as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "spectralshell"
MOST_MODULES = 16
"""Of one folder, beside its ``__init__``: more ask for sub-folders."""

MOST_LINES = 700

STAGES = (
    ("_version", "parameter_checks", "statuses", "warning_categories"),
    ("models",),
    ("residuals", "snapshots"),
    ("runs",),
    ("operators",),
    ("krylov",),
    ("shells", "dynamics"),
    ("measurements",),
    ("estimators",),
    ("displays", "datasets"),
)
"""Folders and single modules in the order of the data flow; imports point to the left."""

ORDER_WITHIN = {"operators": ("jacobian", "layers", "motion")}
"""Sub-folders in the order of the data flow: none imports one to its right."""

OUTSIDE = {
    "models": {"huggingface_hub", "numpy", "safetensors", "torch", "transformers"},
    "krylov": {"numpy", "scipy", "torch"},
    "shells": {"numpy", "pandas", "pyarrow", "scipy"},
    "dynamics": {"numpy", "scipy"},
}
"""The libraries that a folder may know, where that is limited."""

INSIDE = {"models": {"models"}}
"""The parts of the package that a folder may know, where these are not all to its left."""

Graph = Mapping[str, Mapping[str, set[str]]]


def read_graph(package: Path = PACKAGE) -> dict[str, dict[str, set[str]]]:
    """Return for every module which modules it imports, and the names it takes from each."""
    files = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    return {name: _imports(path, files) for name, path in files.items()}


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """Return the dotted name of a file of the package; a package's is that of its folder."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, files: Mapping[str, Path]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name, set()).add("")
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                # A name that is a module is an import of that module.
                whole = f"{node.module}.{alias.name}"
                module, name = (whole, "") if whole in files else (node.module, alias.name)
                found.setdefault(module, set()).add(name)
    return found


def part_of(module: str) -> str:
    """Return the folder or single module of the package that a dotted name lies in."""
    return module.split(".")[1] if "." in module else ""


def faults(graph: Graph) -> Iterator[str]:
    """Yield what breaks the architecture, a line each."""
    yield from _circles(graph)
    yield from _arrows_to_the_right(graph)
    yield from _arrows_between_subfolders(graph)
    yield from _imports_through_own_door(graph)
    yield from _names_of_functions(graph)
    yield from _strangers(graph)
    yield from _sizes()


def _circles(graph: Graph) -> Iterator[str]:
    root = PACKAGE.name
    inner = {
        name: {target for target in targets if target in graph and target != root}
        for name, targets in graph.items()
    }
    try:
        TopologicalSorter(inner).prepare()
    except CycleError as error:
        yield f"circle: {' -> '.join(error.args[1])}"


def _arrows_to_the_right(graph: Graph) -> Iterator[str]:
    rank = {part: stage for stage, parts in enumerate(STAGES) for part in parts}
    for name, targets in graph.items():
        part = part_of(name)
        if not part:
            continue
        if part not in rank:
            yield f"{part}: stands at no place of the data flow"
            continue
        for target in targets:
            other = part_of(target)
            if target.split(".")[0] != PACKAGE.name or other == part:
                continue
            if not other:
                yield f"{name} imports the whole package"
            elif rank.get(other, len(STAGES)) >= rank[part] and not _beside(part, other):
                yield f"{name} imports {target}, which does not lie to its left"


def _beside(part: str, other: str) -> bool:
    """Tell whether both are single modules of one stage: they may know each other."""
    return any(part in parts and other in parts for parts in STAGES) and not (
        (PACKAGE / part).is_dir() or (PACKAGE / other).is_dir()
    )


def _arrows_between_subfolders(graph: Graph) -> Iterator[str]:
    for part, order in ORDER_WITHIN.items():
        folders = [f"{PACKAGE.name}.{part}.{folder}" for folder in order]
        for name, targets in graph.items():
            for left, folder in enumerate(folders):
                if not name.startswith(folder):
                    continue
                for target in targets:
                    if target.startswith(tuple(folders[left + 1 :])):
                        yield f"{name} imports {target}, which does not lie to its left"


def _names_of_functions(graph: Graph) -> Iterator[str]:
    """Find modules that are hidden by a name that their package offers."""
    for name, targets in graph.items():
        if (PACKAGE.parent.joinpath(*name.split("."), "__init__.py")).exists():
            offered = set().union(*targets.values(), set())
            for module in graph:
                package, _, last = module.rpartition(".")
                if package == name and last in offered:
                    yield f"{module} shares its name with what {name} offers"


def _imports_through_own_door(graph: Graph) -> Iterator[str]:
    for name, targets in graph.items():
        part = part_of(name)
        if not part or (PACKAGE / part).is_file():
            continue
        for target, taken in targets.items():
            door = PACKAGE.parent.joinpath(*target.split("."), "__init__.py")
            if part_of(target) == part and door.exists() and taken != {""}:
                yield f"{name} imports {', '.join(sorted(taken))} through its own door {target}"


def _strangers(graph: Graph) -> Iterator[str]:
    for name, targets in graph.items():
        part = part_of(name)
        for target in targets:
            first = target.split(".")[0]
            if first == PACKAGE.name:
                if part in INSIDE and part_of(target) not in INSIDE[part]:
                    yield f"{name} imports {target}: {part} knows nothing of the package"
            elif part in OUTSIDE and first not in OUTSIDE[part] | sys.stdlib_module_names:
                yield f"{name} imports {target}: {part} knows {', '.join(sorted(OUTSIDE[part]))}"


def _sizes() -> Iterator[str]:
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        modules = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        if len(modules) > MOST_MODULES:
            yield f"{folder.relative_to(PACKAGE.parent)}: {len(modules)} modules"
        for path in modules:
            n_lines = path.read_text(encoding="utf-8").count("\n")
            if n_lines > MOST_LINES:
                yield f"{path.relative_to(PACKAGE.parent)}: {n_lines} lines; one idea?"


def draw(graph: Graph) -> str:
    """Return the parts of the package, left to right in the data flow, with what each imports."""
    lines = []
    for parts in STAGES:
        for part in parts:
            modules = [name for name in graph if part_of(name) == part]
            known = {part_of(t) for name in modules for t in graph[name] if t in graph}
            inside = ", ".join(p for stage in STAGES for p in stage if p in known - {part})
            lines.append(f"{part:<18} {len(modules):>3} modules   <- {inside or 'nothing of ours'}")
    return "\n".join(lines)


def main() -> int:
    """Draw the graph; the exit status says whether a rule is broken."""
    graph = read_graph()
    print(draw(graph))
    found = list(faults(graph))
    print("\n".join(found) if found else "No circle, and no import from the right.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
