"""Block-sparse attention masks as lists of key blocks, nearest block first.

A sequence of T tokens is cut into T / 128 blocks. For every query block the
mask says which key blocks to visit, and splits them in two lists:

* a *full* block needs no element mask: every query may see every key;
* a *partial* block applies the element rule
  `key <= query and document[key] == document[query]`.

Example: three documents (a, b, c) over six blocks, no window. `P` is visited
with the element rule, `F` without, `.` is never touched:

                     key block
    documents        0 1 2 3 4 5      partial (nearest first)   full
    query block 0 a  P . . . . .      0                         -
                1 a  F P . . . .      1                         0
                2 a  F F P . . .      2                         1 0
                3 ab P P P P . .      3 2 1 0                   -
                4 b  . . . P P .      4 3                       -
                5 bc . . . P P P      5 4 3                     -

Nearest first is what lets one set of lists serve every window: a window of w
blocks keeps the first entries, so only the *counts* change. They are run-time
values, and a window that grows during training recompiles nothing.

Source: the "Sub-3 minute" NanoGPT speedrun record of 16 January 2025 (block
masks for FlexAttention); the visiting order is that of splash attention.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

BLOCK_SIZE = 128
DOCUMENT_START = 50256  # GPT-2's <|endoftext|>, which starts every document


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Which key blocks each query block visits, as a pytree of arrays.

    Shapes, with B = T / block_size: counts (B,), indices (B, B), documents
    (T,), all int32. Entries of `indices` beyond the count are ignored. A block
    stands in at most one of the two lists, once. All leaves may carry a leading
    batch axis. The lists need not come from `long_short_masks`: any will do.
    """

    partial_counts: Array
    partial_indices: Array
    full_counts: Array
    full_indices: Array
    documents: Array
    block_size: int = dataclasses.field(default=BLOCK_SIZE, metadata={"static": True})

    def windowed(self, window_blocks: ArrayLike) -> "BlockMask":
        """The same mask cut to a window of `window_blocks` (the diagonal block always stays)."""
        # Signed, whatever comes in: an unsigned 0 - 1 would lift the cap instead of closing the window.
        window = jnp.asarray(window_blocks).astype(jnp.int32)
        partial_cap = jnp.maximum(window - self.full_counts, 1)
        full_cap = jnp.maximum(window - 1, 0)
        return dataclasses.replace(
            self,
            partial_counts=jnp.minimum(self.partial_counts, partial_cap),
            full_counts=jnp.minimum(self.full_counts, full_cap),
        )

    def dense_blocks(self) -> tuple[Array, Array]:
        """The lists as two boolean (query block, key block) matrices: (partial, full)."""
        return (
            _ordered_to_dense(self.partial_counts, self.partial_indices),
            _ordered_to_dense(self.full_counts, self.full_indices),
        )

    def transposed(self) -> "BlockMask":
        """The same visits by key block: row i lists the *query* blocks that visit key block i."""
        partial, full = (jnp.swapaxes(blocks, -1, -2) for blocks in self.dense_blocks())
        return BlockMask(*dense_to_ordered(partial), *dense_to_ordered(full), self.documents, self.block_size)

    def dense(self) -> Array:
        """The token-level (T, T) boolean matrix `visible[query, key]`. Small T only."""
        size = self.block_size
        partial, full = (jnp.repeat(jnp.repeat(blocks, size, axis=-2), size, axis=-1) for blocks in self.dense_blocks())
        position = jnp.arange(self.documents.shape[-1])
        causal = position[:, None] >= position
        same_document = self.documents[..., :, None] == self.documents[..., None, :]
        return full | (partial & causal & same_document)


