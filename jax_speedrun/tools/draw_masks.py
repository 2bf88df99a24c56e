"""Draw the long and the short attention mask of a real batch, as the run of a preset would have them at a step."""

import argparse
import dataclasses
import itertools
from pathlib import Path

import jax.numpy as jnp

from ..atomic_write import atomic_write
from ..config import PRESETS, Config
from ..data.batches import TINY_DATA, TokenBatches, find_shards
from ..errors import UsageError
from ..kernels.attention.drawing import count_blocks, draw_masks
from ..kernels.block_mask import BLOCK_SIZE, long_short_masks
from ..schedules import window_blocks
from .command import make_parser, run_command
from .layout import wrap


def parser() -> argparse.ArgumentParser:
    p = make_parser("draw_masks.py", __doc__)
    p.add_argument("--data", type=Path, default=TINY_DATA, metavar="DIR", help="default: the text in the package")
    p.add_argument("--preset", choices=list(PRESETS), default="tiny", help="default: %(default)s")
    p.add_argument("--step", type=int, metavar="N", help="counted from 0 (default: the last)")
    p.add_argument("--steps", type=int, metavar="N", help="of the whole run (default: the preset's)")
    p.add_argument("--sequence-length", type=int, metavar="T", help="in tokens (default: the preset's)")
    p.add_argument("--blocks", default=":", metavar="A:B", help="show only blocks A up to B (default: all)")
    p.add_argument(
        "--out", type=Path, default=Path("masks.png"), metavar="FILE", help=".png or .svg (default: %(default)s)"
    )
    return p


def resolve(options: argparse.Namespace) -> Config:
    """Return the preset with what the options change."""
    given = {name: getattr(options, name) for name in ("steps", "sequence_length")}
    return dataclasses.replace(
        PRESETS[options.preset], **{name: value for name, value in given.items() if value is not None}
    )


def parse_blocks(text: str, count: int) -> slice:
    """Return the blocks A:B of a sequence of `count` blocks.

    Raises:
      UsageError: there are no such blocks.
    """
    try:
        first, stop = (
            int(part) if part else default for part, default in zip(text.split(":"), (0, count), strict=True)
        )
    except ValueError:
        raise UsageError(f"--blocks {text}: must be two block numbers A:B, such as 0:16") from None
    if not 0 <= first < stop <= count:
        raise UsageError(f"--blocks {text}: must lie within the {count} blocks of the sequence, 0:{count}")
    return slice(first, stop)


def run(options: argparse.Namespace) -> int:
    config = resolve(options)
    step = config.steps - 1 if options.step is None else options.step
    if not 0 <= step < config.steps:
        raise UsageError(f"--step {step}: must be 0 to {config.steps - 1}, one below --steps {config.steps}")
    if options.out.suffix not in (".png", ".svg"):
        raise UsageError(f"--out {options.out}: must end in .png or .svg")
    blocks = parse_blocks(options.blocks, config.sequence_length // BLOCK_SIZE)

    batches = TokenBatches(find_shards(options.data, "train"), config.sequences, config.sequence_length, rows=[0])
    # A run that is longer than its data reads the same batches again.
    batch = step % batches.steps
    tokens_NT, _ = next(itertools.islice(batches, batch, None))

    window = int(window_blocks(step, config.steps, config.optimizer.window_tokens))
    long, short = long_short_masks(jnp.asarray(tokens_NT[0]), window)
    masks = {
        f"{kind}: window of {BLOCK_SIZE * wide:,} tokens": mask
        for kind, wide, mask in (("long", window, long), ("short", max(window // 2, 1), short))
    }
    title = f"{config.sequence_length:,} tokens in blocks of {BLOCK_SIZE}, step {step} of {config.steps}"
    if options.blocks != ":":
        title += f", blocks {blocks.start} to {blocks.stop - 1}"
    figure = draw_masks(masks, title=title, blocks=blocks)
    try:
        atomic_write(options.out, lambda partial: figure.savefig(partial, format=options.out.suffix[1:]))
    except OSError as error:
        raise UsageError(f"--out {options.out}: cannot be written ({error.strerror}); name another file") from error
    for name, mask in masks.items():
        print(wrap(f"{name}: {count_blocks(mask)}", "  "))
    print(f"wrote {options.out}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), run, arguments)
