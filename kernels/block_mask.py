"""Block-sparse attention masks as lists of key blocks, nearest block first.

A sequence of T tokens is cut into T / 128 blocks. For every query block the
mask says which key blocks to visit, and splits them in two lists:

* a *full* block needs no element mask: every query may see every key;
* a *partial* block applies the mask function, a predicate of masks.py; the
  record's is `causal() & same_document(ids)`.

Example: three documents (a, b, c) over six blocks, no window. `P` is visited
with the mask function, `F` without, `.` is never touched:

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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .implementation import check_whole
from .masks import Blocks, Mask, causal, causal_document_ids, mask_fn, same_document, whole_number

BLOCK_SIZE = 128
DOCUMENT_START = 50256  # GPT-2's <|endoftext|>, which starts every document


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Which key blocks each query block visits, as a pytree of arrays.

    Shapes, with B blocks of queries and D blocks of keys: counts (B,), indices
    (B, D), all integers. Entries of `indices` beyond the count are ignored. A block
    stands in at most one of the two lists, once. `predicate` is the mask function
    that partial blocks apply. All leaves may carry a leading batch axis.
    `from_mask` makes the lists that a predicate needs; any others will do, in any
    order: what no list names is not seen, and full blocks are visible throughout.

    A last block may be short: then say how long the sequences are.
    """

    partial_counts: Array
    partial_indices: Array
    full_counts: Array
    full_indices: Array
    predicate: Mask
    block_size: int = dataclasses.field(default=BLOCK_SIZE, metadata={"static": True})
    q_length: int | None = dataclasses.field(default=None, metadata={"static": True})
    kv_length: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def from_mask(
        cls, mask: Mask, q_length: int, kv_length: int | None = None, *, block_size: int = BLOCK_SIZE
    ) -> "BlockMask":
        """Return the lists of blocks in which `mask` lets any query see any key.

        Memory grows with the number of pairs of blocks, not of tokens. For a batch of masks use `jax.vmap`.

        Args:
          mask: what a query sees, from `masks`; its numbers may be traced.
          q_length, kv_length: T queries, and S keys; None for as many.
          block_size: tokens a block. The Hopper kernels want 128.

        Raises:
          ValueError: for lengths below 1, or numbers per token that are not as many.
        """
        if not isinstance(mask, Mask):
            raise ValueError(f"mask must come of kernels/masks.py, as causal() does; got {type(mask).__name__}")
        kv_length = q_length if kv_length is None else kv_length
        if q_length < 1 or kv_length < 1 or block_size < 1:
            raise ValueError(f"lengths and block size must be at least 1, got {q_length}, {kv_length}, {block_size}")
        mask.check(q_length, kv_length)
        starts = [jnp.arange(0, length, block_size, dtype=jnp.int32) for length in (q_length, kv_length)]
        first_B1, first_1D = starts[0][:, None], starts[1][None, :]
        may, must = mask.blocks(
            Blocks(first_B1, jnp.minimum(first_B1 + block_size, q_length) - 1, block_size),
            Blocks(first_1D, jnp.minimum(first_1D + block_size, kv_length) - 1, block_size),
        )
        may, must = (jnp.broadcast_to(x, (len(starts[0]), len(starts[1]))) for x in (may, must))
        counts, indices = dense_to_ordered(jnp.stack([may & ~must, must]))
        return cls(counts[0], indices[0], counts[1], indices[1], mask, block_size, q_length, kv_length)

    @classmethod
    def from_mask_fn(
        cls,
        fn: Callable[..., Any],
        q_length: int,
        kv_length: int | None = None,
        *,
        query_data: Any = (),
        key_data: Any = (),
        scalars: Any = (),
        heads: int | None = None,
        block_size: int = BLOCK_SIZE,
    ) -> "BlockMask":
        """Return the lists of fn(head, query, key, query_data, key_data, scalars): `from_mask` of `masks.mask_fn`."""
        mask = mask_fn(fn, query_data=query_data, key_data=key_data, scalars=scalars, heads=heads)
        return cls.from_mask(mask, q_length, kv_length, block_size=block_size)

    @property
    def documents(self) -> Array:
        """The ids of the record's rule, `causal() & same_document(ids)`.

        Raises:
          ValueError: for any other rule.
        """
        ids = causal_document_ids(self.predicate)
        if ids is None:
            raise ValueError(f"the mask must be causal() & same_document(ids), not {self.predicate}")
        return jnp.asarray(ids)

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading axis of a batch of masks, () of one."""
        return np.shape(self.partial_counts)[:-1]

    def windowed(self, window_blocks: ArrayLike) -> "BlockMask":
        """Return the mask without key blocks that lie `window_blocks` or more before the query's own, which stays.

        Raises:
          ValueError: for a window that is no integer, or lists that do not fit together.
        """
        mask = self.checked()
        window = jnp.maximum(_window(window_blocks, max(mask.partial_indices.shape[-2:])), 1)
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
        """Return the mask with its leaves as arrays, integers as int32, and its lengths filled in.

        Raises:
          ValueError: unless shapes, types and batch axes are those that the class describes.
        """
        lists = {name: getattr(self, name) for name in _LISTS}
        arrays = {name: x if isinstance(x, jax.Array) else np.asarray(x) for name, x in lists.items()}
        indices, size = arrays["partial_indices"], self.block_size
        if indices.ndim not in (2, 3) or size < 1:
            raise ValueError(
                f"BlockMask: partial_indices must be (B, D) or (N, B, D) of blocks of at least 1, "
                f"got {indices.shape} of {size}"
            )
        for name, array in arrays.items():
            wanted = indices.shape if name.endswith("indices") else indices.shape[:-1]
            if array.shape != wanted or not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(
                    f"BlockMask: {name} must be integers of shape {wanted}, as partial_indices are {indices.shape}, "
                    f"got {array.dtype} {array.shape}"
                )
        *batch, rows, columns = indices.shape
        lengths = [
            blocks * size if length is None else length
            for blocks, length in ((rows, self.q_length), (columns, self.kv_length))
        ]
        if [-(-length // size) for length in lengths] != [rows, columns]:
            raise ValueError(
                f"BlockMask: lists of {rows} x {columns} blocks of {size} are not for {lengths[0]} queries "
                f"and {lengths[1]} keys"
            )
        self.predicate.check(lengths[0], lengths[1], tuple(batch))
        return BlockMask(
            **{name: jnp.asarray(x).astype(jnp.int32) for name, x in arrays.items()},
            predicate=jax.tree.map(_narrow, self.predicate),
            block_size=size,
            q_length=lengths[0],
            kv_length=lengths[1],
        )

    def dense_blocks(self) -> tuple[Array, Array]:
        """The lists as two boolean (query block, key block) matrices: (partial, full)."""
        mask = self.checked()
        return (
            _ordered_to_dense(mask.partial_counts, mask.partial_indices),
            _ordered_to_dense(mask.full_counts, mask.full_indices),
        )

    def transposed(self) -> tuple[Array, Array, Array, Array]:
        """The same visits by key block: the four lists, whose row i names *query* blocks that visit key block i."""
        partial, full = (jnp.swapaxes(blocks, -1, -2) for blocks in self.dense_blocks())
        return *dense_to_ordered(partial), *dense_to_ordered(full)

    def dense(self) -> Array:
        """The token-level boolean matrix `visible[query, key]`, (T, S), or (H, T, S) of heads. Small T only."""
        mask = self.checked()
        if mask.batch:
            return jax.vmap(BlockMask.dense)(mask)
        partial, full = (
            jnp.repeat(jnp.repeat(blocks, mask.block_size, axis=0), mask.block_size, axis=1)[
                : mask.q_length, : mask.kv_length
            ]
            for blocks in mask.dense_blocks()
        )
        query, key = jnp.arange(mask.q_length)[:, None], jnp.arange(mask.kv_length)
        heads = mask.predicate.heads
        head = 0 if heads == 1 else jnp.arange(heads)[:, None, None]
        return full | (partial & mask.predicate.pairs(query, key, head))


_LISTS = ("partial_counts", "partial_indices", "full_counts", "full_indices")


def _narrow(number: ArrayLike) -> Array:
    """Return a predicate's number as an array: integers, which are compared and subtracted, as int32."""
    array = jnp.asarray(number)
    return array.astype(jnp.int32) if jnp.issubdtype(array.dtype, jnp.integer) else array


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
    if isinstance(tokens, jax.Array):
        check_whole("long_short_masks", tokens)
    documents = jnp.cumsum(jnp.asarray(tokens == DOCUMENT_START), dtype=jnp.int32)
    unlimited = BlockMask.from_mask(causal() & same_document(documents), tokens.shape[0])
    window = _window(window_blocks, 2 * unlimited.partial_counts.shape[0])
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
    window = whole_number("a window must be an integer, of blocks", window_blocks)
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
