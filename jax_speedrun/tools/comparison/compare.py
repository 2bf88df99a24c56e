"""Compare JAX with PyTorch on this machine: the same recipe, tokens and windows, each framework in its own process.

Measures step time and its parts, memory and time to the first step; prints a table, writes compare.json and
compare.png. With --parity: do both compute the same? With --train: whole runs of both, and their statistics.
"""

import argparse
import sys
from pathlib import Path

from ..command import make_parser, run_command
from .modes import compare
from .worker import PARTS, WINDOWS


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(PARTS)}")
    return parts


def parser() -> argparse.ArgumentParser:
    p = make_parser("compare.py", __doc__)
    p.add_argument(
        "--preset",
        choices=list(WINDOWS),
        help="eighth: one sequence of the record's batch, for a GPU; tiny: on a CPU as well (default: what there is)",
    )
    p.add_argument("--sequence-length", type=int, metavar="T", help="tokens a step (default: the preset's)")
    p.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="token shards (default: the text in the package, cut into documents as long as those of web text)",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="for results and logs (default: runs/<time>-compare)")
    p.add_argument("--attention", default="auto", metavar="NAME", help="JAX's, as in train.py (default: auto)")
    p.add_argument("--kernels", default="auto", metavar="NAME", help="JAX's, as in train.py (default: auto)")
    p.add_argument("--jax-python", default=sys.executable, metavar="FILE", help="Python with JAX (default: this one)")
    p.add_argument(
        "--torch-python", default=sys.executable, metavar="FILE", help="Python with PyTorch (default: this one)"
    )

    speed = p.add_argument_group("speed")
    speed.add_argument("--parts", type=names, default=list(PARTS), help=f"of {','.join(PARTS)} (default: all)")
    speed.add_argument(
        "--windows",
        type=numbers,
        metavar="W,W",
        help="long attention windows in tokens (default: 128,512,896,1280,1792; tiny: 128,640)",
    )
    speed.add_argument(
        "--xla",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure JAX without our kernels as well, --kernels xla --attention xla (default)",
    )
    speed.add_argument("--rounds", type=int, default=2, metavar="N", help="turns of each (default: %(default)s)")
    speed.add_argument("--samples", type=int, metavar="N", help="a turn and part (default: 5; tiny: 3)")

    same = p.add_argument_group("parity")
    same.add_argument("--parity", action="store_true", help="compare losses, gradients and parameters instead")
    same.add_argument("--curve-steps", type=int, default=250, metavar="N", help="of training (default: %(default)s)")

    whole = p.add_argument_group("whole runs")
    whole.add_argument("--train", action="store_true", help="train eighth in both instead, and compare the runs")
    whole.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="N,N", help="default: 0,1,2")
    whole.add_argument("--steps", type=int, metavar="N", help="of each run (default: 1385)")
    return p


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), compare, arguments)
