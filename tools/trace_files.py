"""Which files and functions of the package a call enters.

Run ``python tools/trace_files.py`` for the counts, with ``--list`` for the files. The architecture
tests hold the counts to their limits.
"""

from __future__ import annotations

import argparse
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import spectralshell
from spectralshell import GRSDTailFitter, ShellEnergyEstimator, ToeplitzDiagnostic
from spectralshell.datasets import load_digits_trajectory
from spectralshell.operators import build_exact_kernel

PACKAGE = Path(spectralshell.__file__).parent
MOST_FILES = {
    "ShellEnergyEstimator.fit": 39,
    "GRSDTailFitter.fit": 13,
    "ToeplitzDiagnostic.fit": 51,
    "build_exact_kernel": 25,
}


def files_entered(call: Callable[[], Any]) -> dict[str, set[str]]:
    """Return the functions that a call enters, by their file's path inside the package."""
    seen: set[CodeType] = set()

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    before = sys.getprofile()
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    entered: dict[str, set[str]] = {}
    for code in seen:
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE):
            file = str(path.relative_to(PACKAGE))
            entered.setdefault(file, set()).add(code.co_qualname)
    return entered


def entry_points() -> dict[str, Callable[[], Any]]:
    """Return what is traced, by name, ready to be called on the digits."""
    X = load_digits_trajectory(n_snapshots=3, n_batches=4, batch_size=16, max_iter=300)
    energies = ShellEnergyEstimator(q=1.5).fit_transform(X)
    for snapshot in X:
        snapshot.measures.clear()
    return {
        "ShellEnergyEstimator.fit": lambda: ShellEnergyEstimator(q=1.5).fit(X),
        "GRSDTailFitter.fit": lambda: GRSDTailFitter().fit(energies),
        "ToeplitzDiagnostic.fit": lambda: ToeplitzDiagnostic(n_null=5).fit(X[-4:]),
        "build_exact_kernel": lambda: build_exact_kernel(X[0]),
    }


def main() -> None:
    """Print a line for each entry point, and its files if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the files as well")
    listed = parser.parse_args().list
    for name, call in entry_points().items():
        entered = files_entered(call)
        functions = sum(map(len, entered.values()))
        print(f"{name}: {len(entered)} files (at most {MOST_FILES[name]}), {functions} functions")
        if listed:
            for file in sorted(entered):
                print(f"    {file}: {', '.join(sorted(entered[file]))}")


if __name__ == "__main__":
    main()
