"""Attention one query at a time in float32 (or float64): the oracle every other implementation is tested against."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..block_mask import BlockMask
from .scores import ScoreFn, apply_scores

QUERIES = 16
"""Taken together: each has its own copy of the keys and values."""


def reference_attention(
    q_THK: Array,
    k_SHK: Array,
    v_SHV: Array,
    mask: BlockMask,
    scale: float,
    scores: tuple[ScoreFn, ...] = (),
    sinks_H: Array | None = None,
) -> tuple[Array, Array]:
    """Return for each query the softmax of its scores times the values, over the keys it sees, and their log-sum-exp.

    0 and -inf if it sees none. Computes in float32, or in float64 if the inputs are; differentiable any number of
    times. Time grows with T times S, and so does memory for the mask: small ones only.
    """
    dtype = jnp.promote_types(q_THK.dtype, jnp.float32)
    q_THK, k_SHK, v_SHV = (x.astype(dtype) for x in (q_THK, k_SHK, v_SHV))
    heads = q_THK.shape[1]
    # Query head i reads key head i // group.
    k_SHK, v_SHV = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in (k_SHK, v_SHV))
    head_H1, key_S = jnp.arange(heads)[:, None], jnp.arange(len(k_SHK))

    def attend(query: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q_HK, position, visible_HS = query
        visible_HS = jnp.broadcast_to(visible_HS, (heads, len(k_SHK)))
        # What is masked is taken out, not multiplied by 0: 0 x NaN is NaN, here and in the gradients.
        seen_k, seen_v = (jnp.where(visible_HS.T[..., None], x, 0) for x in (k_SHK, v_SHV))
        scores_HS = scale * jnp.einsum("hk,shk->hs", q_HK, seen_k, precision="highest")
        scores_HS = apply_scores(scores, scores_HS, head_H1, position, key_S)
        scores_HS = jnp.where(visible_HS, scores_HS, -jnp.inf)
        if sinks_H is not None:  # a key that all see, whose value is 0
            scores_HS = jnp.concatenate([scores_HS, sinks_H[:, None].astype(dtype)], axis=-1)
        # Of a query that sees nothing the maximum is -inf; 0 keeps its exponentials at exp(-inf) = 0.
        maximum_H1 = jnp.max(scores_HS, axis=-1, keepdims=True)
        maximum_H1 = jnp.where(maximum_H1 == -jnp.inf, 0, lax.stop_gradient(maximum_H1))
        weights_HS = jnp.where(scores_HS == -jnp.inf, 0, jnp.exp(scores_HS - maximum_H1))
        total_H1 = jnp.sum(weights_HS, axis=-1, keepdims=True)
        seen_H1 = total_H1 != 0
        total_H1 = jnp.where(seen_H1, total_H1, 1)
        output_HV = jnp.einsum("hs,shv->hv", (weights_HS / total_H1)[:, : len(k_SHK)], seen_v, precision="highest")
        return output_HV, jnp.where(seen_H1, maximum_H1 + jnp.log(total_H1), -jnp.inf)[:, 0]

    visible = mask.dense()
    visible_THS = visible[:, None] if visible.ndim == 2 else jnp.swapaxes(visible, 0, 1)
    queries = q_THK, jnp.arange(len(q_THK)), visible_THS
    return lax.map(jax.checkpoint(attend), queries, batch_size=QUERIES)
