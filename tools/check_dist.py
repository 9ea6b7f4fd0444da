"""A wheel and an sdist, checked: ``python tools/check_dist.py dist``.

The sdist holds every tracked file and nothing else, and all its tests can be collected. The wheel
holds the package alone; in an empty environment outside the repository the README's examples run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]


class DistributionError(Exception):
    """What is built is not what should be."""


def main() -> int:
    """Check the only wheel and the only sdist in a folder; return 1 and say why if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    try:
        wheel, sdist = only(folder, "*.whl"), only(folder, "*.tar.gz")
        with tempfile.TemporaryDirectory(prefix=f"{NAME}-dist-") as name:
            outside = Path(name)
            check_sdist(sdist, outside)
            check_wheel(wheel, outside)
    except (DistributionError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    say(f"{sdist.name} and {wheel.name} are complete")
    return 0


def say(line: str) -> None:
    """Write a line at once: what runs in between writes to the same place."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def only(folder: Path, pattern: str) -> Path:
    """Return the one file of a pattern."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DistributionError(f"{folder}: expected one {pattern}, found {len(found)}")
    return found[0]


def tracked(*under: str) -> set[str] | None:
    """Return the files that git tracks under some folders; None outside a git repository."""
    if not (ROOT / ".git").exists():
        return None
    listing = run("git", "-C", ROOT, "ls-files", "-z", *under, stdout=subprocess.PIPE).stdout
    return set(listing.split("\0")) - {""}


def check_sdist(sdist: Path, outside: Path) -> None:
    """Compare its files with the repository's, and collect its tests where it is unpacked."""
    with tarfile.open(sdist) as archive:
        archive.extractall(outside / "sdist", filter="data")
    (root,) = (outside / "sdist").iterdir()
    found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    made = {name for name in found if ".egg-info/" in name or name == "PKG-INFO"}
    compare(sdist, found - made, tracked())
    say(f"{sdist.name}: {len(found)} files; collecting its tests")
    command = (sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider")
    run(*command, cwd=root, stdout=subprocess.DEVNULL)


def check_wheel(wheel: Path, outside: Path) -> None:
    """Compare its files with the package's, install it, and run the README's examples with it."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    compare(wheel, found, tracked(f"{NAME}/"))
    say(f"{wheel.name}: {len(found)} files; installing it in an empty environment")
    environment = outside / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel, cwd=outside)
    script, readme = ROOT / "tools" / "run_readme.py", ROOT / "README.md"
    run(python, "-I", script, readme, "--installed-in", environment, cwd=outside)


def compare(file: Path, found: set[str], expected: set[str] | None) -> None:
    """Raise where the files found are not those expected, if any are."""
    if expected is None:
        return
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise DistributionError(f"{file.name}: missing {missing}, not expected {extra}")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, without the repository on Python's path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, text=True, env=clean, **options)


if __name__ == "__main__":
    raise SystemExit(main())
