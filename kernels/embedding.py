"""Embedding lookup whose gradient accumulates in float32, for frequent ids as fast as for rare ones.

A bfloat16 table would otherwise receive a bfloat16 scatter-add: with the skewed
token ids of real text a frequent row sums thousands of terms, and most of them
would round away. A scatter-add in float32, the plain way, is right, but on a GPU
the atomic additions to a frequent row wait for each other, and their order varies.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from .embedding_order import TokenOrder, sort_tokens

__all__ = ["TokenOrder", "embed", "plain_gradient", "sort_tokens"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def embed(table_VD: Array, tokens_T: Array, order: TokenOrder | None = None, interpret: bool = False) -> Array:
    """Rows of `table_VD` for `tokens_T`: (T, D) in the table's dtype.

    Args:
      table_VD: bfloat16 or float32.
      tokens_T: ids in [0, V).
      order: `sort_tokens(tokens_T, V)`, one for all tables, for the gradient by
        the Hopper kernel; None for the plain one. T must then be a multiple of 64
        and D of 128.
      interpret: run the kernel in Pallas' interpreter (any device, slow; for tests).
    """
    return table_VD[tokens_T]


def plain_gradient(d_rows_TD: Array, tokens_T: Array, vocabulary: int, dtype: DTypeLike) -> Array:
    """The gradient (V, D) by scatter-add: what the fast ones must equal."""
    zeros_VD = jnp.zeros((vocabulary, d_rows_TD.shape[1]), jnp.float32)
    return zeros_VD.at[tokens_T].add(d_rows_TD.astype(jnp.float32)).astype(dtype)


def _forward(
    table_VD: Array, tokens_T: Array, order: TokenOrder | None, interpret: bool
) -> tuple[Array, tuple[Array, Array, TokenOrder | None]]:
    # An empty slice carries the table's shape and dtype without keeping it alive.
    return embed(table_VD, tokens_T, order, interpret), (table_VD[:, :0], tokens_T, order)


def _backward(
    interpret: bool, residuals: tuple[Array, Array, TokenOrder | None], d_rows_TD: Array
) -> tuple[Array, None, None]:
    shape_V0, tokens_T, order = residuals
    if order is None:
        return plain_gradient(d_rows_TD, tokens_T, shape_V0.shape[0], shape_V0.dtype), None, None
    # Imported when used: Pallas' GPU backend is not part of every jaxlib.
    from .embedding_hopper import hopper_gradient

    return hopper_gradient(d_rows_TD, order, shape_V0.dtype, interpret=interpret), None, None


embed.defvjp(_forward, _backward)
