"""Block-sparse attention in plain JAX: the key blocks that lists name are gathered, many for each of many rows at once.

Rows of the block lists differ in length, and XLA wants shapes that it knows. So the rows are sorted, longest first, and
taken in groups. A group gathers as many key blocks a row as its longest list names, rounded up to a power of two, for
which there is a program; the shorter lists of the group are filled up, and what fills them is masked:

            lists                    sorted             gathered
    query   0  [0]                   3  [3][2][0]       3  [3][2][0][ ]    a group of width 4
    blocks  1  [1][0]                1  [1][0]          1  [1][0]
            2  [2]                   0  [0]             0  [0][ ]          a group of width 2
            3  [3][2][0]             2  [2]             2  [2][ ]

What is gathered goes through one dense softmax, without a running maximum. Lists longer than `WIDEST` are cut in
pieces, one in each round, whose softmaxes are merged by their log-sum-exps. How many pairs are at work together is
bounded (`pairs_at_once`), so time and memory follow the visited blocks; a (T, S) array never exists. Heads lead, and
the queries of all heads that share keys lie side by side in one matmul.

A matmul multiplies masked pairs too, by a weight of 0, and 0 x NaN is NaN. So what is not finite never enters one as a
right operand: 0 takes its place, and NaN stands where the mask can hide it, in a score. Where a query sees a key or a
value that is not finite, its output in that head is NaN; where it does not, nothing of it is felt, nor in gradients.

The backward pass walks twice: by query block for dQ, and by key block (the
transposed lists) for dK and dV, so that nothing is ever added by two writers
and the result is deterministic.

Axes: H heads of keys, R heads of queries that share one, B blocks of queries and D of keys, of C tokens; a group has G
rows of N visits each.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap

from ..block_mask import BlockMask
from ..implementation import first_order, vary_together
from .scores import ScoreFn, apply_scores

WIDEST = 16
"""Visits of a row that are gathered together."""


class Lists(NamedTuple):
    """The visits of each row: how many, how many of them are partial, which come first, and to which blocks."""

    counts_B: Array
    partial_B: Array
    index_BD: Array


class Group(NamedTuple):
    """Rows that are walked together: their blocks, those that they visit, and which visits count, and are full."""

    rows_G: Array
    index_GN: Array
    listed_GN: Array
    full_GN: Array


class Inputs(NamedTuple):
    """What attention is computed of; q (T, R H, K), k (S, H, K), v (S, H, V), sinks (R H,) or None."""

    q: Array
    k: Array
    v: Array
    sinks: Array | None
    mask: BlockMask
    scores: tuple[ScoreFn, ...]


class Blocked(NamedTuple):
    """The numbers of heads, and arrays in blocks, heads leading."""

    heads_HR: Array
    q_HBRCK: Array
    k_HDCK: Array
    v_HDCV: Array


def pairs_at_once() -> int:
    """Return how many scores are computed together: enough to fill a GPU (a quarter of a GB), or to stay in a cache."""
    return 2**19 if jax.default_backend() == "cpu" else 2**26


def xla_attention(inputs: Inputs, scale: float) -> tuple[Array, Array]:
    """Return output (T, R H, V) and log-sum-exp (T, R H) of one sequence; see `attention.block_sparse_attention`."""
    return _attend(scale, inputs.q, inputs.k, inputs.v, inputs.sinks, (inputs.mask, inputs.scores))


type _Rules = tuple[BlockMask, tuple[ScoreFn, ...]]
type _Saved = tuple[Inputs, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q: Array, k: Array, v: Array, sinks: Array | None, rules: _Rules) -> tuple[Array, Array]:
    return _attend_forward(scale, q, k, v, sinks, rules)[0]


def _attend_forward(
    scale: float, q: Array, k: Array, v: Array, sinks: Array | None, rules: _Rules
) -> tuple[tuple[Array, Array], _Saved]:
    q, k, v, sinks = first_order("block_sparse_attention", (q, k, v, sinks))
    inputs = Inputs(q, k, v, sinks, *rules)
    # One sequence after the other under vmap, where a switch of batched widths would run all of its branches.
    output, lse = sequential_vmap(functools.partial(_forward, scale))(inputs)
    return (output, lse), (inputs, output, lse)


def _attend_backward(
    scale: float, saved: _Saved, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, Array | None, None]:
    saved, gradients = first_order("block_sparse_attention", (saved, gradients))
    return *sequential_vmap(functools.partial(_backward, scale))(*saved, *gradients), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(scale: float, inputs: Inputs) -> tuple[Array, Array]:
    q, k, v, sinks, mask, scores = inputs
    wide = jnp.promote_types(q.dtype, jnp.float32)
    finite = _finite(k, v)
    k, v = jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0)
    blocked = _block(Inputs(q, k, v, sinks, mask, scores))

    def visit(group: Group) -> tuple[Array, Array]:
        score, _ = _scored(blocked, group, mask, scores, _scores(blocked, group, scale), by_key=False)
        score = jnp.where(_visible(blocked, group, mask, by_key=False), score, -jnp.inf)
        # Of a query that sees nothing the maximum is -inf; 0 keeps its exponentials at exp(-inf) = 0.
        top = _zero_for_none(score.max(axis=(-2, -1)))
        weight = jnp.exp(score - top[..., None, None])
        total = weight.sum(axis=(-2, -1))
        seen = total != 0  # or NaN
        total = jnp.where(seen, total, 1)
        output = _dot("hgrqnc,hgncv->hgrqv", weight, _take(blocked.v_HDCV, group.index_GN)) / total[..., None]
        return output, jnp.where(seen, top + jnp.log(total), -jnp.inf)

    def merge(old: tuple[Array, Array], new: tuple[Array, Array]) -> tuple[Array, Array]:
        lse = jnp.logaddexp(old[1], new[1])
        share, new_share = (jnp.exp(part[1] - _zero_for_none(lse))[..., None] for part in (old, new))
        return share * old[0] + new_share * new[0], lse

    heads, rows, shared, size, _ = blocked.q_HBRCK.shape
    lse = jnp.full((heads, rows, shared, size), -jnp.inf, wide)
    if sinks is not None:  # a key that all see, whose value is 0
        lse = jnp.broadcast_to(_of_heads(sinks.astype(wide).reshape(heads, shared), 1, 1), lse.shape)
    output = jnp.zeros((*lse.shape, v.shape[-1]), wide)
    output, lse = _walk(_by_query(mask), shared * heads * size * size, visit, merge, (output, lse))
    return _join(output, len(q)).astype(q.dtype), _join(lse, len(q))


def _add[State: tuple[Array, ...]](old: State, new: State) -> State:
    return jax.tree.map(jnp.add, old, new)


def _zero_for_none(x: Array) -> Array:
    return jnp.where(x == -jnp.inf, 0, x)


def _backward(
    scale: float, inputs: Inputs, output: Array, lse: Array, d_output: Array, d_lse: Array
) -> tuple[Array, Array, Array, Array | None]:
    q, k, v, sinks, mask, scores = inputs
    # Each row's sum of weight x weight gradient, which softmax's derivative subtracts.
    delta = jnp.sum(output.astype(lse.dtype) * d_output.astype(lse.dtype), axis=-1) - d_lse
    d_output = d_output.astype(q.dtype)
    # A query that has seen what is not finite is such itself, by its delta. Its weights become NaN by its log-sum-exp.
    finite = _finite(q, d_output, delta[..., None])
    q, d_output = (jnp.where(finite, x, 0) for x in (q, d_output))
    lse, delta = (jnp.where(finite[..., 0], x, y) for x, y in ((lse, jnp.nan), (delta, 0)))
    k, v = (jnp.where(_finite(k, v), x, 0) for x in (k, v))
    d_sinks = None
    if sinks is not None:  # a sink is a key that all see, whose value is 0
        d_sinks = -jnp.sum(jnp.exp(sinks.astype(lse.dtype) - lse) * delta, axis=0).astype(sinks.dtype)
    # +inf as the log-sum-exp of a row that sees nothing zeroes its weights.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    blocked = _block(Inputs(q, k, v, None, mask, scores))
    heads, rows, shared, size, _ = blocked.q_HBRCK.shape
    do_HBRCV, lse_HBRC, delta_HBRC = (
        _cut(x, heads, rows, size, fill) for x, fill in ((d_output, 0), (lse, jnp.inf), (delta, 0))
    )

    def score_gradients(group: Group, raw: Array, d_weight: Array, of_query: list[Array], by_key: bool) -> list[Array]:
        """Return weights and the gradients of unscaled scores, from S, dP, and the queries' log-sum-exp and delta."""
        score, pull = _scored(blocked, group, mask, scores, raw, by_key=by_key)
        visible = _visible(blocked, group, mask, by_key=by_key)
        weight = jnp.where(visible, jnp.exp(score - of_query[0]), 0)
        d_score = pull(jnp.where(visible, weight * (d_weight - of_query[1]), 0))
        return [weight, jnp.where(visible, scale * d_score, 0)]

    def visit_keys(group: Group) -> tuple[Array]:
        keys, values = (_take(x, group.index_GN) for x in (blocked.k_HDCK, blocked.v_HDCV))
        d_weight = _dot("hgrqv,hgncv->hgrqnc", _take(do_HBRCV, group.rows_G), values)
        of_query = [_take(x, group.rows_G)[..., None, None] for x in (lse_HBRC, delta_HBRC)]
        _, d_score = score_gradients(group, _scores(blocked, group, scale), d_weight, of_query, by_key=False)
        return (_dot("hgrqnc,hgnck->hgrqk", d_score, keys),)

    def visit_queries(group: Group) -> tuple[Array, Array]:
        queries, d_outputs = (_take(x, group.index_GN) for x in (blocked.q_HBRCK, do_HBRCV))
        keys, values = (_take(x, group.rows_G) for x in (blocked.k_HDCK, blocked.v_HDCV))
        raw = scale * _dot("hgck,hgnrqk->hgcnrq", keys, queries)
        d_weight = _dot("hgcv,hgnrqv->hgcnrq", values, d_outputs)
        of_query = [_take(x, group.index_GN)[:, :, None] for x in (lse_HBRC, delta_HBRC)]
        weight, d_score = score_gradients(group, raw, d_weight, of_query, by_key=True)
        return _dot("hgcnrq,hgnrqk->hgck", d_score, queries), _dot("hgcnrq,hgnrqv->hgcv", weight, d_outputs)

    pairs = heads * shared * size * size
    d_q, d_k, d_v = (jnp.zeros(x.shape, lse.dtype) for x in (blocked.q_HBRCK, blocked.k_HDCK, blocked.v_HDCV))
    (d_q,) = _walk(_by_query(mask), pairs, visit_keys, _add, (d_q,))
    d_k, d_v = _walk(_by_key(mask), pairs, visit_queries, _add, (d_k, d_v))
    d_k, d_v = (_join(x[:, :, None], len(k)).astype(k.dtype) for x in (d_k, d_v))
    return _join(d_q, len(q)).astype(q.dtype), d_k, d_v, d_sinks


