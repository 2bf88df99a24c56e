"""Predicates against a token-level truth in NumPy: their pairs, and what they say of blocks, in any composition."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from jax_speedrun.kernels.block_mask import BlockMask
from jax_speedrun.kernels.masks import (
    FAR,
    Mask,
    causal,
    chunks,
    dilated,
    everything,
    global_tokens,
    key_is,
    mask_fn,
    mask_mod,
    prefix,
    query_is,
    same_document,
    window,
)

COMPOSITIONS = int(os.environ.get("KERNEL_CASES", "12"))  # each compiles programs of its own

HEADS = 3
Bool = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask of `queries` x `keys` tokens, its truth for each head, and how it was made."""

    mask: Mask
    truth_HTS: Bool
    name: str


def base_cases(rng: np.random.Generator, queries: int, keys: int) -> dict[str, Callable[[], tuple[Mask, Bool]]]:
    """Each kind of mask with numbers of its own, and its truth, (T, S) or (H, T, S)."""
    q, k = np.arange(queries)[:, None], np.arange(keys)[None, :]
    back = q - k
    left, right, length = (int(x) for x in rng.integers(-3, max(queries, keys), 3))
    step, size = (int(x) for x in rng.integers(1, 12, 2))
    ids_T, ids_S = (np.cumsum(rng.random(n) < 0.15) for n in (queries, keys))
    if rng.random() < 0.5:  # nobody promises that ids only grow
        ids_T, ids_S = rng.permutation(ids_T), rng.permutation(ids_S)
    flags_T, flags_S = rng.random(queries) < 0.1, rng.random(keys) < 0.8
    slopes_H, weights_S = rng.integers(0, 9, HEADS), rng.integers(0, 9, keys)
    h = np.arange(HEADS)[:, None, None]

    def by_head(head, query, key, query_data, key_data, scalars):
        return (query - key <= scalars[head]) & (key_data > 2)

    def flex(batch, head, query, key):
        return (query + batch >= key) | (jnp.asarray(ids_T)[query] == 1)

    symmetric = int(rng.integers(0, 12))
    return {
        "everything": lambda: (everything(), np.ones((queries, keys), bool)),
        "causal": lambda: (causal(), back >= 0),
        "window": lambda: (window(left=left, right=right), (back <= left) & (-back <= right)),
        "left": lambda: (window(left=left), back <= left),
        "right": lambda: (window(right=np.int32(right)), -back <= right),
        "symmetric": lambda: (window(left=symmetric, right=symmetric), abs(back) <= symmetric),
        "dilated": lambda: (dilated(step), back % step == 0),
        "prefix": lambda: (prefix(jnp.int32(length)), np.broadcast_to(k < length, back.shape)),
        "chunks": lambda: (chunks(size), q // size == k // size),
        "documents": lambda: (same_document(ids_T, ids_S), ids_T[:, None] == ids_S),
        "query flags": lambda: (query_is(flags_T), np.broadcast_to(flags_T[:, None], back.shape)),
        "key flags": lambda: (key_is(flags_S), np.broadcast_to(flags_S, back.shape)),
        "function of heads": lambda: (
            mask_fn(by_head, key_data=weights_S, scalars=jnp.asarray(slopes_H), heads=HEADS),
            (back <= slopes_H[h]) & (weights_S > 2),
        ),
        "flex": lambda: (mask_mod(flex, batch=2), (q + 2 >= k) | (ids_T[:, None] == 1)),
    }


def grow(rng: np.random.Generator, queries: int, keys: int, depth: int) -> Case:
    if depth == 0 or rng.random() < 0.15:
        cases = base_cases(rng, queries, keys)
        name = list(cases)[rng.integers(len(cases))]
        mask, truth = cases[name]()
        return Case(mask, np.broadcast_to(truth, (HEADS, queries, keys)), name)
    a = grow(rng, queries, keys, depth - 1)
    kind = rng.integers(3)
    if kind == 2:
        return Case(~a.mask, ~a.truth_HTS, f"~({a.name})")
    b = grow(rng, queries, keys, depth - 1)
    if kind == 0:
        return Case(a.mask & b.mask, a.truth_HTS & b.truth_HTS, f"({a.name} & {b.name})")
    return Case(a.mask | b.mask, a.truth_HTS | b.truth_HTS, f"({a.name} | {b.name})")


def by_block(truth_HTS: Bool, size: int, reduce: Callable[..., Bool]) -> Bool:
    """Any or all of each pair of blocks, the last ones maybe short."""
    rows, columns = (-(-n // size) for n in truth_HTS.shape[1:])
    cut = [[slice(i * size, (i + 1) * size) for i in range(n)] for n in (rows, columns)]
    return np.array([[reduce(truth_HTS[:, rows, columns]) for columns in cut[1]] for rows in cut[0]])


def check(case: Case, size: int) -> tuple[Bool, Bool, Bool]:
    """No block with a visible pair is missed, no full block hides one, and `dense` is the truth."""
    _, queries, keys = case.truth_HTS.shape
    block_mask = BlockMask.from_mask(case.mask, queries, keys, block_size=size)
    partial, full = map(np.asarray, block_mask.dense_blocks())
    any_seen, all_seen = (by_block(case.truth_HTS, size, reduce) for reduce in (np.any, np.all))
    assert not (any_seen & ~(partial | full)).any(), f"misses a block: {case.name}"
    assert not (full & ~all_seen).any(), f"a full block hides something: {case.name}"
    assert not (partial & full).any()
    dense = np.asarray(block_mask.dense())
    np.testing.assert_array_equal(np.broadcast_to(dense, case.truth_HTS.shape), case.truth_HTS, err_msg=case.name)
    return partial, full, any_seen


@settings(max_examples=COMPOSITIONS, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), depth=st.integers(0, 3), shape=st.sampled_from([(22, 17, 5), (16, 16, 4)]))
def test_blocks_of_any_composition_are_never_missed_nor_called_full_wrongly(
    seed: int, depth: int, shape: tuple[int, int, int]
) -> None:
    queries, keys, size = shape  # few shapes: each compiles anew
    check(grow(np.random.default_rng(seed), queries, keys, depth), size)


EXACT = [
    "everything", "causal", "window", "left", "right", "symmetric", "prefix", "query flags", "key flags",
    "function of heads", "flex",
]  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_lists_of_one_rule_are_the_shortest(name: str) -> None:
    """A careful answer is allowed, and wasteful: these rules need none."""
    visited = np.int64(0)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        mask, truth = base_cases(rng, 22, 17)[name]()
        case = Case(mask, np.broadcast_to(truth, (HEADS, 22, 17)), name)
        partial, full, any_seen = check(case, 5)
        if not (name == "window" and not truth.any()):  # an empty window may look like one that is not
            np.testing.assert_array_equal(partial | full, any_seen)
        np.testing.assert_array_equal(full, by_block(case.truth_HTS, 5, np.all))
        visited += any_seen.sum()
    assert visited


def test_sorted_documents_and_chunks_have_the_shortest_lists() -> None:
    ids = np.repeat(np.arange(5), [3, 9, 1, 20, 7])
    for mask, truth in (
        (same_document(ids), ids[:, None] == ids),
        (chunks(6), np.arange(40)[:, None] // 6 == np.arange(40) // 6),
    ):
        partial, full, any_seen = check(Case(mask, truth[None], ""), 4)
        np.testing.assert_array_equal(partial | full, any_seen)
        np.testing.assert_array_equal(full, by_block(truth[None], 4, np.all))


def test_numbers_change_without_recompiling() -> None:
    traces = 0

    @jax.jit
    def visible(mask: Mask) -> jax.Array:
        nonlocal traces
        traces += 1
        return BlockMask.from_mask(mask, 40, block_size=8).dense().sum()

    q, k = np.arange(40)[:, None], np.arange(40)
    for left, length in ((3, 2), (11, 0), (2**40, 5)):
        seen = visible(causal() & (window(left=left) | prefix(length)))
        assert seen == ((q >= k) & ((q - k <= left) | (k < length))).sum()
    assert traces == 1


def test_numbers_may_be_traced_where_the_mask_is_made() -> None:
    @jax.jit
    def visible(left: jax.Array, ids: jax.Array) -> jax.Array:
        return BlockMask.from_mask(window(left=left) & same_document(ids), 40, block_size=8).dense()

    ids = np.arange(40) // 9
    q, k = np.arange(40)[:, None], np.arange(40)
    wanted = (q - k <= 5) & (ids[:, None] == ids)
    for left in (jnp.uint8(5), jnp.int32(5)):
        np.testing.assert_array_equal(visible(left, ids), wanted)


def test_vmap_makes_a_batch() -> None:
    ids_NT = np.arange(2)[:, None] * 3 + np.arange(30) // np.array([[7], [11]])
    batched = jax.vmap(
        lambda ids: BlockMask.from_mask(causal() & window(left=12) & same_document(ids), 30, block_size=8)
    )(jnp.asarray(ids_NT))
    assert batched.batch == (2,)
    q, k = np.arange(30)[:, None], np.arange(30)
    near = (q >= k) & (q - k <= 12)
    np.testing.assert_array_equal(batched.dense(), near & (ids_NT[:, :, None] == ids_NT[:, None, :]))


def test_flex_functions_get_their_batch() -> None:
    ids_NT = jnp.asarray([[0] * 10 + [1] * 20, [0] * 23 + [1] * 7])

    def same(batch, head, query, key):
        return ids_NT[batch, query] == ids_NT[batch, key]

    batched = jax.vmap(lambda n: BlockMask.from_mask(mask_mod(same, batch=n), 30, block_size=8))(jnp.arange(2))
    np.testing.assert_array_equal(batched.dense(), ids_NT[:, :, None] == ids_NT[:, None, :])
    with pytest.raises(ValueError, match=r"^mask_mod: the function looks at its batch; .*: batch=n$"):
        mask_mod(same)


@pytest.mark.parametrize("raw", [False, True])
def test_memory_stays_below_that_of_all_pairs(raw: bool) -> None:
    """Of 16,384 tokens: a boolean for each pair is 268 MB, one for each pair of blocks 16 KB."""
    tokens = 16_384

    def lists(ids: jax.Array) -> BlockMask:
        mask = causal() & window(left=1000) & same_document(ids)
        if raw:
            mask = mask_fn(lambda h, q, k, qd, kd, s: (q >= k) & (qd == kd), query_data=ids, key_data=ids)
        return BlockMask.from_mask(mask, tokens)

    compiled = jax.jit(lists).lower(jax.ShapeDtypeStruct((tokens,), jnp.int32)).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < (8e6 if raw else 1e6)


def stepped(head, query, key, query_data, key_data, scalars):
    return query >= key + head


MISTAKES = {
    "no boolean": (lambda: mask_fn(lambda h, q, k, qd, kd, s: q - k), "mask_fn: the function must return one boolean"),
    "Python": (
        lambda: mask_fn(lambda h, q, k, qd, kd, s: q > k and k > 3),
        r"decides something in Python .* jnp\.where",
    ),
    "head": (lambda: mask_fn(stepped), "mask_fn: the function looks at its head; say how many there are: heads=H"),
    "float window": (lambda: window(left=1.5), "window takes an integer, of tokens, got float64"),
    "two windows": (lambda: window(left=np.ones(2, int)), r"window takes an integer, of tokens, got int64 \(2,\)"),
    "step": (lambda: dilated(0), "dilated: must be at least 1, got 0"),
    "float ids": (lambda: same_document(np.zeros(3)), "same_document: ids must be integers"),
    "int flags": (lambda: key_is(np.zeros(3, int)), "key_is: flags must be booleans"),
    "ids": (lambda: BlockMask.from_mask(same_document(np.zeros(5, int)), 6), r"ids must have shape \(6,\)"),
    "one sequence": (lambda: BlockMask.from_mask(same_document(np.zeros(6, int)), 6, 7), "give kv_ids too"),
    "data": (
        lambda: BlockMask.from_mask_fn(lambda h, q, k, qd, kd, s: q >= kd, 6, key_data=np.zeros(5, int)),
        r"key_data must have shape \(6,\) for 6 queries and 6 keys, got \(5,\)",
    ),
    "heads": (
        lambda: BlockMask.from_mask(mask_fn(stepped, heads=2) & mask_fn(stepped, heads=3), 6),
        "combines masks of different numbers of heads",
    ),
    "nothing": (lambda: BlockMask.from_mask(causal(), 0), "lengths and block size must be at least 1, got 0, 0, 128"),
    "a function": (
        lambda: BlockMask.from_mask(stepped, 6),  # type: ignore[arg-type]
        r"must come of kernels/masks\.py, .* got function",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_function_that_closes_over_what_is_traced_is_refused() -> None:
    @jax.jit
    def make(ids: jax.Array) -> jax.Array:
        return BlockMask.from_mask(mask_mod(lambda b, h, q, k: ids[q] == ids[k]), 6).dense()

    with pytest.raises(ValueError, match="closes over an array that is traced; hand it over in query_data"):
        make(jnp.arange(6))


def test_python_operators_are_refused() -> None:
    with pytest.raises(TypeError, match="masks combine with &"):
        _ = causal() and prefix(3)


def test_one_function_is_one_type() -> None:
    """Twice adapted, it compiles once."""

    def rule(batch, head, query, key):
        return query >= key

    types: list[Any] = [jax.tree.structure(mask_mod(rule)) for _ in range(2)]
    assert types[0] == types[1]


@pytest.mark.parametrize("bound", [FAR, 2**31, 2**63, -(2**40)])
def test_bounds_of_any_size(bound: int) -> None:
    seen = BlockMask.from_mask(window(left=bound), 9, block_size=4).dense()
    np.testing.assert_array_equal(seen, np.full((9, 9), bound > 0))


def test_global_tokens_are_both_rows_and_columns() -> None:
    flags = np.zeros(20, bool)
    flags[[0, 13]] = True
    near = abs(np.arange(20)[:, None] - np.arange(20)) <= 2
    mask = window(left=2, right=2) | global_tokens(flags)
    check(Case(mask, (near | flags | flags[:, None])[None], ""), 4)


def test_a_mask_says_what_it_is() -> None:
    mask = causal() & (window(left=3) | ~prefix(jnp.int32(2))) & same_document(np.zeros(4, int))
    assert str(mask) == "causal() & (window(left=3, right=None) | ~(prefix(...))) & same_document(ids)"
