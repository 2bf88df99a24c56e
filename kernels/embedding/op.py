"""Embedding lookup whose gradient accumulates in float32, for frequent ids as fast as for rare ones.

A bfloat16 table would otherwise receive a bfloat16 scatter-add: with the skewed
token ids of real text a frequent row sums thousands of terms, and most of them
would round away. A scatter-add in float32, the plain way, is right, but on a GPU
the atomic additions to a frequent row wait for each other, and their order varies.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from ..implementation import Implementation, check_ids, check_whole, choose, first_order, vary_together
from .order import TokenOrder, sort_tokens


def embed(
    table_VD: Array, tokens_T: Array, order: TokenOrder | None = None, implementation: Implementation = "auto"
) -> Array:
    """Return rows of `table_VD` for `tokens_T`: (T, D) in the table's dtype.

    Args:
      table_VD: bfloat16 or float32.
      tokens_T: ids in [0, V); others give NaN.
      order: `sort_tokens(tokens_T, V)`, for the gradient by the Hopper kernel: one for all tables with the same
        tokens. None: sorted here, if it is needed.
      implementation: of the gradient; `hopper` is for T a multiple of 64 and D of 128.

    Raises:
      ValueError: for a table or tokens of another rank or type; if `hopper` does not support a size, or does not run
        here.
    """
    table_VD, tokens_T = jnp.asarray(table_VD), check_ids("embed", "tokens", tokens_T)
    if table_VD.ndim != 2 or not jnp.issubdtype(table_VD.dtype, jnp.floating):
        raise ValueError(f"embed: the table must be floats of shape (V, D), got {table_VD.dtype} {table_VD.shape}")
    check_whole("embed", table_VD, tokens_T)
    sizes = tokens_T.shape[0], table_VD.shape[1]
    name = choose("embed", implementation, lambda: unsupported(*sizes), arrays=(table_VD, tokens_T))
    if name != "hopper":
        order = None
    elif order is None:
        order = sort_tokens(tokens_T, table_VD.shape[0])
    return _embed(*vary_together(table_VD, tokens_T, order))


def unsupported(tokens: int, width: int) -> str | None:
    """Return what the Hopper kernel needs of a shape, None where it has it."""
    # Imported when used, here as below: Pallas' GPU backend is not part of every jaxlib.
    from . import hopper

    return hopper.unsupported(tokens, width)


def plain_gradient(d_rows_TD: Array, tokens_T: Array, vocab_size: int, dtype: DTypeLike) -> Array:
    """Return the gradient (V, D) by scatter-add: what the kernel's must equal."""
    wide_TD = d_rows_TD.astype(jnp.promote_types(d_rows_TD.dtype, jnp.float32))
    zeros_VD = jnp.zeros_like(wide_TD, shape=(vocab_size, d_rows_TD.shape[1]))
    return zeros_VD.at[tokens_T].add(wide_TD, mode="drop", wrap_negative_indices=False).astype(dtype)


@jax.custom_vjp
def _embed(table_VD: Array, tokens_T: Array, order: TokenOrder | None) -> Array:
    whole = jax.typeof(table_VD).sharding  # on an Explicit mesh JAX asks how the rows are split
    rows = table_VD.at[tokens_T]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=whole)


def _forward(
    table_VD: Array, tokens_T: Array, order: TokenOrder | None
) -> tuple[Array, tuple[Array, Array, TokenOrder | None]]:
    # An empty slice carries the table's shape and dtype without keeping it alive.
    return _embed(table_VD, tokens_T, order), (table_VD[:, :0], tokens_T, order)


def _backward(residuals: tuple[Array, Array, TokenOrder | None], d_rows_TD: Array) -> tuple[Array, None, None]:
    shape_V0, tokens_T, order = residuals
    if order is None:
        return plain_gradient(d_rows_TD, tokens_T, shape_V0.shape[0], shape_V0.dtype), None, None
    from .hopper import hopper_gradient

    return hopper_gradient(first_order("embed", d_rows_TD), order, shape_V0.dtype), None, None


_embed.defvjp(_forward, _backward)
