"""The lowest versions that pyproject.toml states, as pins for pip.

``python tools/oldest_versions.py test`` prints one ``name==version`` a line for the build, for
running, and for the named extras. A requirement without a lower bound is an error.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(?:\[(?P<extras>[^\]]*)\])?(?P<versions>[^;\[]*)")
LOWEST = re.compile(r">=\s*([\w.]+)")


def lowest(requirements: Iterable[str], project: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and lowest version; the project's own extras are followed."""
    for requirement in requirements:
        parts = REQUIREMENT.match(requirement)
        if parts is None:
            raise ValueError(f"pyproject.toml: cannot read the requirement {requirement!r}")
        if parts["name"] == project["name"]:
            for extra in (parts["extras"] or "").split(","):
                yield from lowest(project["optional-dependencies"][extra.strip()], project)
            continue
        bound = LOWEST.search(parts["versions"])
        if bound is None:
            raise ValueError(f"pyproject.toml: {requirement!r} has no lower bound (>=)")
        yield parts["name"], bound[1]


def pins(content: dict[str, Any], extras: Iterable[str]) -> list[str]:
    """Return the pins for the build, for running and for ``extras``, sorted."""
    project = content["project"]
    wanted = [f"{project['name']}[{extra}]" for extra in extras]
    everything = [*content["build-system"]["requires"], *project["dependencies"], *wanted]
    return sorted({f"{name}=={version}" for name, version in lowest(everything, project)})


def main() -> None:
    """Print the pins for the extras named on the command line."""
    content = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    sys.stdout.write("\n".join(pins(content, sys.argv[1:])) + "\n")


if __name__ == "__main__":
    main()
