"""A prefix language model on packed documents: each begins with a prompt that sees itself whole; the rest is causal.

    python examples/prefix_lm.py [--out DIR]

Source: T5 (arXiv:1910.10683), figure 4, with documents packed into one sequence.
"""

import jax
import jax.numpy as jnp
from page import draw, run

from jax_speedrun.kernels.attention import block_sparse_attention
from jax_speedrun.kernels.block_mask import BlockMask
from jax_speedrun.kernels.masks import causal, key_is, same_document

TOKENS, HEADS, WIDTH = 1024, 2, 64


@jax.jit
def make_mask(starts_D: jax.Array, prompt_D: jax.Array) -> BlockMask:
    """Documents that start at some tokens, with prompts so long: traced numbers, others compile nothing anew."""
    at = jnp.arange(TOKENS)
    document_T = jnp.searchsorted(starts_D, at, side="right") - 1
    in_prompt_T = at - starts_D[document_T] < prompt_D[document_T]
    return BlockMask.from_mask(same_document(document_T) & (causal() | key_is(in_prompt_T)), TOKENS)


def main() -> None:
    mask = make_mask(jnp.array([0, 300, 820]), jnp.array([140, 60, 150]))
    q, k, v = jax.random.normal(jax.random.key(0), (3, TOKENS, HEADS, WIDTH))
    output = block_sparse_attention(q, k, v, mask)
    changed = block_sparse_attention(q, k, v.at[139].add(1.0), mask)
    felt = jnp.flatnonzero(jnp.any(output != changed, axis=(1, 2)))
    print(f"the prompt's last token is felt by tokens {int(felt[0])} to {int(felt[-1])}, all of its document")
    draw("prefix_lm", {"prefix LM, three documents": mask})


if __name__ == "__main__":
    run(__doc__, main)
