"""What the Hopper kernels walk: the mask's lists, merged, packed into integers and sorted for balance.

One row of a walk serves one tile of 128 queries (or, for dK and dV, of 128
keys) and holds everything a program needs, side by side in memory:

    row   count   entry 0   entry 1   ...

An entry packs the other side's block with what can be skipped inside it:

    block << 5  |  partial << 4  |  seen[query half][key half], 4 bits

      queries  0-63   | 1 0 |     the bits of a diagonal block: the upper right
      queries 64-127  | 1 1 |     64 x 64 corner lies above the diagonal.

A cleared bit promises that no query of that half sees a key of that half.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from .attention_hopper_config import HALF
from .block_mask import BlockMask

ENTRY_BITS = 5
PARTIAL_BIT = 4
HEADER = 2  # row and count come first
# A multiprocessor's share of the work is cut in portions of these fractions.
PORTIONS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16)
# Rows are sorted longest first, so that no long row starts last, but only
# within this many blocks: neighbours share keys, which should still be in L2.
SORT_GROUP = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walks:
    """Both directions: `by_query` and `by_key`, each (B, HEADER + B + 1) int32; B blocks."""

    by_query: Array
    by_key: Array


def build_walks(mask: BlockMask) -> Walks:
    """Pack the lists of `mask` (one sequence), for any lists and documents."""
    partial_QK, full_QK = mask.dense_blocks()
    seen_QK = _seen_halves(mask.documents)
    visited_QK = full_QK | (partial_QK & (seen_QK > 0))
    flags_QK = jnp.where(full_QK, 0b1111, (1 << PARTIAL_BIT) | seen_QK)
    return Walks(_pack(visited_QK, flags_QK), _pack(visited_QK.T, flags_QK.T))


def _seen_halves(documents_T: Array) -> Array:
    """For each (query block, key block): which 64 x 64 quarters may hold a visible pair, as 4 bits.

    Looks at the range of document ids in each half, so it may keep a quarter
    that turns out empty, and never drops one that is not.
    """
    halves = documents_T.reshape(-1, HALF)
    low, high = halves.min(axis=1), halves.max(axis=1)
    half = jnp.arange(halves.shape[0])
    seen = (low[:, None] <= high) & (low <= high[:, None]) & (half[:, None] >= half)
    quarters = seen.reshape(halves.shape[0] // 2, 2, -1, 2).astype(jnp.int32)
    weight = jnp.array([[1, 2], [4, 8]])
    return jnp.einsum("qikj,ij->qk", quarters, weight)


def _pack(visited_RC: Array, flags_RC: Array) -> Array:
    rows = visited_RC.shape[0]
    entry_RC = (jnp.arange(rows) << ENTRY_BITS) | flags_RC
    counts_R = visited_RC.sum(axis=1, dtype=jnp.int32)
    entries_RC = jnp.sort(jnp.where(visited_RC, entry_RC, jnp.iinfo(jnp.int32).max), axis=1)
    row_R = jnp.arange(rows, dtype=jnp.int32)
    order_R = jnp.argsort((row_R // SORT_GROUP) * (rows + 1) + rows - counts_R)
    # One column of padding lets the kernels read one entry ahead.
    table = jnp.concatenate([row_R[:, None], counts_R[:, None], entries_RC, row_R[:, None]], axis=1)
    return table[order_R].astype(jnp.int32)


def share_out(walk: Array, heads: int, multiprocessors: int) -> Array:
    """Cut the tiles (row by row, all heads of a row together) into portions of known cost, one a program.

    Large portions come first and small ones last: the hardware starts them in
    order wherever a multiprocessor comes free, so most tile changes happen
    inside a program, which overlaps them, and all multiprocessors still finish
    together (guided self-scheduling).

    Returns: (programs + 1,) int32, the first tile of each program.
    """
    fractions = jnp.repeat(jnp.array(PORTIONS) / multiprocessors, multiprocessors)
    cost_R = walk[:, 1] + 1  # a tile itself costs about as much as a step
    end_R = jnp.cumsum(cost_R) * heads
    target = jnp.cumsum(fractions)[:-1] * end_R[-1]
    row = jnp.searchsorted(end_R, target, side="right", method="compare_all")
    inside = target - (end_R - cost_R * heads)[row]
    first = row * heads + jnp.round(inside / cost_R[row]).astype(jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), first, jnp.array([walk.shape[0] * heads])]).astype(jnp.int32)
