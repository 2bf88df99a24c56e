"""Dense masked attention with its gradients in float64 NumPy, and random block masks: truth for every kernel."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jax_speedrun.kernels.block_mask import BlockMask
from jax_speedrun.kernels.masks import causal, same_document

Float = NDArray[np.float64]


class Result(NamedTuple):
    output: Float
    dq: Float
    dk: Float
    dv: Float


class Whole(NamedTuple):
    """Output, log-sum-exp, and the gradients of query, key, value and sinks."""

    output: Float
    lse: Float
    dq: Float
    dk: Float
    dv: Float
    d_sinks: Float


def whole_attention(
    q: Float, k: Float, v: Float, d_output: Float, visible: NDArray[np.bool_], scale: float, *,
    soft_cap: float | None = None, bias: Float | None = None, sinks: Float | None = None, d_lse: Float | None = None,
) -> Whole:  # fmt: skip
    """As `dense_attention` with all that attention can do besides; `visible` may be (H, T, S), heads of keys fewer."""
    q, k, v, d_output = (np.asarray(x, np.float64) for x in (q, k, v, d_output))
    heads, shared = q.shape[1], q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, shared, axis=1) for x in (k, v))
    raw = scale * np.einsum("thk,shk->hts", q, k)
    slope, scores = np.ones_like(raw), raw
    if soft_cap is not None:
        scores = soft_cap * np.tanh(raw / soft_cap)
        slope = 1 - np.tanh(raw / soft_cap) ** 2
    scores = np.where(visible, scores + (0 if bias is None else bias), -np.inf)
    sink = np.full(heads, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    with_sink = np.concatenate([scores, np.broadcast_to(sink[:, None, None], (*scores.shape[:2], 1))], axis=-1)
    top = with_sink.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(with_sink - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0].T
    weights /= np.where(total == 0, 1, total)
    weights, sink_weight = weights[..., :-1], weights[..., -1]
    output = np.einsum("hts,shv->thv", weights, v)
    d_weights = np.einsum("thv,shv->hts", d_output, v)
    delta = (weights * d_weights).sum(-1) - (0 if d_lse is None else np.asarray(d_lse, np.float64).T)
    d_scores = scale * weights * (d_weights - delta[..., None]) * slope

    def of_keys(x: Float) -> Float:  # the heads that share keys add up
        return x.reshape(x.shape[0], -1, shared, x.shape[2]).sum(2)

    return Whole(
        output,
        lse,
        np.einsum("hts,shk->thk", d_scores, k),
        of_keys(np.einsum("hts,thk->shk", d_scores, q)),
        of_keys(np.einsum("hts,thv->shv", weights, d_output)),
        -(sink_weight * delta).sum(-1),
    )


def dense_attention(q: Float, k: Float, v: Float, d_output: Float, visible: NDArray[np.bool_], scale: float) -> Result:
    """Output and gradients for (T, H, K) inputs; rows that see nothing give 0."""
    q, k, v, d_output = (np.asarray(x, np.float64) for x in (q, k, v, d_output))
    scores = np.where(visible, scale * np.einsum("thk,shk->hts", q, k), -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    output = np.einsum("hts,shk->thk", weights, v)
    d_weights = np.einsum("thk,shk->hts", d_output, v)
    d_scores = scale * weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    return Result(
        output,
        np.einsum("hts,shk->thk", d_scores, k),
        np.einsum("hts,thk->shk", d_scores, q),
        np.einsum("hts,thk->shk", weights, d_output),
    )


def random_mask(
    rng: np.random.Generator, blocks: int, block_size: int, density: float
) -> tuple[BlockMask, NDArray[np.bool_]]:
    """Lists with no structure at all (any key block, any order, some rows empty), and their token-level truth."""
    kind = np.where(rng.random((blocks, blocks)) < density, rng.integers(1, 3, (blocks, blocks)), 0)
    lists, blockwise = [], []
    for wanted in (1, 2):
        counts = (kind == wanted).sum(1)
        indices = np.zeros((blocks, blocks), np.int32)
        for row in range(blocks):
            members = rng.permutation(np.flatnonzero(kind[row] == wanted))
            rest = rng.integers(0, blocks, blocks - len(members))  # must be ignored
            indices[row] = np.concatenate([members, rest])
        lists += [jnp.asarray(counts, jnp.int32), jnp.asarray(indices, jnp.int32)]
        blockwise.append(np.kron(kind == wanted, np.ones((block_size, block_size), bool)))
    documents = np.cumsum(rng.random(blocks * block_size) < 0.1)
    partial, full = blockwise
    position = np.arange(blocks * block_size)
    element_rule = (position[:, None] >= position) & (documents[:, None] == documents)
    rule = causal() & same_document(jnp.asarray(documents, jnp.int32))
    mask = BlockMask(lists[0], lists[1], lists[2], lists[3], rule, block_size)
    return mask, full | (partial & element_rule)


def spread(bad: dict[str, NDArray[np.bool_]], visible: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], ...]:
    """Where what is not finite must show, and nowhere else, by token and head: in the output, in dq, in dk and dv.

    Args:
      bad: which tokens and heads of "q", "k", "v" and "do" are not finite, (T, H) each.
    """
    sees_a_bad_key = np.einsum("ts,sh->th", visible.astype(int), (bad["k"] | bad["v"]).astype(int)) > 0
    sees_any = visible.any(1)[:, None]
    output = (bad["q"] & sees_any) | sees_a_bad_key
    queries = output | (bad["do"] & sees_any)
    keys = np.einsum("ts,th->sh", visible.astype(int), queries.astype(int)) > 0
    return output, queries, keys, keys
