"""The README's ``>>>`` examples, run as a user would: ``python run_readme.py README.md``.

Run outside the repository, they show that the installed package is complete; ``--installed-in``
names the environment that it has to come from.
"""

from __future__ import annotations

import argparse
import doctest
import sys
import warnings
from pathlib import Path

import spectralshell

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def main() -> int:
    """Run the examples of a file; return 1 where one failed, none was found, or it was not this."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--installed-in", type=Path, help="folder of the environment")
    arguments = parser.parse_args()

    origin = Path(spectralshell.__file__).resolve()
    if arguments.installed_in and arguments.installed_in.resolve() not in origin.parents:
        sys.stderr.write(f"spectralshell comes from {origin}, not {arguments.installed_in}\n")
        return 1
    warnings.simplefilter("error")
    # Torch's own forward-mode rules are compiled with it when the first jvp is taken.
    warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", DeprecationWarning)
    found = doctest.testfile(str(arguments.page.resolve()), False, optionflags=OPTIONS)
    sys.stdout.write(
        f"{arguments.page.name}: {found.attempted - found.failed} of {found.attempted} examples "
        f"as written, with spectralshell {spectralshell.__version__} from {origin.parent}\n"
    )
    return int(found.failed > 0 or found.attempted == 0)


if __name__ == "__main__":
    raise SystemExit(main())