def _walk[State: tuple[Array, ...]](
    lists: Lists,
    pairs: int,
    visit: Callable[[Group], State],
    merge: Callable[[State, State], State],
    state: State,
) -> State:
    """Let every row meet the blocks that its list names.

    Args:
      lists: what each row visits.
      pairs: of one visit, in all heads: what memory is counted in.
      visit: computes the results of a group's rows, each (H, G, ...).
      merge: of results of two parts of the rows' lists.
      state: results of rows that visit nothing, each (H, B, ...).
    """
    blocks, columns = lists.index_BD.shape
    room = max(pairs_at_once() // pairs, 1)
    widest = min(columns, room, WIDEST)
    widths = [*(2**i for i in range(1, widest.bit_length()) if 2**i < widest), widest]
    most = min(blocks, max(room // widths[0], 1))
    order_B = jnp.argsort(-lists.counts_B)
    # Groups may reach beyond the last row, and slices beyond the last column.
    counts, partial, rows = (
        jnp.pad(x[order_B], (0, most)) for x in (lists.counts_B, lists.partial_B, jnp.arange(blocks))
    )
    index = jnp.pad(lists.index_BD[order_B], [(0, most), (0, widest)])
    state = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, most)] + [(0, 0)] * (x.ndim - 2)), state)

    def run(width: int, first: Array, start: Array, state: State) -> State:
        size = min(blocks, max(room // width, 1))
        count, partial_count, own = (lax.dynamic_slice_in_dim(x, start, size) for x in (counts, partial, rows))
        place = first + jnp.arange(width)
        listed = place < count[:, None]
        # What fills up a list is an entry of its own: something near, and in range.
        named = lax.dynamic_slice(index, (start, first), (size, width))
        named = jnp.where(listed, named, jnp.where(listed[:, :1], named[:, :1], 0))
        results = visit(Group(own, named, listed, place >= partial_count[:, None]))
        old = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1), state)
        return jax.tree.map(
            lambda x, new: lax.dynamic_update_slice_in_dim(x, new, start, axis=1), state, merge(old, results)
        )

    def step(carry: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        first, start, state = carry
        which = jnp.searchsorted(jnp.asarray(widths), jnp.minimum(counts[start] - first, widest))
        state = lax.switch(which, [functools.partial(run, width) for width in widths], first, start, state)
        start += jnp.asarray([min(blocks, max(room // width, 1)) for width in widths], jnp.int32)[which]
        more = (start < blocks) & (counts[jnp.minimum(start, blocks - 1)] > first)
        return jnp.where(more, first, first + widest), jnp.where(more, start, 0), state

    carry, _ = vary_together((jnp.int32(0), jnp.int32(0), state), lists)
    *_, state = lax.while_loop(lambda carry: counts[0] > carry[0], step, carry)
    back = jnp.argsort(order_B)
    return jax.tree.map(lambda x: jnp.take(x, back, axis=1), state)


def _by_query(mask: BlockMask) -> Lists:
    return _merged(mask.partial_counts, mask.partial_indices, mask.full_counts, mask.full_indices)


def _by_key(mask: BlockMask) -> Lists:
    return _merged(*mask.transposed())


def _merged(partial_B: Array, partial_BD: Array, full_B: Array, full_BD: Array) -> Lists:
    place = jnp.arange(partial_BD.shape[1]) - partial_B[:, None]
    full_BD = jnp.take_along_axis(full_BD, jnp.maximum(place, 0), axis=1)
    return Lists(partial_B + full_B, partial_B, jnp.where(place < 0, partial_BD, full_BD))


def _block(inputs: Inputs) -> Blocked:
    heads = inputs.k.shape[1]
    size, (rows, columns) = inputs.mask.block_size, inputs.mask.partial_indices.shape[-2:]
    return Blocked(
        jnp.arange(inputs.q.shape[1]).reshape(heads, -1),
        _cut(inputs.q, heads, rows, size),
        _cut(inputs.k, heads, columns, size)[:, :, 0],
        _cut(inputs.v, heads, columns, size)[:, :, 0],
    )


def _cut(x: Array, heads: int, blocks: int, size: int, fill: float = 0) -> Array:
    """(T, R H, ...) -> (H, B, R, C, ...), padded with what no visible pair feels."""
    missing = blocks * size - x.shape[0]
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=fill) if missing else x
    return jnp.moveaxis(x.reshape(blocks, size, heads, -1, *x.shape[2:]), (2, 0, 3, 1), (0, 1, 2, 3))


def _join(x_HBRC: Array, tokens: int) -> Array:
    """(H, B, R, C, ...) -> (T, R H, ...)"""
    heads, blocks, shared, size, *rest = x_HBRC.shape
    x_BCHR = jnp.moveaxis(x_HBRC, (0, 1, 2, 3), (2, 0, 3, 1))
    return x_BCHR.reshape(blocks * size, heads * shared, *rest)[:tokens]


def _take(x: Array, blocks: Array) -> Array:
    return jnp.take(x, blocks, axis=1, mode="clip")


def _scores(part: Blocked, group: Group, scale: float) -> Array:
    q_HGRCK, k_HGNCK = _take(part.q_HBRCK, group.rows_G), _take(part.k_HDCK, group.index_GN)
    return scale * _dot("hgrqk,hgnck->hgrqnc", q_HGRCK, k_HGNCK)


def _dot(spec: str, a: Array, b: Array) -> Array:
    accumulate = jnp.promote_types(b.dtype, jnp.float32)
    # "highest" keeps float32 operands from being rounded to tf32; bfloat16 needs no such care.
    precision = "highest" if b.dtype == accumulate else None
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=accumulate, precision=precision)


def _of_heads(x_HR: Array, before: int, after: int) -> Array:
    """Give (H, R) axes of 1: `before` R that many, and `after` it."""
    heads, shared = x_HR.shape
    return x_HR.reshape(heads, *[1] * before, shared, *[1] * after)


def _places(part: Blocked, group: Group, size: int, by_key: bool) -> tuple[Array, Array, Array]:
    """Return the positions of queries and keys, and heads, as they broadcast to a group's scores.

    Those are (H, G, R, C, N, C), queries before keys; if rows are keys, (H, G, C, N, R, C), keys before queries.
    """
    row_GC = group.rows_G[:, None] * size + jnp.arange(size)
    column_GNC = group.index_GN[..., None] * size + jnp.arange(size)
    if by_key:
        query, key = column_GNC[None, :, None, :, None], row_GC[None, :, :, None, None, None]
        return query, key, _of_heads(part.heads_HR, 3, 1)
    query, key = row_GC[None, :, None, :, None, None], column_GNC[None, :, None, None]
    return query, key, _of_heads(part.heads_HR, 1, 3)


def _visible(part: Blocked, group: Group, mask: BlockMask, *, by_key: bool) -> Array:
    query, key, head = _places(part, group, mask.block_size, by_key)
    axes = (0, 2, 4, 5) if by_key else (0, 2, 3, 5)
    full, listed = (jnp.expand_dims(x, axes) for x in (group.full_GN, group.listed_GN))
    visible = (mask.predicate.pairs(query, key, head if mask.predicate.heads > 1 else 0) | full) & listed
    assert mask.kv_length is not None
    if mask.kv_length % mask.block_size:
        visible &= key < mask.kv_length
    return visible


def _scored(
    part: Blocked, group: Group, mask: BlockMask, scores: tuple[ScoreFn, ...], raw: Array, *, by_key: bool
) -> tuple[Array, Callable[[Array], Array]]:
    """Return scores after the score functions, and what pulls a gradient back through these."""
    if not scores:
        return raw, lambda gradient: gradient
    query, key, head = _places(part, group, mask.block_size, by_key)
    score, pull = jax.vjp(lambda raw: apply_scores(scores, raw, head, query, key), raw)
    return score, lambda gradient: pull(gradient)[0]


def _finite(*arrays: Array) -> Array:
    """Return for which tokens and heads all of some (T, H, K) arrays are finite: (T, H, 1)."""
    return functools.reduce(jnp.logical_and, (jnp.isfinite(x).all(axis=-1, keepdims=True) for x in arrays))
