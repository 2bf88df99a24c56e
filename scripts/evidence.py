"""Statistics of finished runs from their logs: is the loss below the target, and how long did they take?"""

import argparse
import sys
from pathlib import Path

from jax_speedrun.errors import UsageError
from jax_speedrun.tools.significance import TARGET, draw, read_runs, report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evidence.py", description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="log.txt of a finished run, or its folder")
    parser.add_argument(
        "--versus", type=Path, nargs="+", default=[], metavar="LOG", help="a second group of runs to compare with"
    )
    parser.add_argument(
        "--target", type=float, default=TARGET, metavar="LOSS", help="val loss to be below (default: %(default)s)"
    )
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the loss curves of all runs, as a PNG")
    parser.add_argument(
        "--names", nargs=2, default=("runs", "versus"), metavar="NAME", help="of the two groups in the chart"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    groups = read_runs(options.logs), read_runs(options.versus)
    print(report(*groups, options.target))
    if options.chart:
        draw({name: runs for name, runs in zip(options.names, groups, strict=True) if runs}, options.chart)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"evidence.py: error: {error}", file=sys.stderr)
        sys.exit(2)
