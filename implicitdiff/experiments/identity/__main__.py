"""`python -m implicitdiff.experiments.identity [families] [--seeds 0,1,2] [--out FOLDER] [--quick] [--page]`."""

import argparse
import sys
from pathlib import Path

from implicitdiff.errors import ImplicitDiffError
from implicitdiff.experiments.identity.reproduce import FAMILIES, reproduce_identity, write_page


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m implicitdiff.experiments.identity")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; none: all")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default 0,1,2")
    parser.add_argument("--out", default="out/identity", help="the folder; default out/identity")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--page", action="store_true", help="only make page and figures from numbers in the folder"
    )
    given = parser.parse_args()
    command = "python -m implicitdiff.experiments.identity --seeds " + given.seeds + " --quick" * given.quick
    try:
        if given.page:
            written = write_page(Path(given.out), command)
        else:
            seeds = [int(seed) for seed in given.seeds.split(",")]
            written = reproduce_identity(
                given.families, seeds, given.out, given.quick, report=print, command=command
            )
    except ImplicitDiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
