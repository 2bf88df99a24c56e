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
    (T,), all integers. Entries of `indices` beyond the count are ignored. A block
    stands in at most one of the two lists, once. All leaves may carry a leading
    batch axis. The lists need not come from `long_short_masks`: any will do, in
    any order.
    """

    partial_counts: Array
    partial_indices: Array
    full_counts: Array
    full_indices: Array
    documents: Array
    block_size: int = dataclasses.field(default=BLOCK_SIZE, metadata={"static": True})

    def windowed(self, window_blocks: ArrayLike) -> "BlockMask":
        """Return the mask without key blocks that lie `window_blocks` or more before the query's own, which stays.

        Raises:
          ValueError: for a window that is no integer, or lists that do not fit together.
        """
        mask = self.checked()
        window = jnp.maximum(_window(window_blocks, mask.partial_indices.shape[-1]), 1)
        partial_counts, partial_indices = _nearer(mask.partial_counts, mask.partial_indices, window)
        full_counts, full_indices = _nearer(mask.full_counts, mask.full_indices, window)
        return dataclasses.replace(
            mask,
            partial_counts=partial_counts,
            partial_indices=partial_indices,
            full_counts=full_counts,
            full_indices=full_indices,
        )

    def checked(self) -> "BlockMask":
        """Return the mask with its leaves as int32 arrays.

        Raises:
          ValueError: unless shapes, types and batch axes are those that the class describes.
        """
        leaves = {name: getattr(self, name) for name in _LEAVES}
        arrays = {name: x if isinstance(x, jax.Array) else np.asarray(x) for name, x in leaves.items()}
        documents, size = arrays["documents"], self.block_size
        if documents.ndim not in (1, 2) or size < 1 or documents.shape[-1] % size:
            raise ValueError(
                f"BlockMask: documents must be (T,) or (N, T) with T a multiple of block_size = {size}, "
                f"got {documents.shape}"
            )
        *batch, tokens = documents.shape
        blocks = tokens // size
        for name, array in arrays.items():
            own = {"documents": (tokens,), "partial_counts": (blocks,), "full_counts": (blocks,)}
            wanted = (*batch, *own.get(name, (blocks, blocks)))
            if array.shape != wanted or not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(
                    f"BlockMask: {name} must be integers of shape {wanted}, as documents are {documents.shape} "
                    f"in blocks of {size}, got {array.dtype} {array.shape}"
                )
        return BlockMask(**{name: jnp.asarray(x).astype(jnp.int32) for name, x in arrays.items()}, block_size=size)

    def dense_blocks(self) -> tuple[Array, Array]:
        """The lists as two boolean (query block, key block) matrices: (partial, full)."""
        mask = self.checked()
        return (
            _ordered_to_dense(mask.partial_counts, mask.partial_indices),
            _ordered_to_dense(mask.full_counts, mask.full_indices),
        )

    def transposed(self) -> "BlockMask":
        """The same visits by key block: row i lists the *query* blocks that visit key block i."""
        partial, full = (jnp.swapaxes(blocks, -1, -2) for blocks in self.dense_blocks())
        return BlockMask(*dense_to_ordered(partial), *dense_to_ordered(full), self.documents, self.block_size)

    def dense(self) -> Array:
        """The token-level (T, T) boolean matrix `visible[query, key]`. Small T only."""
        size = self.block_size
        partial, full = (jnp.repeat(jnp.repeat(blocks, size, axis=-2), size, axis=-1) for blocks in self.dense_blocks())
        documents = jnp.asarray(self.documents)
        position = jnp.arange(documents.shape[-1])
        causal = position[:, None] >= position
        same_document = documents[..., :, None] == documents[..., None, :]
        return full | (partial & causal & same_document)


_LEAVES = tuple(field.name for field in dataclasses.fields(BlockMask) if field.name != "block_size")


def dense_to_ordered(dense: Array) -> tuple[Array, Array]:
    """Turn a boolean block matrix into counts and indices, highest index (nearest) first.

    Args:
      dense: (..., rows, columns) boolean.

    Returns:
      counts (..., rows) and indices (..., rows, columns), int32. The first
      `counts` entries of a row are its true columns in descending order.
    """
    dense = jnp.asarray(dense)
    columns = dense.shape[-1]
    counts = jnp.sum(dense, axis=-1, dtype=jnp.int32)
    # Present columns come first, and descend: one array to sort, where an argsort would move two.
    distance = jnp.arange(columns - 1, -1, -1, dtype=jnp.int32)
    order = jnp.sort(jnp.where(dense, distance, distance + columns), axis=-1)
    return counts, columns - 1 - order % columns


def long_short_masks(tokens: ArrayLike, window_blocks: ArrayLike) -> tuple[BlockMask, BlockMask]:
    """The record's two masks for one sequence: a window of `window_blocks`, and one of half that.

    Args:
      tokens: (T,) token ids; `DOCUMENT_START` begins a document. T must be a
        multiple of 128.
      window_blocks: the long window in blocks of 128 tokens, at least 1; may be
        traced. The short window is `window_blocks // 2`.

    Returns:
      (long, short), which share their index lists and differ in their counts.

    Raises:
      ValueError: if T is not a multiple of 128, or `tokens` has another rank or a type that cannot hold
        `DOCUMENT_START`; for a window that is no integer.
    """
    _check_tokens(tokens)
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.ndim != 1 or tokens.shape[0] % BLOCK_SIZE or tokens.shape[0] == 0:
        raise ValueError(
            f"tokens must have shape (T,) with T a positive multiple of {BLOCK_SIZE}, got {tokens.shape}; "
            "pad or cut the sequence (for a batch, use jax.vmap)"
        )
    documents = jnp.cumsum(jnp.asarray(tokens == DOCUMENT_START), dtype=jnp.int32)
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
    window = _window(window_blocks, 2 * len(block))
    return _capped(unlimited, window), _capped(unlimited, window // 2)


def _capped(mask: BlockMask, window: Array) -> BlockMask:
    """Return `mask.windowed(window)` of lists that hold a run of blocks, nearest first: only counts change."""
    return dataclasses.replace(
        mask,
        partial_counts=jnp.minimum(mask.partial_counts, jnp.maximum(window - mask.full_counts, 1)),
        full_counts=jnp.minimum(mask.full_counts, jnp.maximum(window - 1, 0)),
    )


def _nearer(counts: Array, indices: Array, window: Array) -> tuple[Array, Array]:
    """Move blocks that are not in the window behind those that are, which keep their order."""
    rows, columns = indices.shape[-2:]
    place = jnp.arange(columns)
    keeps = (jnp.arange(rows)[:, None] - indices < window) & (place < counts[..., None])
    order = jnp.argsort(jnp.where(keeps, place, columns + place), axis=-1)
    return jnp.sum(keeps, axis=-1, dtype=jnp.int32), jnp.take_along_axis(indices, order, axis=-1)


def _window(window_blocks: ArrayLike, most: int) -> Array:
    """Return a window as a signed int32, at most `most`: an unsigned 0 - 1 would lift a cap instead of closing it."""
    window = window_blocks if isinstance(window_blocks, jax.Array) else np.asarray(window_blocks)
    if window.ndim != 0 or not (jnp.issubdtype(window.dtype, jnp.integer) or isinstance(window_blocks, int)):
        raise ValueError(f"a window must be an integer, of blocks, got {window.dtype} {window.shape}")
    if isinstance(window_blocks, int):  # of any size
        return jnp.int32(max(min(window_blocks, most), 0))
    if jnp.iinfo(window.dtype).max > most:
        window = window.clip(0, most)
    return jnp.asarray(window.astype(np.int32))


def _check_tokens(tokens_T: ArrayLike) -> None:
    dtype = jnp.result_type(tokens_T)
    if not jnp.issubdtype(dtype, jnp.integer) or jnp.iinfo(dtype).max < DOCUMENT_START:
        raise ValueError(f"tokens must be of an integer type that can hold {DOCUMENT_START}, got {dtype}")


def visible_pairs(tokens_T: ArrayLike, window_blocks: int) -> tuple[int, int]:
    """How many (query, key) pairs see each other in each of `long_short_masks(tokens_T, window_blocks)`.

    Each token sees from the start of its document, or of its window, to itself. Counted on the host, for FLOP.
    """
    _check_tokens(tokens_T)
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
