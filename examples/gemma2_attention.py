"""Gemma 2's attention: local and global layers in turn, grouped heads, and scores that are capped.

    python examples/gemma2_attention.py [--out DIR]

Source: Gemma 2 (arXiv:2408.00118), section 2, at a tiny size.
"""

import jax
import jax.numpy as jnp
from page import draw, run

from jax_speedrun.kernels.attention import block_sparse_attention
from jax_speedrun.kernels.block_mask import BlockMask
from jax_speedrun.kernels.masks import causal, window

TOKENS, HEADS, KEY_HEADS, WIDTH = 1024, 4, 2, 64
LOCAL = BlockMask.from_mask(causal() & window(left=255), TOKENS)
GLOBAL = BlockMask.from_mask(causal(), TOKENS)


@jax.jit
def two_layers(x_TD: jax.Array, weights: list[dict[str, jax.Array]]) -> jax.Array:
    """A local layer and a global one, without what lies between; rotary angles are left out."""
    for w, mask in zip(weights, (LOCAL, GLOBAL), strict=True):
        q, k, v = (jnp.einsum("td,dhk->thk", x_TD, w[name]) for name in ("q", "k", "v"))
        y_THK = block_sparse_attention(q, k, v, mask, scale=WIDTH**-0.5, soft_cap=50.0)
        x_TD = x_TD + jnp.einsum("thk,hkd->td", y_THK, w["o"])
    return x_TD


def main() -> None:
    channels = HEADS * WIDTH
    shapes = {"q": (channels, HEADS, WIDTH), "k": (channels, KEY_HEADS, WIDTH), "v": (channels, KEY_HEADS, WIDTH)}
    shapes["o"] = (HEADS, WIDTH, channels)
    x_key, *keys = jax.random.split(jax.random.key(0), 9)
    names = [(layer, name) for layer in range(2) for name in shapes]
    weights: list[dict[str, jax.Array]] = [{}, {}]
    for (layer, name), key in zip(names, keys, strict=True):
        weights[layer][name] = jax.random.normal(key, shapes[name]) * channels**-0.5
    x_TD = jax.random.normal(x_key, (TOKENS, channels))
    print("two layers:", two_layers(x_TD, weights).shape)
    gradient = jax.grad(lambda weights: jnp.sum(two_layers(x_TD, weights) ** 2))(weights)
    print("gradients are finite:", all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient)))
    draw("gemma2_attention", {"local": LOCAL, "global": GLOBAL})


if __name__ == "__main__":
    run(__doc__, main)
