"""Block-sparse attention inside Flax NNX's layers. Imports no Flax: the layer calls what it is given.

nnx.MultiHeadAttention(..., decode=False, attention_fn=attention_fn(mask))
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from ..block_mask import BlockMask
from .op import block_sparse_attention


def attention_fn(mask: BlockMask, **options: Any) -> Callable[..., Array]:
    """Return an `attention_fn` for `flax.nnx.MultiHeadAttention`, whose mask is `mask`.

    Args:
      mask: the blocks to visit, of the layer's length. It stands in place of the layer's own masks.
      **options: of `block_sparse_attention`.

    Returns:
      A function of query, key and value, (..., T, H, K), that raises ValueError for what a layer may ask besides and
      blocks cannot do: a dense mask or bias, dropout, or weights to be sown.
    """

    def attend(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        is_causal: bool = False,
        module: Any = None,
        dtype: Any = None,
        **ignored: Any,
    ) -> Array:
        del ignored  # what only matters with dropout, and the precision of dense products
        refused = {
            "a dense mask: give it to BlockMask.from_mask": mask is not None,
            "a dense bias: use score_fn": bias is not None,
            "is_causal: put causal() into the mask": is_causal,
            "dropout": dropout_rate > 0 and not deterministic,
            "sown weights": module is not None,
        }
        for what, asked in refused.items():
            if asked:
                raise ValueError(f"attention_fn: block-sparse attention cannot take {what}")
        query, key, value = (x if dtype is None else x.astype(dtype) for x in (query, key, value))
        if query.ndim <= 4:
            return block_sparse_attention(query, key, value, block_mask, **options)
        q, k, v = (jnp.reshape(x, (-1, *x.shape[-3:])) for x in (query, key, value))
        output = block_sparse_attention(q, k, v, block_mask, **options)
        return output.reshape(*query.shape[:-1], output.shape[-1])

    block_mask = mask
    return attend
