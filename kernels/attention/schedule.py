"""The schedule of the Hopper kernels: the mask's lists, merged, packed into integers and put in the order of work.

One row of it serves one tile of 128 queries (or, for dK and dV, of 128
keys) and holds everything a program needs, side by side in memory:

    row   count   entry 0   entry 1   ...

An entry packs the other side's block with what can be skipped inside it:

    block << 6  |  positions << 5  |  documents << 4  |  seen[query half][key half], 4 bits

      queries  0-63   | 1 0 |     the bits of a diagonal block: the upper right
      queries 64-127  | 1 1 |     64 x 64 corner lies above the diagonal.

A cleared `seen` bit promises that no query of that half sees a key of that
half. A row that visits nothing has one entry without any: a tile always has a
step. `documents` and `positions` say what a partial block must compare: a block
off the diagonal need not look at positions, nor one in one document at documents.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..block_mask import BLOCK_SIZE, BlockMask
from ..hopper.config import MULTIPROCESSORS, WARPGROUP_ROWS, WARPGROUPS
from ..implementation import interpreting

# The block of the mask is the tile that a program owns: one half for each of its warpgroups.
assert WARPGROUPS * WARPGROUP_ROWS == BLOCK_SIZE

STEADY = 0.75
"""Share of the tiles that go in rounds to one program per multiprocessor. 0.5 was 3-9 % slower forward; handing each a
run of neighbouring tiles, 40-50 %: the programs then read all over the sequence, and L2 holds nothing."""

ENTRY_BITS = 6
DOCUMENTS_BIT, POSITIONS_BIT = 4, 5
HEADER = 2  # row and count come first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Both directions: `by_query` and `by_key`, each (B, HEADER + B + 2) int32; B blocks."""

    by_query: Array
    by_key: Array


def build_schedule(mask: BlockMask) -> Schedule:
    """Pack the lists of `mask` (one sequence), for any lists and documents."""
    partial_QK, full_QK = mask.dense_blocks()
    low_H, high_H = _document_range(mask.documents, WARPGROUP_ROWS)
    half = jnp.arange(low_H.shape[0])
    seen_HH = (low_H[:, None] <= high_H) & (low_H <= high_H[:, None]) & (half[:, None] >= half)
    blocks = low_H.shape[0] // 2
    quarters = seen_HH.reshape(blocks, 2, blocks, 2).astype(jnp.int32)
    seen_QK = jnp.einsum("qikj,ij->qk", quarters, jnp.array([[1, 2], [4, 8]]))

    low_B, high_B = _document_range(mask.documents, BLOCK_SIZE)
    one_document_QK = (low_B == high_B)[:, None] & (low_B == high_B) & (low_B[:, None] == low_B)
    diagonal_QK = jnp.eye(blocks, dtype=jnp.int32)
    compare_QK = jnp.where(one_document_QK, 0, 1 << DOCUMENTS_BIT) | (diagonal_QK << POSITIONS_BIT)

    visited_QK = full_QK | (partial_QK & (seen_QK > 0))
    flags_QK = jnp.where(full_QK, 0b1111, compare_QK | seen_QK)
    # Both directions in one stack: half as many small kernels as one after the other.
    both = (jnp.stack([x, x.T]) for x in (visited_QK, flags_QK))
    by_query, by_key = jax.vmap(_pack)(*both)
    return Schedule(by_query, by_key)


def _document_range(documents_T: Array, size: int) -> tuple[Array, Array]:
    """Return the lowest and highest id in each group of `size` tokens. Ranges that overlap may share a document."""
    groups = documents_T.reshape(-1, size)
    return groups.min(axis=1), groups.max(axis=1)


def _pack(visited_RC: Array, flags_RC: Array) -> Array:
    rows = visited_RC.shape[0]
    entry_RC = (jnp.arange(rows) << ENTRY_BITS) | flags_RC
    counts_R = jnp.maximum(visited_RC.sum(axis=1, dtype=jnp.int32), 1)
    entries_RC = jnp.sort(jnp.where(visited_RC, entry_RC, jnp.iinfo(jnp.int32).max), axis=1)
    row_R = jnp.arange(rows, dtype=jnp.int32)
    nothing_R = (row_R << ENTRY_BITS) | (1 << DOCUMENTS_BIT)
    entries_RC = jnp.where(visited_RC.any(axis=1, keepdims=True), entries_RC, nothing_R[:, None])
    # In sequence, so that programs at work read the same keys; but the tiles handed out last go longest first.
    order_R = jnp.argsort(jnp.where(row_R < STEADY * rows, row_R, 2 * rows - counts_R))
    # Two columns of padding let the kernels read two entries ahead.
    padding_R2 = jnp.zeros((rows, 2), jnp.int32)
    table = jnp.concatenate([row_R[:, None], counts_R[:, None], entries_RC, padding_R2], axis=1)
    return table[order_R].astype(jnp.int32)


def assign_tiles(tiles: int, multiprocessors: int | None = None) -> np.ndarray:
    """Return which tiles each program takes: (programs, 3) int32 of first tile, stride, number of tiles.

    Most tiles go round and round to one program per multiprocessor, so that all
    programs work near each other (what they read is in L2), and each hides the
    change of tiles. The rest are portions of two tiles and then of one, which
    the hardware starts wherever a program has ended: that evens out what the
    first left uneven.

        tiles     0 1   2 3   4 5   6 7  |  8 9  |  10  |  11     2 multiprocessors: 4 rounds,
        program   A B   A B   A B   A B  |   C   |   D  |   E     one pair, two single tiles

    Args:
      tiles: how many there are.
      multiprocessors: by default a GPU's, or 1 in the interpreter, which runs one program after the other.
    """
    if multiprocessors is None:
        multiprocessors = 1 if interpreting() else MULTIPROCESSORS
    rounds = int(STEADY * tiles / multiprocessors)
    start = rounds * multiprocessors
    pairs = (tiles - start) // 4
    steady = [(i, multiprocessors, rounds) for i in range(multiprocessors) if rounds]
    double = [(start + 2 * i, 1, 2) for i in range(pairs)]
    single = [(i, 1, 1) for i in range(start + 2 * pairs, tiles)]
    return np.array(steady + double + single, np.int32)
