"""The block lists against a token-level truth that looks at every pair of tokens."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_speedrun.kernels.block_mask import (
    BLOCK_SIZE,
    DOCUMENT_START,
    BlockMask,
    dense_to_ordered,
    long_short_masks,
    visible_pairs,
)
from jax_speedrun.kernels.masks import causal, same_document
from tests.marks import slow
from tests.numpy_attention import random_mask

BATCH = 50
LENGTHS = [BLOCK_SIZE, 3 * BLOCK_SIZE, 5 * BLOCK_SIZE, 8 * BLOCK_SIZE]


@dataclasses.dataclass(frozen=True)
class Truth:
    """Token by token, and block by block."""

    visible: np.ndarray
    partial: np.ndarray
    full: np.ndarray


def brute_force(tokens_T: np.ndarray, window: int) -> Truth:
    """The recipe's rules, applied to every pair of tokens and then gathered by block."""
    position_T = np.arange(len(tokens_T))
    document_T = np.cumsum(tokens_T == DOCUMENT_START).astype(np.int16)
    same_TT = document_T[:, None] == document_T
    blocks = len(tokens_T) // BLOCK_SIZE
    same_BbBb = same_TT.reshape(blocks, BLOCK_SIZE, blocks, BLOCK_SIZE)
    shares_BB, one_document_BB = same_BbBb.any(axis=(1, 3)), same_BbBb.all(axis=(1, 3))

    distance_BB = np.arange(blocks)[:, None] - np.arange(blocks)
    # A window of no blocks still leaves a query its own block.
    visited_BB = (distance_BB >= 0) & (distance_BB < max(window, 1)) & shares_BB
    full_BB = visited_BB & (distance_BB > 0) & one_document_BB

    block_T = position_T // BLOCK_SIZE
    in_window_TT = block_T[:, None] - block_T < max(window, 1)
    visible_TT = (position_T <= position_T[:, None]) & same_TT & in_window_TT
    return Truth(visible_TT, visited_BB & ~full_BB, full_BB)