def dense_to_ordered(dense: Array) -> tuple[Array, Array]:
    """Turn a boolean block matrix into counts and indices, highest index (nearest) first.

    Args:
      dense: (..., rows, columns) boolean.

    Returns:
      counts (..., rows) and indices (..., rows, columns), int32. The first
      `counts` entries of a row are its true columns in descending order.
    """
    columns = dense.shape[-1]
    counts = jnp.sum(dense, axis=-1, dtype=jnp.int32)
    # Present columns come first, and descend: one array to sort, where an argsort would move two.
    distance = jnp.arange(columns - 1, -1, -1, dtype=jnp.int32)
    order = jnp.sort(jnp.where(dense, distance, distance + columns), axis=-1)
    return counts, columns - 1 - order % columns


def long_short_masks(tokens: Array, window_blocks: ArrayLike) -> tuple[BlockMask, BlockMask]:
    """The record's two masks for one sequence: a window of `window_blocks`, and one of half that.

    Args:
      tokens: (T,) token ids; `DOCUMENT_START` begins a document. T must be a
        multiple of 128.
      window_blocks: the long window in blocks of 128 tokens, at least 1; may be
        traced. The short window is `window_blocks // 2`.

    Returns:
      (long, short), which share their index lists and differ in their counts.

    Raises:
      ValueError: if T is not a multiple of 128, or `tokens` has another rank.
    """
    if tokens.ndim != 1 or tokens.shape[0] % BLOCK_SIZE or tokens.shape[0] == 0:
        raise ValueError(
            f"tokens must have shape (T,) with T a positive multiple of {BLOCK_SIZE}, got {tokens.shape}; "
            "pad or cut the sequence (for a batch, use jax.vmap)"
        )
    documents = jnp.cumsum(tokens == DOCUMENT_START, dtype=jnp.int32)
    first_document = documents[::BLOCK_SIZE]
    last_document = documents[BLOCK_SIZE - 1 :: BLOCK_SIZE]

    block = jnp.arange(tokens.shape[0] // BLOCK_SIZE)
    query, key = block[:, None], block[None, :]
    shares_document = (first_document[:, None] <= last_document) & (first_document <= last_document[:, None])
    one_document = first_document == last_document
    same_single_document = one_document[:, None] & one_document & (first_document[:, None] == first_document)
    visited = (query >= key) & shares_document
    full = (query > key) & same_single_document

    counts, indices = dense_to_ordered(jnp.stack([visited & ~full, full]))
    unlimited = BlockMask(counts[0], indices[0], counts[1], indices[1], documents)
    return unlimited.windowed(window_blocks), unlimited.windowed(jnp.asarray(window_blocks) // 2)


def visible_pairs(tokens_T: ArrayLike, window_blocks: int) -> tuple[int, int]:
    """How many (query, key) pairs see each other in each of `long_short_masks(tokens_T, window_blocks)`.

    Each token sees from the start of its document, or of its window, to itself. Counted on the host, for FLOP.
    """
    tokens_T = np.asarray(tokens_T)
    position_T = np.arange(len(tokens_T))
    document_start_T = np.maximum.accumulate(np.where(tokens_T == DOCUMENT_START, position_T, 0))

    def pairs(window: int) -> int:  # one of no blocks still holds a query's own
        window_start_T = (position_T // BLOCK_SIZE - max(window, 1) + 1) * BLOCK_SIZE
        return int(np.sum(position_T - np.maximum(document_start_T, window_start_T) + 1))

    return pairs(window_blocks), pairs(window_blocks // 2)


def _ordered_to_dense(counts: Array, indices: Array) -> Array:
    *batch, rows, columns = indices.shape
    listed = jnp.arange(columns) < counts[..., None]
    # Unlisted entries are sent out of bounds, where the scatter drops them.
    target = jnp.where(listed, indices, columns)
    row = jnp.arange(rows)[:, None]

    def scatter(target_rows: Array) -> Array:
        return jnp.zeros((rows, columns), bool).at[row, target_rows].set(True, mode="drop")

    for _ in batch:
        scatter = jax.vmap(scatter)
    return scatter(target)
