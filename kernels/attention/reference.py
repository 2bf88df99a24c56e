"""Dense attention in float32 (or float64): the oracle every other implementation is tested against."""

import jax.numpy as jnp
from jax import Array

from ..block_mask import BlockMask


def reference_attention(q_THK: Array, k_THK: Array, v_THK: Array, mask: BlockMask, scale: float) -> Array:
    """Masked softmax attention with the whole (H, T, T) score matrix in memory.

    Computes in float32, or in float64 if the inputs are. Rows that see nothing
    give 0. Memory grows with T squared: small T only.
    """
    dtype = jnp.promote_types(q_THK.dtype, jnp.float32)
    q_THK, k_THK, v_THK = (x.astype(dtype) for x in (q_THK, k_THK, v_THK))
    visible_TS = mask.dense()
    scores_HTS = scale * jnp.einsum("thk,shk->hts", q_THK, k_THK, precision="highest")
    scores_HTS = jnp.where(visible_TS, scores_HTS, -jnp.inf)
    # A row that sees nothing has maximum -inf; 0 keeps its exponentials at exp(-inf) = 0.
    maximum_HT1 = jnp.max(scores_HTS, axis=-1, keepdims=True)
    maximum_HT1 = jnp.where(jnp.isfinite(maximum_HT1), maximum_HT1, 0)
    weights_HTS = jnp.where(visible_TS, jnp.exp(scores_HTS - maximum_HT1), 0)
    total_HT1 = jnp.sum(weights_HTS, axis=-1, keepdims=True)
    weights_HTS = weights_HTS / jnp.where(total_HT1 == 0, 1, total_HT1)
    return jnp.einsum("hts,shk->thk", weights_HTS, v_THK, precision="highest")
