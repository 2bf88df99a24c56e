"""Longformer's attention: a window on both sides, and a few tokens that see all and are seen by all.

    python examples/longformer_attention.py [--out DIR]

Source: Longformer (arXiv:2004.05150), figure 2, at a tiny size. Its global tokens have projections of their own, which
are left out here: the mask is the same.
"""

import jax
import jax.numpy as jnp
from page import draw, run

from jax_speedrun.kernels.attention import block_sparse_attention
from jax_speedrun.kernels.block_mask import BlockMask
from jax_speedrun.kernels.masks import dilated, global_tokens, key_is, window

TOKENS, HEADS, WIDTH = 1000, 2, 64  # no multiple of the blocks


def make_masks(question_T: jax.Array, padding_T: jax.Array) -> dict[str, BlockMask]:
    """The tokens of a question see all, and all see them; nobody sees padding."""
    near, far = window(left=128, right=128), window(left=256, right=256) & dilated(2)
    return {
        name: BlockMask.from_mask((reach | global_tokens(question_T)) & ~key_is(padding_T), TOKENS)
        for name, reach in {"window": near, "dilated window": far}.items()
    }


def main() -> None:
    at = jnp.arange(TOKENS)
    masks = make_masks(at < 8, at >= 900)
    q, k, v = jax.random.normal(jax.random.key(0), (3, TOKENS, HEADS, WIDTH))
    for name, mask in masks.items():
        output = jax.jit(block_sparse_attention)(q, k, v, mask)
        without = jax.jit(block_sparse_attention)(q, k.at[900:].set(7.0), v, mask)
        print(f"{name}: {output.shape}, padding is not felt: {bool(jnp.all(output == without))}")
    draw("longformer_attention", masks)


if __name__ == "__main__":
    run(__doc__, main)
