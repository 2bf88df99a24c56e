"""What the examples share: their one option, and the picture of their masks."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from jax_speedrun.kernels.attention.drawing import draw_masks
from jax_speedrun.kernels.block_mask import BlockMask

_out = Path(".")


def run(about: str | None, main: Callable[[], None]) -> None:
    """Run an example as a script."""
    global _out
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder for the picture")
    _out = parser.parse_args().out
    main()


def draw(name: str, masks: Mapping[str, BlockMask]) -> None:
    """Write NAME.png with the masks side by side."""
    path = _out / f"{name}.png"
    draw_masks(masks, title=name.replace("_", " ")).savefig(path)
    print(f"wrote {path}")
