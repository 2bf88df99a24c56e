"""Draw the long and the short attention mask of a real batch, as the run of a preset would have them at a step."""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

import jax.numpy as jnp

from jax_speedrun.config import PRESETS, Config
from jax_speedrun.data.batches import TINY_DATA, TokenBatches, find_shards
from jax_speedrun.errors import UsageError
from jax_speedrun.kernels.attention.drawing import count_blocks, draw_masks
from jax_speedrun.kernels.block_mask import BLOCK_SIZE, long_short_masks
from jax_speedrun.schedules import window_blocks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="draw_masks.py", description=__doc__)
    parser.add_argument("--data", type=Path, default=TINY_DATA, metavar="DIR", help="default: the text in the package")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="default: %(default)s")
    parser.add_argument("--step", type=int, metavar="N", help="counted from 0 (default: the last)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the whole run (default: the preset's)")
    parser.add_argument("--sequence-length", type=int, metavar="T", help="in tokens (default: the preset's)")
    parser.add_argument("--blocks", default=":", metavar="A:B", help="show only blocks A up to B (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("masks.png"), metavar="FILE", help=".png or .svg (default: %(default)s)"
    )
    return parser.parse_args()


def resolve(options: argparse.Namespace) -> Config:
    given = {name: getattr(options, name) for name in ("steps", "sequence_length")}
    return dataclasses.replace(
        PRESETS[options.preset], **{name: value for name, value in given.items() if value is not None}
    )


def parse_blocks(text: str, count: int) -> slice:
    try:
        first, stop = (
            int(part) if part else default for part, default in zip(text.split(":"), (0, count), strict=True)
        )
    except ValueError:
        raise UsageError(f"--blocks {text}: must be two block numbers A:B, such as 0:16") from None
    if not 0 <= first < stop <= count:
        raise UsageError(f"--blocks {text}: must lie within the {count} blocks of the sequence, 0:{count}")
    return slice(first, stop)


def main() -> None:
    options = parse_arguments()
    config = resolve(options)
    step = config.steps - 1 if options.step is None else options.step
    if not 0 <= step < config.steps:
        raise UsageError(f"--step {step}: must be 0 to {config.steps - 1}, one below --steps {config.steps}")
    if options.out.suffix not in (".png", ".svg"):
        raise UsageError(f"--out {options.out}: must end in .png or .svg")
    blocks = parse_blocks(options.blocks, config.sequence_length // BLOCK_SIZE)

    shards = find_shards(options.data, "train")
    batches = TokenBatches(shards, config.sequences, config.sequence_length, rows=[0])
    # A run that is longer than its data reads the same batches again.
    batch = step % batches.steps
    tokens_NT, _ = next(itertools.islice(batches, batch, None))

    window = int(window_blocks(step, config.steps, config.optimizer.window_tokens))
    long, short = long_short_masks(jnp.asarray(tokens_NT[0]), window)
    masks = {f"long: window of {window} blocks": long, f"short: window of {max(window // 2, 1)} blocks": short}
    title = f"{config.sequence_length:,} tokens in blocks of {BLOCK_SIZE}, step {step} of {config.steps}"
    if options.blocks != ":":
        title += f", blocks {blocks.start} to {blocks.stop - 1}"
    figure = draw_masks(masks, title=title, blocks=blocks)
    partial = options.out.with_name(f".{options.out.name}.tmp")
    try:
        figure.savefig(partial, format=options.out.suffix[1:])
        partial.replace(options.out)
    except OSError as error:
        raise UsageError(f"--out {options.out}: cannot be written ({error.strerror}); name another file") from error
    finally:
        partial.unlink(missing_ok=True)
    for name, mask in masks.items():
        print(f"{name}: {count_blocks(mask)}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"draw_masks.py: error: {error}", file=sys.stderr)
        sys.exit(2)
