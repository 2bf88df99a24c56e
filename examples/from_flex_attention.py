"""A FlexAttention user's port: the functions stay, `create_block_mask` becomes `from_mask`, `flex_attention` the op.

python examples/from_flex_attention.py [--out DIR]

PyTorch                                                   here
mask_mod(b, h, q_idx, kv_idx)                             mask_mod(fn, heads=H): torch.where becomes jnp.where
score_mod(score, b, h, q_idx, kv_idx)                     score_mod(fn)
create_block_mask(fn, B, H, Q, KV)                        BlockMask.from_mask(mask_mod(fn), Q, KV)
and_masks(a, b), or_masks(a, b)                           mask_mod(a) & mask_mod(b), |, ~
flex_attention(q, k, v, score_mod, block_mask)            block_sparse_attention(q, k, v, mask, score_fn=...)
(B, H, T, K)                                              (B, T, H, K)
enable_gqa=True                                           fewer heads of keys
return_lse=True                                           return_residual=True
"""

import jax
import jax.numpy as jnp
from page import draw, run

from jax_speedrun.kernels.attention import block_sparse_attention
from jax_speedrun.kernels.attention.scores import score_mod
from jax_speedrun.kernels.block_mask import BlockMask
from jax_speedrun.kernels.masks import mask_mod, window

TOKENS, HEADS, WIDTH = 1024, 4, 64


def causal_and_near(b, h, q_idx, kv_idx):
    """Each head sees twice as far as the one before."""
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= 64 * 2**h)


def alibi(score, b, h, q_idx, kv_idx):
    return score + jnp.exp2(-(h + 1) * 8.0 / HEADS) * (kv_idx - q_idx)


def main() -> None:
    ported = BlockMask.from_mask(mask_mod(causal_and_near, heads=HEADS), TOKENS)
    composed = BlockMask.from_mask(mask_mod(causal_and_near, heads=HEADS) & window(left=200), TOKENS)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, TOKENS, HEADS, WIDTH))
    output, lse = block_sparse_attention(q, k, v, ported, score_fn=score_mod(alibi), return_residual=True)
    print("output", output.shape, "log-sum-exp", lse.shape)
    draw("from_flex_attention", {"as it was": ported, "with a window": composed})


if __name__ == "__main__":
    run(__doc__, main)
