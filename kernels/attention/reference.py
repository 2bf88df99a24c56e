"""Attention one query at a time in float32 (or float64): the oracle every other implementation is tested against."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..block_mask import BlockMask

QUERIES = 16
"""Taken together: each has its own copy of the keys and values."""


def reference_attention(q_THK: Array, k_SHK: Array, v_SHK: Array, mask: BlockMask, scale: float) -> Array:
    """Return the softmax of each query's scores times the values, over the keys that the query sees; 0 if none.

    Computes in float32, or in float64 if the inputs are; differentiable any number of times. Time grows with T
    squared, and so does memory for the mask: small T only.
    """
    dtype = jnp.promote_types(q_THK.dtype, jnp.float32)
    q_THK, k_SHK, v_SHK = (x.astype(dtype) for x in (q_THK, k_SHK, v_SHK))

    def attend(query: tuple[Array, Array]) -> Array:
        q_HK, visible_S = query
        # What is masked is taken out, not multiplied by 0: 0 x NaN is NaN, here and in the gradients.
        seen_k, seen_v = (jnp.where(visible_S[:, None, None], x, 0) for x in (k_SHK, v_SHK))
        scores_HS = scale * jnp.einsum("hk,shk->hs", q_HK, seen_k, precision="highest")
        scores_HS = jnp.where(visible_S, scores_HS, -jnp.inf)
        # Of a query that sees nothing the maximum is -inf; 0 keeps its exponentials at exp(-inf) = 0.
        maximum_H1 = jnp.max(scores_HS, axis=-1, keepdims=True)
        maximum_H1 = jnp.where(jnp.isfinite(maximum_H1), maximum_H1, 0)
        weights_HS = jnp.where(visible_S, jnp.exp(scores_HS - maximum_H1), 0)
        total_H1 = jnp.sum(weights_HS, axis=-1, keepdims=True)
        weights_HS = weights_HS / jnp.where(total_H1 == 0, 1, total_H1)
        return jnp.einsum("hs,shk->hk", weights_HS, seen_v, precision="highest")

    return lax.map(jax.checkpoint(attend), (q_THK, mask.dense()), batch_size=QUERIES)
