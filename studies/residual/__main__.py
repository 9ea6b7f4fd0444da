"""Train, measure and compare residual and plain networks: ``python -m studies.residual``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from studies.residual.data import find_data
from studies.residual.design import Design, Folders
from studies.residual.pieces import (
    analyse_cells,
    claim_folder,
    compare_steps,
    measure_states,
    train_networks,
)
from studies.residual.report import write_report

STAGES = ("train", "measure", "analyse", "report")


def main(arguments: list[str] | None = None) -> None:
    """Do what is missing; every finished piece is a file, so a run that was killed goes on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: out/study-residual, -quick with --quick")
    parser.add_argument("--docs", type=Path, help="folder for what the docs show")
    parser.add_argument("--data", type=Path, help="your CIFAR-10: .npz, official folder or .tar.gz")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes, one thread each"
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, help="stages to do")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to try the pipeline")
    options = parser.parse_args(arguments)
    design = Design.quick() if options.quick else Design.full()
    usual = "out/study-residual-quick" if options.quick else "out/study-residual"
    folders = Folders(options.out or Path(usual))
    data = None
    if {"train", "measure"} & set(options.only):
        data = options.data or find_data()
    claim_folder(design, folders, data)
    if data and "train" in options.only:
        train_networks(design, folders, data, options.jobs)
    if data and "measure" in options.only:
        measure_states(design, folders, data, options.jobs)
        compare_steps(design, folders, data, options.jobs)
    if "analyse" in options.only:
        analyse_cells(design, folders, options.jobs)
    if "report" in options.only:
        print(write_report(design, folders, None if options.quick else options.docs))


if __name__ == "__main__":
    main()
