"""Run comparisons and studies and write the report: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from benchmarks import studies
from benchmarks.comparisons import Disagreement, compare, comparisons
from benchmarks.report import STUDIES, environment, write_part, write_report
from benchmarks.workers import CORES, WorkerError, Workplace


def main() -> None:
    """Run what is asked for; parts already measured are kept with ``--resume``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: out/benchmarks, -quick with --quick")
    parser.add_argument("--docs", type=Path, help="folder for the tables that the docs show")
    parser.add_argument("--jax-python", type=Path, default=Path(".venv-neural-tangents/bin/python"))
    parser.add_argument("--only", nargs="+", default=[], help="names of parts; see --list")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    parser.add_argument("--resume", action="store_true", help="keep parts that are there")
    parser.add_argument("--quick", action="store_true", help="tiny problems, to try the pipeline")
    parser.add_argument("--threads", type=int, default=CORES, help="of torch; XLA takes all cores")
    parser.add_argument("--full", action="store_true", help="all 100 Lanczos steps of curvlinops")
    options = parser.parse_args()

    if options.quick:
        options.docs = None
    options.out = options.out or Path("out/benchmarks-quick" if options.quick else "out/benchmarks")
    todo = {c.name: c for c in comparisons(quick=options.quick, full=options.full)}
    names = [*todo, *STUDIES]
    if options.list:
        print("\n".join(names))
        return
    unknown = sorted(set(options.only) - set(names))
    if unknown:
        parser.error(f"no part named {', '.join(unknown)}; there are {', '.join(names)}")
    workplace = Workplace.create(
        options.jax_python.absolute(), options.out / "scratch", options.threads
    )
    failed = []
    for name in options.only or names:
        if options.resume and (options.out / "parts" / f"{name}.csv").exists():
            continue
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        try:
            if name in todo:
                rows = compare(todo[name], workplace)
            else:
                rows = getattr(studies, name)(workplace, quick=options.quick)
        except (WorkerError, Disagreement) as error:
            # The other parts are worth having, and this one must not pass unseen.
            failed.append(f"{name}: {error}")
            continue
        write_part(options.out, name, rows)
    print(write_report(options.out, options.docs, environment(workplace)))
    if failed:
        sys.exit("\n".join(["failed:", *failed, f"see {workplace.messages}"]))
    shutil.rmtree(workplace.scratch)


if __name__ == "__main__":
    main()