def interval_truth(tokens_T: np.ndarray, window: int) -> np.ndarray:
    """The recipe's closed form: max(start of document, 128 (q_block - max(w, 1) + 1)) <= kv <= q."""
    position_T = np.arange(len(tokens_T))
    start_T = np.maximum.accumulate(np.where(tokens_T == DOCUMENT_START, position_T, 0))
    first_T = np.maximum(start_T, BLOCK_SIZE * (position_T // BLOCK_SIZE - max(window, 1) + 1))
    return (first_T[:, None] <= position_T) & (position_T <= position_T[:, None])


def with_starts(length: int, starts: list[int]) -> np.ndarray:
    tokens_T = np.arange(length, dtype=np.int32) % 50_000
    tokens_T[starts] = DOCUMENT_START
    return tokens_T


def random_layout(rng: np.random.Generator, length: int) -> np.ndarray:
    """Documents of all sizes, with starts on and beside block borders far more often than by chance."""
    starts = rng.integers(0, length, size=rng.choice([0, 1, 2, 3, 6, 12, 100, length]))
    near_border = rng.random(len(starts)) < 0.4
    border = (starts // BLOCK_SIZE) * BLOCK_SIZE + rng.choice([-1, 0, 1], size=len(starts))
    starts = np.where(near_border, border, starts).clip(0, length - 1)
    # A start followed at once by another is a document of one token.
    doubled = starts[rng.random(len(starts)) < 0.2] + 1
    return with_starts(length, [*starts, *doubled.clip(0, length - 1)])


Everything = tuple[BlockMask, tuple[jax.Array, jax.Array], jax.Array]


@functools.cache
def masks_of_batch() -> Callable[[np.ndarray, np.ndarray], tuple[Everything, Everything]]:
    def one(tokens_T: jax.Array, window: jax.Array) -> tuple[Everything, Everything]:
        long, short = long_short_masks(tokens_T, window)
        return (long, long.dense_blocks(), long.dense()), (short, short.dense_blocks(), short.dense())

    return jax.jit(jax.vmap(one))


def is_contiguous(line: np.ndarray) -> bool:
    where = np.flatnonzero(line)
    return len(where) == 0 or where[-1] - where[0] + 1 == len(where)


def check(tokens_T: np.ndarray, window: int, everything: Everything, pairs: int) -> None:
    """All that is claimed of one mask, for one layout and one window."""
    mask, (partial_BB, full_BB), visible_TT = everything
    truth = brute_force(tokens_T, window)
    np.testing.assert_array_equal(visible_TT, truth.visible)
    np.testing.assert_array_equal(visible_TT, interval_truth(tokens_T, window))
    np.testing.assert_array_equal(partial_BB, truth.partial)
    np.testing.assert_array_equal(full_BB, truth.full)
    assert not (partial_BB & full_BB).any()
    assert pairs == truth.visible.sum()

    visited_BB = partial_BB | full_BB
    assert all(is_contiguous(line) for line in [*visited_BB, *visited_BB.T])
    for counts, indices, expected_BB in (
        (mask.partial_counts, mask.partial_indices, truth.partial),
        (mask.full_counts, mask.full_indices, truth.full),
    ):
        assert counts.dtype == indices.dtype == np.int32
        assert (counts >= 0).all()
        for count, row, expected in zip(counts, indices, expected_BB, strict=True):
            assert list(row[:count]) == list(np.flatnonzero(expected)[::-1])


def check_all(layouts: list[np.ndarray], windows: list[int]) -> None:
    """Check every (layout, window) pair, in batches of few compiled shapes."""
    batch = BATCH if len(layouts) > 1 else 1
    for first in range(0, len(layouts), batch):
        some, its_windows = layouts[first : first + batch], windows[first : first + batch]
        padding = batch - len(some)
        tokens_NT = np.stack(some + some[:1] * padding)
        window_N = np.array(its_windows + its_windows[:1] * padding, dtype=np.int32)
        results = jax.device_get(masks_of_batch()(tokens_NT, window_N))
        for n, (tokens_T, window) in enumerate(zip(some, its_windows, strict=True)):
            long, short = jax.tree.map(lambda leaf, n=n: leaf[n], results)
            long_pairs, short_pairs = visible_pairs(tokens_T, window)
            check(tokens_T, window, long, long_pairs)
            check(tokens_T, window // 2, short, short_pairs)


@pytest.mark.parametrize("length", [*LENGTHS[:2], *map(slow, LENGTHS[2:])])
def test_random_layouts_match_brute_force(length: int) -> None:
    rng = np.random.default_rng(length)
    blocks = length // BLOCK_SIZE
    number = {1: 300, 3: 1000, 5: 250, 8: 100}[blocks]
    layouts = [random_layout(rng, length) for _ in range(number)]
    windows = [int(window) for window in rng.integers(1, blocks + 3, size=number)]
    check_all(layouts, windows)


def named_layouts(length: int) -> Iterator[np.ndarray]:
    borders = range(0, length, BLOCK_SIZE)
    yield with_starts(length, [])
    yield with_starts(length, [0])
    yield with_starts(length, list(range(length)))
    yield with_starts(length, list(borders))
    yield with_starts(length, [border + BLOCK_SIZE - 1 for border in borders])
    yield with_starts(length, [border + 1 for border in borders])
    for border in borders:
        yield with_starts(length, [border])
        # One token alone: at the start, at the end and on either side of a border.
        yield with_starts(length, [border, border + 1])
        yield with_starts(length, [border + BLOCK_SIZE - 1])
        yield with_starts(length, [border + BLOCK_SIZE - 2, border + BLOCK_SIZE - 1])


def test_named_layouts_at_every_window() -> None:
    length = 5 * BLOCK_SIZE
    pairs = list(itertools.product(named_layouts(length), range(1, 8)))
    check_all([layout for layout, _ in pairs], [window for _, window in pairs])


def test_one_separator_at_every_position() -> None:
    length = 3 * BLOCK_SIZE
    layouts = [with_starts(length, [start]) for start in range(length)]
    check_all(layouts, [1 + start % 4 for start in range(length)])


@settings(max_examples=30, deadline=None)
@given(
    starts=st.lists(
        st.integers(0, 3 * BLOCK_SIZE - 1) | st.sampled_from([0, 1, 127, 128, 129, 255, 256, 257, 383]), max_size=12
    ),
    window=st.integers(1, 5),
)
def test_any_layout_matches_brute_force(starts: list[int], window: int) -> None:
    check_all([with_starts(3 * BLOCK_SIZE, starts)], [window])


@settings(max_examples=12, deadline=None)
@given(starts=st.lists(st.integers(0, 5 * BLOCK_SIZE - 1), max_size=8), windows=st.lists(st.integers(1, 7), max_size=3))
def test_a_window_only_clamps_the_counts(starts: list[int], windows: list[int]) -> None:
    tokens_T = with_starts(5 * BLOCK_SIZE, starts)
    unlimited, _ = long_short_masks(jnp.asarray(tokens_T), 5)
    partial_B, full_B = np.asarray(unlimited.partial_counts), np.asarray(unlimited.full_counts)
    narrowed = unlimited
    for window in windows:
        narrowed = narrowed.windowed(window)
    smallest = min(windows, default=5)
    np.testing.assert_array_equal(narrowed.partial_counts, np.minimum(partial_B, np.maximum(smallest - full_B, 1)))
    np.testing.assert_array_equal(narrowed.full_counts, np.minimum(full_B, smallest - 1))
    np.testing.assert_array_equal(narrowed.partial_indices, unlimited.partial_indices)
    np.testing.assert_array_equal(narrowed.full_indices, unlimited.full_indices)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint32, np.uint8, jnp.uint32])
def test_window_1_leaves_only_the_diagonal_whatever_integer_it_is(kind: Callable[[int], int]) -> None:
    tokens_T = jnp.asarray(with_starts(4 * BLOCK_SIZE, [0, 200]))
    for mask in long_short_masks(tokens_T, kind(1)):
        assert list(mask.full_counts) == [0] * 4
        assert list(mask.partial_counts) == [1] * 4
        assert mask.full_counts.dtype == mask.partial_counts.dtype == jnp.int32


def test_the_docstring_example() -> None:
    tokens_T = with_starts(6 * BLOCK_SIZE, [0, 3 * BLOCK_SIZE + 40, 5 * BLOCK_SIZE + 7])
    mask, _ = long_short_masks(jnp.asarray(tokens_T), 6)
    lists = [
        tuple(list(map(int, row[:count])) for count, row in zip(counts, indices, strict=True))
        for counts, indices in (
            (mask.partial_counts, mask.partial_indices),
            (mask.full_counts, mask.full_indices),
        )
    ]
    assert lists == [
        ([0], [1], [2], [3, 2, 1, 0], [4, 3], [5, 4, 3]),
        ([], [0], [1, 0], [], [], []),
    ]


@pytest.mark.parametrize("shape", [(3, 5), (7, 7), (2, 4, 6), (2, 1, 3, 1)])
def test_dense_to_ordered_against_numpy(shape: tuple[int, ...]) -> None:
    ordered = jax.jit(dense_to_ordered)

    @settings(max_examples=60, deadline=None)
    @given(dense=hnp.arrays(bool, shape))
    def holds(dense: np.ndarray) -> None:
        counts, indices = jax.device_get(ordered(dense))
        assert counts.shape == shape[:-1]
        assert indices.shape == shape
        assert counts.dtype == indices.dtype == np.int32
        for row in np.ndindex(*shape[:-1]):
            assert list(indices[row][: counts[row]]) == list(np.flatnonzero(dense[row])[::-1])
            # Kernels may prefetch past the count, so every entry has to be a block that exists.
            assert sorted(indices[row]) == list(range(shape[-1]))

    holds()


@settings(max_examples=40, deadline=None)
@given(kind_BB=hnp.arrays(np.int8, (2, 4, 4), elements=st.integers(0, 2)), starts=st.sets(st.integers(0, 31)))
def test_dense_of_arbitrary_lists_is_the_element_rule(kind_BB: np.ndarray, starts: set[int]) -> None:
    """Lists that no document layout would give, a batch axis and another block size."""
    size = 8
    document_T = np.cumsum(np.isin(np.arange(4 * size), list(starts)))
    mask = BlockMask(
        *dense_to_ordered(jnp.asarray(kind_BB == 1)),
        *dense_to_ordered(jnp.asarray(kind_BB == 2)),
        predicate=causal() & same_document(jnp.asarray(np.stack([document_T, 0 * document_T]))),
        block_size=size,
    )
    visible_NTT = np.asarray(jax.jit(BlockMask.dense)(mask))
    for n, query, key in np.ndindex(2, 4 * size, 4 * size):
        kind = kind_BB[n, query // size, key // size]
        one_document = n == 1 or document_T[query] == document_T[key]
        assert visible_NTT[n, query, key] == (kind == 2 or (kind == 1 and key <= query and one_document))


def test_the_window_recompiles_nothing() -> None:
    traces = 0

    @jax.jit
    def both(tokens_T: jax.Array, window: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        long, short = long_short_masks(tokens_T, window)
        return long.dense().sum() + short.dense().sum()

    tokens_T = with_starts(4 * BLOCK_SIZE, [0])
    pairs = [int(both(tokens_T, np.int32(window))) for window in range(1, 6)]
    expected = [
        brute_force(tokens_T, w).visible.sum() + brute_force(tokens_T, w // 2).visible.sum() for w in range(1, 6)
    ]
    assert pairs == expected
    assert traces == 1


@pytest.mark.slow
def test_vmap_over_a_batch_equals_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    tokens_NT = jnp.asarray(np.stack([random_layout(rng, 3 * BLOCK_SIZE) for _ in range(4)]))
    batched = jax.jit(jax.vmap(long_short_masks, in_axes=(0, None)))(tokens_NT, 3)
    one_at_a_time = jax.jit(long_short_masks)
    singles = [one_at_a_time(tokens_T, 3) for tokens_T in tokens_NT]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    jax.tree.map(np.testing.assert_array_equal, batched, stacked)
    for mask, one in zip(batched, zip(*singles, strict=True), strict=True):
        np.testing.assert_array_equal(mask.dense(), np.stack([single.dense() for single in one]))


@pytest.mark.parametrize("shape", [(0,), (1,), (127,), (129,), (2, 128), ()])
def test_bad_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 128") as error:
        long_short_masks(jnp.zeros(shape, jnp.int32), 1)
    assert str(shape) in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), window=st.integers(-1, 6))
def test_a_window_of_any_lists_drops_what_lies_before_it(seed: int, window: int) -> None:
    """In lists of any order, with gaps and later keys, and a batch axis."""
    rng, size = np.random.default_rng(seed), 8
    masks, visibles = zip(*[random_mask(rng, 4, size, rng.random()) for _ in range(2)], strict=True)
    block_T = np.arange(4 * size) // size
    wanted = np.stack(visibles) & (block_T[:, None] - block_T < max(window, 1))
    batched = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    narrowed = [mask.windowed(window) for mask in masks]
    for mask in (batched.windowed(window), jax.tree.map(lambda *leaves: jnp.stack(leaves), *narrowed)):
        np.testing.assert_array_equal(mask.dense(), wanted)
    for mask, whole in zip(narrowed, masks, strict=True):
        for before, after, count in (
            (whole.partial_indices, mask.partial_indices, mask.partial_counts),
            (whole.full_indices, mask.full_indices, mask.full_counts),
        ):
            np.testing.assert_array_equal(np.sort(before), np.sort(after))
            for row, kept in enumerate(count):  # in their order
                places = [list(before[row]).index(block) for block in after[row][:kept]]
                assert places == sorted(places)


WINDOWS = [2**40, 2**31, np.int64(2**40), np.uint32(2**32 - 1), jnp.uint32(2**32 - 1), np.uint64(2**63), np.uint8(255)]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: f"{type(window).__name__} {window}")
def test_a_window_larger_than_any_sequence_is_no_window(window: Any) -> None:
    tokens_T = with_starts(4 * BLOCK_SIZE, [0])
    unlimited, _ = long_short_masks(tokens_T, 4)
    for mask in (*long_short_masks(tokens_T, window), unlimited.windowed(window)):
        jax.tree.map(np.testing.assert_array_equal, mask, unlimited)


@pytest.mark.parametrize("window", [0, -1, np.int32(-5), np.int8(-128), jnp.int32(-(2**31))])
def test_no_window_leaves_the_diagonal(window: Any) -> None:
    tokens_T = with_starts(4 * BLOCK_SIZE, [0, 200])
    unlimited, _ = long_short_masks(tokens_T, 4)
    for mask in (*long_short_masks(tokens_T, window), unlimited.windowed(window)):
        np.testing.assert_array_equal(mask.dense_blocks()[0], np.eye(4, dtype=bool))
        assert not np.asarray(mask.full_counts).any()


@pytest.mark.parametrize("window", [1.0, np.float32(2), "3", None, np.ones(2, int), np.True_])
def test_a_window_that_is_no_integer_is_refused(window: Any) -> None:
    tokens_T = with_starts(4 * BLOCK_SIZE, [0])
    unlimited, _ = long_short_masks(tokens_T, 4)
    for call in (lambda: long_short_masks(tokens_T, window), lambda: unlimited.windowed(window)):
        with pytest.raises(ValueError, match="a window must be an integer, of blocks, got"):
            call()


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "int64"])
def test_tokens_of_any_type_that_holds_a_documents_start(dtype: str) -> None:
    tokens_T = with_starts(3 * BLOCK_SIZE, [0, 130])
    for tokens in (tokens_T.astype(dtype), jnp.asarray(tokens_T.astype(dtype))):
        jax.tree.map(np.testing.assert_array_equal, long_short_masks(tokens, 3), long_short_masks(tokens_T, 3))
    assert visible_pairs(tokens_T.astype(dtype), 3) == visible_pairs(tokens_T, 3)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "float32", "bool"])
def test_tokens_of_other_types_are_refused(dtype: str) -> None:
    tokens_T = np.zeros(BLOCK_SIZE, dtype)
    for call in (lambda: long_short_masks(tokens_T, 1), lambda: visible_pairs(tokens_T, 1)):
        with pytest.raises(ValueError, match=f"an integer type that can hold 50256, got {dtype}"):
            call()
