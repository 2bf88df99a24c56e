"""The tokens of a sequence in the order of their ids: sorted once, read by the gradients of all tables."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..implementation import check_ids


class TokenOrder(NamedTuple):
    """A stable sort of T tokens by id.

    tokens_T        7  3  7  0  3  7
    sorted_T        0  3  3  7  7  7
    permutation_T   3  1  4  0  2  5     where each of them stood
    first_V         0  6  6  1  6  6  6  3  6 ...  where an id begins in sorted_T; T: absent
    """

    sorted_T: Array
    permutation_T: Array
    first_V: Array


def sort_tokens(tokens_T: Array, vocab_size: int) -> TokenOrder:
    """Sort integer ids in [0, `vocab_size`).

    Ids outside are clipped: kernels address memory by them.

    Raises:
      ValueError: for another rank or type, or no tokens.
    """
    tokens_T = check_ids("sort_tokens", "tokens", tokens_T)
    length = tokens_T.shape[0]
    if not length:
        raise ValueError("sort_tokens: tokens must be at least one")
    position_T = lax.iota(jnp.int32, length)
    ids_T = jnp.clip(tokens_T, 0, vocab_size - 1).astype(jnp.int32)
    # Two int32 operands: what XLA turns into one radix sort on a GPU.
    sorted_T, permutation_T = lax.sort((ids_T, position_T), num_keys=1, is_stable=True)
    begins_T = jnp.concatenate([jnp.ones(1, bool), sorted_T[1:] != sorted_T[:-1]])
    # Later tokens of an id go to places of their own beyond the table, and so nowhere: no two writes meet.
    place_T = jnp.where(begins_T, sorted_T, vocab_size + position_T)
    first_V = jnp.full(vocab_size, length, jnp.int32).at[place_T].set(position_T, mode="drop", unique_indices=True)
    return TokenOrder(sorted_T, permutation_T, first_V)
