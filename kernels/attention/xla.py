"""Block-sparse attention in plain JAX: the block lists walked with an online softmax, on any device.

Query blocks are taken in groups. A group walks its lists in step, partial blocks
first: at step j every query block of the group meets its j-th key block, and the
walk ends after the longest list of the group. So time and memory follow the visited blocks; a
(T, T) array never exists.

            key blocks ->                       step 0   step 1   step 2
    query   [2][1][0]           block 2 meets     2        1        0
    blocks     [3]              block 3 meets     3        -        -
    (a group)  [4][3]           block 4 meets     4        3        -

A matmul multiplies masked pairs too, by a weight of 0, and 0 x NaN is NaN. So what is not finite never enters one as a
right operand: 0 takes its place, and NaN stands where the mask can hide it, in a score. Where a query sees a key or a
value that is not finite, its output in that head is NaN; where it does not, nothing of it is felt, nor in gradients.

The backward pass walks twice: by query block for dQ, and by key block (the
transposed lists) for dK and dV, so that nothing is ever added by two writers
and the result is deterministic.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..block_mask import BlockMask
from ..implementation import first_order

GROUP_BLOCKS = 64
"""Query blocks walked together: enough to fill a GPU, few enough that uneven lists waste little."""


_Softmax = tuple[Array, Array, Array]  # running maximum, total and weighted sum of the values
_Residuals = tuple[Array, Array, Array, BlockMask, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def xla_attention(q_THK: Array, k_THK: Array, v_THK: Array, mask: BlockMask, scale: float) -> Array:
    """Masked softmax attention of one sequence; see `attention.block_sparse_attention`."""
    return _forward(q_THK, k_THK, v_THK, mask, scale)[0]


class _Rows(NamedTuple):
    """One block of rows per group member; `position` and `document` are those of its tokens."""

    values: tuple[Array, ...]  # each (G, C, ...)
    position_GC: Array
    document_GC: Array


def _split(values: tuple[Array, ...], mask: BlockMask) -> _Rows:
    """Cut (T, ...) arrays in blocks of C tokens: (B, C, ...)."""
    tokens = mask.documents.shape[0]
    shape = (tokens // mask.block_size, mask.block_size)
    return _Rows(
        tuple(x.reshape(*shape, *x.shape[1:]) for x in values),
        jnp.arange(tokens, dtype=jnp.int32).reshape(shape),
        mask.documents.reshape(shape),
    )


def _walk[State](
    rows: _Rows,
    columns: _Rows,
    lists: BlockMask,
    start: Callable[[int], State],
    visit: Callable[[State, _Rows, _Rows, Array], State],
    visible: Callable[[_Rows, _Rows], Array],
) -> State:
    """Let every block of `rows` meet the blocks of `columns` that its lists name.

    Args:
      rows, columns: what is met, cut in blocks.
      lists: row i's visits, as indices into `columns`.
      start: the state for G blocks; its leaves lead with a (G,) axis.
      visit: (state, rows, columns, visible) -> state, for G blocks at once.
      visible: the element rule for G pairs of blocks, broadcastable to (G, 1, C, C).

    Returns:
      The states of all blocks, leaves leading with (B,).
    """
    blocks = lists.partial_counts.shape[0]
    group = min(GROUP_BLOCKS, blocks)
    groups = -(-blocks // group)

    def grouped(x: Array) -> Array:
        padding = [(0, groups * group - blocks)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(groups, group, *x.shape[1:])  # padded rows have empty lists

    def walk_group(args: tuple[_Rows, BlockMask]) -> State:
        row, listed = args

        def step(j: Array, state: State) -> State:
            full_G = j >= listed.partial_counts
            index_G = jnp.where(
                full_G,
                listed.full_indices[members, j - listed.partial_counts],
                listed.partial_indices[:, j],
            )
            column = jax.tree.map(lambda x: x[index_G], columns)
            visible_G1CC = visible(row, column) | full_G[:, None, None, None]
            return visit(state, row, column, visible_G1CC & (j < counts_G)[:, None, None, None])

        counts_G = listed.partial_counts + listed.full_counts
        members = jnp.arange(group)
        return lax.fori_loop(0, jnp.max(counts_G), step, start(group))

    block_lists = BlockMask(
        lists.partial_counts, lists.partial_indices, lists.full_counts, lists.full_indices, rows.document_GC
    )
    states = lax.map(walk_group, jax.tree.map(grouped, (rows, block_lists)))
    return jax.tree.map(lambda x: x.reshape(groups * group, *x.shape[2:])[:blocks], states)


def _finite(*arrays: Array) -> Array:
    """Return for which tokens and heads all of some (T, H, K) arrays are finite: (T, H, 1)."""
    return functools.reduce(jnp.logical_and, (jnp.isfinite(x).all(axis=-1, keepdims=True) for x in arrays))


def _query_sees_key(query: _Rows, key: _Rows) -> Array:
    causal_GQC = query.position_GC[:, :, None] >= key.position_GC[:, None, :]
    return (causal_GQC & (query.document_GC[:, :, None] == key.document_GC[:, None, :]))[:, None]


def _scores(q_GQHK: Array, k_GCHK: Array, scale: float) -> Array:
    return scale * _dot("gqhk,gchk->ghqc", q_GQHK, k_GCHK)


def _dot(spec: str, a: Array, b: Array) -> Array:
    accumulate = jnp.promote_types(b.dtype, jnp.float32)
    # "highest" keeps float32 operands from being rounded to tf32; bfloat16 needs no such care.
    precision = "highest" if b.dtype == accumulate else None
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=accumulate, precision=precision)


def _forward(q_THK: Array, k_THK: Array, v_THK: Array, mask: BlockMask, scale: float) -> tuple[Array, Array]:
    """Returns the output (T, H, K) and the log-sum-exp of the scores of every row (T, H)."""
    tokens, heads, width = q_THK.shape
    size = mask.block_size
    dtype = jnp.promote_types(q_THK.dtype, jnp.float32)

    finite_TH1 = _finite(k_THK, v_THK)
    k_THK, v_THK = jnp.where(finite_TH1, k_THK, jnp.nan), jnp.where(finite_TH1, v_THK, 0)

    def start(group: int) -> _Softmax:
        return (
            jnp.full((group, heads, size), -jnp.inf, dtype),
            jnp.zeros((group, heads, size), dtype),
            jnp.zeros((group, heads, size, width), dtype),
        )

    def visit(state: _Softmax, query: _Rows, key: _Rows, visible: Array) -> _Softmax:
        maximum_GHQ, total_GHQ, output_GHQK = state
        (q_GQHK,) = query.values
        k_GCHK, v_GCHK = key.values
        scores_GHQC = jnp.where(visible, _scores(q_GQHK, k_GCHK, scale), -jnp.inf)
        new_maximum_GHQ = jnp.maximum(maximum_GHQ, scores_GHQC.max(-1))
        # Rows that have seen nothing yet keep -inf; subtracting 0 instead avoids inf - inf.
        finite_GHQ = jnp.where(jnp.isfinite(new_maximum_GHQ), new_maximum_GHQ, 0)
        weights_GHQC = jnp.exp(scores_GHQC - finite_GHQ[..., None])
        rescale_GHQ = jnp.exp(maximum_GHQ - finite_GHQ)
        return (
            new_maximum_GHQ,
            total_GHQ * rescale_GHQ + weights_GHQC.sum(-1),
            output_GHQK * rescale_GHQ[..., None] + _dot("ghqc,gchk->ghqk", weights_GHQC, v_GCHK),
        )

    maximum_BHQ, total_BHQ, output_BHQK = _walk(
        _split((q_THK,), mask), _split((k_THK, v_THK), mask), mask, start, visit, _query_sees_key
    )
    # An empty row has total 0 and output 0; +inf as its log-sum-exp zeroes its weights in the backward pass.
    seen_BHQ = total_BHQ != 0  # or NaN
    output_BHQK = output_BHQK / jnp.where(seen_BHQ, total_BHQ, 1)[..., None]
    log_sum_BHQ = jnp.where(seen_BHQ, maximum_BHQ + jnp.log(jnp.where(seen_BHQ, total_BHQ, 1)), jnp.inf)
    output_THK = jnp.swapaxes(output_BHQK, 1, 2).reshape(tokens, heads, width).astype(q_THK.dtype)
    return output_THK, jnp.swapaxes(log_sum_BHQ, 1, 2).reshape(tokens, heads)


def _forward_with_residuals(
    q_THK: Array, k_THK: Array, v_THK: Array, mask: BlockMask, scale: float
) -> tuple[Array, _Residuals]:
    output_THK, log_sum_TH = _forward(q_THK, k_THK, v_THK, mask, scale)
    return output_THK, (q_THK, k_THK, v_THK, mask, output_THK, log_sum_TH)


def _backward(scale: float, residuals: _Residuals, d_output_THK: Array) -> tuple[Array, Array, Array, None]:
    residuals, d_output_THK = first_order("block_sparse_attention", (residuals, d_output_THK))
    q_THK, k_THK, v_THK, mask, output_THK, log_sum_TH = residuals
    tokens, heads, width = q_THK.shape
    size = mask.block_size
    dtype = log_sum_TH.dtype
    # Each row's sum of weight x weight gradient, which softmax's derivative subtracts.
    delta_TH = jnp.sum(output_THK.astype(dtype) * d_output_THK.astype(dtype), axis=-1)
    d_output_THK = d_output_THK.astype(q_THK.dtype)
    # A query that has seen what is not finite is such itself, by its delta. Its weights become NaN by its log-sum-exp.
    finite_TH1 = _finite(q_THK, d_output_THK, delta_TH[..., None])
    q_THK, d_output_THK = (jnp.where(finite_TH1, x, 0) for x in (q_THK, d_output_THK))
    log_sum_TH, delta_TH = (jnp.where(finite_TH1[..., 0], x, y) for x, y in ((log_sum_TH, jnp.nan), (delta_TH, 0)))
    k_THK, v_THK = (jnp.where(_finite(k_THK, v_THK), x, 0) for x in (k_THK, v_THK))
    queries = _split((q_THK, d_output_THK, log_sum_TH, delta_TH), mask)
    keys = _split((k_THK, v_THK), mask)

    def weights_and_score_grads(query: _Rows, key: _Rows, visible: Array) -> tuple[Array, Array]:
        q_GQHK, do_GQHK, log_sum_GQH, delta_GQH = query.values
        k_GCHK, v_GCHK = key.values
        log_sum_GHQ1, delta_GHQ1 = (jnp.swapaxes(x, 1, 2)[..., None] for x in (log_sum_GQH, delta_GQH))
        weights_GHQC = jnp.where(visible, jnp.exp(_scores(q_GQHK, k_GCHK, scale) - log_sum_GHQ1), 0)
        d_weights_GHQC = _dot("gqhk,gchk->ghqc", do_GQHK, v_GCHK)
        return weights_GHQC, jnp.where(visible, scale * weights_GHQC * (d_weights_GHQC - delta_GHQ1), 0)

    def visit_keys(dq_GQHK: Array, query: _Rows, key: _Rows, visible: Array) -> Array:
        _, d_scores_GHQC = weights_and_score_grads(query, key, visible)
        return dq_GQHK + _dot("ghqc,gchk->gqhk", d_scores_GHQC, key.values[0])

    def visit_queries(state: tuple[Array, Array], key: _Rows, query: _Rows, visible: Array) -> tuple[Array, Array]:
        dk_GCHK, dv_GCHK = state
        weights_GHQC, d_scores_GHQC = weights_and_score_grads(query, key, visible)
        q_GQHK, do_GQHK, *_ = query.values
        return (
            dk_GCHK + _dot("ghqc,gqhk->gchk", d_scores_GHQC, q_GQHK),
            dv_GCHK + _dot("ghqc,gqhk->gchk", weights_GHQC, do_GQHK),
        )

    def zeros(group: int) -> Array:
        return jnp.zeros((group, size, heads, width), dtype)

    dq_BCHK = _walk(queries, keys, mask, zeros, visit_keys, _query_sees_key)
    dk_BCHK, dv_BCHK = _walk(
        keys,
        queries,
        mask.transposed(),
        lambda group: (zeros(group), zeros(group)),
        visit_queries,
        lambda key, query: _query_sees_key(query, key),
    )
    dq, dk, dv = (x.reshape(tokens, heads, width).astype(q_THK.dtype) for x in (dq_BCHK, dk_BCHK, dv_BCHK))
    return dq, dk, dv, None


xla_attention.defvjp(_forward_with_residuals, _backward)
