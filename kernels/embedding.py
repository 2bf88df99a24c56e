"""Embedding lookup whose gradient accumulates in float32.

A bfloat16 table would otherwise receive a bfloat16 scatter-add: with the skewed
token ids of real text a frequent row sums thousands of terms, and most of them
would round away.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@jax.custom_vjp
def embed(table_VD: Array, tokens_T: Array) -> Array:
    """Rows of `table_VD` for `tokens_T`: (T, D) in the table's dtype. Ids must lie in [0, V)."""
    return table_VD[tokens_T]


def _forward(table_VD: Array, tokens_T: Array) -> tuple[Array, tuple[Array, Array]]:
    # An empty slice carries the table's shape and dtype without keeping it alive.
    return embed(table_VD, tokens_T), (table_VD[:, :0], tokens_T)


def _backward(residuals: tuple[Array, Array], d_rows_TD: Array) -> tuple[Array, np.ndarray]:
    shape_V0, tokens_T = residuals
    zeros_VD = jnp.zeros((shape_V0.shape[0], d_rows_TD.shape[1]), jnp.float32)
    gradient_VD = zeros_VD.at[tokens_T].add(d_rows_TD.astype(jnp.float32))
    return gradient_VD.astype(shape_V0.dtype), np.zeros(tokens_T.shape, jax.dtypes.float0)


embed.defvjp(_forward, _backward)
