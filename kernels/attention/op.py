"""Block-sparse attention: one call, several implementations that agree.

`reference` is dense and exact, for small T and for tests. `xla` gathers what the
block lists name, in plain JAX, on any device. `hopper` is the Pallas kernel for H100/H200.
"""

import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from ..block_mask import BlockMask
from ..implementation import Implementation, choose, constant, known_number, vary_together
from ..masks import causal_document_ids
from .reference import reference_attention
from .scores import ScoreFn, SoftCap
from .xla import Inputs, xla_attention

OP = "block_sparse_attention"


def block_sparse_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    mask: BlockMask,
    *,
    scale: ArrayLike | None = None,
    soft_cap: float | None = None,
    score_fn: ScoreFn | None = None,
    sinks: ArrayLike | None = None,
    return_residual: bool = False,
    implementation: Implementation = "auto",
) -> Any:
    """Return softmax(scale * q k^T, where `mask` lets the query see the key) v, per head.

    Axes and names are those of `jax.nn.dot_product_attention`. What each implementation has:

                    other T and S, any T   grouped   any K   soft cap, score    lse    masks
        reference   yes                    yes       yes     yes                yes    all
        xla         yes                    yes       yes     yes                yes    all
        hopper      no, T in blocks        yes       64,128  soft cap           yes    causal() & same_document(ids)

    Args:
      query: (T, H, K), or (N, T, H, K) for a batch of sequences.
      key, value: (S, G, K) and (S, G, V), with the same leading axis; G divides H, and head h reads head h // (H / G).
      mask: the blocks to visit, of T queries and S keys; its leaves carry the same leading axis as the query, or
        none, in which case all sequences share it.
      scale: factor on the scores, 1 / sqrt(K) by default. A number is compiled in; an array, also a traced one,
        multiplies the query before it is rounded to its dtype.
      soft_cap: scaled scores s become soft_cap tanh(s / soft_cap), as in Gemma 2.
      score_fn: what becomes of scaled and capped scores before the mask; see `scores`.
      sinks: (H,) learned scores of a key that all see and whose value is 0, as in GPT-OSS.
      return_residual: whether to return the log-sum-exp of each query's scores, too.
      implementation: `auto` picks `hopper` where it runs and supports the arguments, else `xla`.

    Returns:
      (T, H, V) with the query's leading axis and dtype, and with `return_residual` also (T, H) in float32 (or
      float64). A query that sees no key gives 0, and -inf. Differentiable in query, key, value and sinks, once, in
      reverse mode; with `reference` in any way, and in the score function's numbers.

    Raises:
      ValueError: for shapes, dtypes or block sizes that are not supported, or an
        implementation that does not run here.
    """
    q, k, v = map(jnp.asarray, (query, key, value))
    sinks = None if sinks is None else jnp.asarray(sinks)
    mask = mask.checked()
    _check(q, k, v, mask, sinks)
    if isinstance(scale, jax.Array | np.ndarray):
        if scale.ndim != 0:
            raise ValueError(f"scale must be one number, got an array of shape {scale.shape}")
        q, scale = (q * jnp.asarray(scale)).astype(q.dtype), 1.0
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else known_number(OP, "scale", scale)
    scores = _score_functions(soft_cap, score_fn, q.shape[-2])
    inputs = Inputs(q, k, v, sinks, mask, scores)
    name = choose(
        OP,
        implementation,
        lambda: _unsupported_call(inputs, scale),
        arrays=(q, k, v),
        names=get_args(Implementation),
    )
    if name != "reference":
        inputs = inputs._replace(scores=constant(OP, "the score function", scores))

    def attend(inputs: Inputs) -> tuple[Array, ...]:
        output, *residual = _IMPLEMENTATIONS[name](inputs, scale, return_residual)
        return output.astype(inputs.q.dtype), *(residual if return_residual else ())

    results = _on_explicit_meshes(lambda inputs: _over_batch(attend, *vary_together(inputs)), inputs, return_residual)
    return results if return_residual else results[0]


def unsupported(dtype: DTypeLike, head_width: int, block_size: int, scale: float) -> str | None:
    """Return what the Hopper kernels need of their arguments, None where they have it."""
    # Imported when used, here as below: Pallas' GPU backend is not part of every jaxlib.
    from . import hopper

    return hopper.unsupported(dtype, head_width, block_size, scale)


def unsupported_mask(mask: BlockMask) -> str | None:
    """Return what the Hopper kernels need of a mask, None for one that has it."""
    if causal_document_ids(mask.predicate) is None:
        return f"the mask causal() & same_document(ids), got {mask.predicate}"
    assert mask.q_length is not None
    if mask.q_length % mask.block_size:
        return f"T a multiple of {mask.block_size}, got {mask.q_length}"
    return None


def _unsupported_call(inputs: Inputs, scale: float) -> str | None:
    q, _, v, _, mask, scores = inputs
    if len(scores) > 1 or any(not isinstance(one, SoftCap) for one in scores):
        return "no score function but a soft cap"
    if v.shape[-1] != q.shape[-1]:
        return f"values as wide as queries, got {v.shape[-1]} and {q.shape[-1]}"
    return unsupported(q.dtype, q.shape[-1], mask.block_size, scale) or unsupported_mask(mask)


def _hopper_attention(inputs: Inputs, scale: float, return_residual: bool) -> tuple[Array, ...]:
    from . import hopper

    q, k, v, sinks, mask, scores = inputs
    soft_cap = next((one.cap for one in scores if isinstance(one, SoftCap)), None)
    results = hopper.hopper_attention(
        q, k, v, mask, scale, soft_cap=soft_cap, sinks_H=sinks, return_residual=return_residual
    )
    return results if isinstance(results, tuple) else (results,)


def _reference_attention(inputs: Inputs, scale: float, _: bool) -> tuple[Array, Array]:
    q, k, v, sinks, mask, scores = inputs
    return reference_attention(q, k, v, mask, scale, scores, sinks)


def _xla_attention(inputs: Inputs, scale: float, _: bool) -> tuple[Array, ...]:
    return xla_attention(inputs, scale)


_IMPLEMENTATIONS: dict[Implementation, Callable[[Inputs, float, bool], tuple[Array, ...]]] = {
    "hopper": _hopper_attention,
    "reference": _reference_attention,
    "xla": _xla_attention,
}


def _over_batch(attend: Callable[[Inputs], tuple[Array, ...]], inputs: Inputs) -> tuple[Array, ...]:
    """Attend to one sequence after the other."""
    if inputs.q.ndim == 3:
        return attend(inputs)
    own = (inputs.q, inputs.k, inputs.v, inputs.mask if inputs.mask.batch else None)

    def attend_one(own: tuple[Array, Array, Array, BlockMask | None]) -> tuple[Array, ...]:
        q, k, v, mask = own
        return attend(inputs._replace(q=q, k=k, v=v, mask=inputs.mask if mask is None else mask))

    return lax.map(attend_one, own)


def _on_explicit_meshes(
    attend: Callable[[Inputs], tuple[Array, ...]], inputs: Inputs, return_residual: bool
) -> tuple[Array, ...]:
    """Let the compiler place what is inside, where shardings are part of types; results lie as the query does."""
    sharding = jax.typeof(inputs.q).sharding
    mesh = sharding.mesh
    explicit = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )
    if not explicit:
        return attend(inputs)
    spec = PartitionSpec(*sharding.spec[: inputs.q.ndim - 1])
    specs = (spec, spec) if return_residual else (spec,)
    return jax.sharding.auto_axes(attend, axes=explicit, out_sharding=specs)(inputs)


def _score_functions(soft_cap: float | None, score_fn: ScoreFn | None, heads: int) -> tuple[ScoreFn, ...]:
    scores: list[ScoreFn] = []
    if soft_cap is not None:
        cap = known_number(OP, "soft_cap", soft_cap)
        if not cap > 0:
            raise ValueError(f"soft_cap must be above 0, got {cap}; None for no cap")
        scores.append(SoftCap(cap))
    if score_fn is not None:
        if not isinstance(score_fn, ScoreFn):
            raise ValueError(
                f"score_fn must come of kernels/attention/scores.py, as score_fn(f) and alibi(heads=H) do; "
                f"got {type(score_fn).__name__}"
            )
        score_fn.check(heads)
        scores.append(score_fn)
    return tuple(scores)


def _check(q: Array, k: Array, v: Array, mask: BlockMask, sinks: Array | None) -> None:
    shapes = f"query {q.shape}, key {k.shape}, value {v.shape}"
    if q.ndim not in (3, 4) or not q.ndim == k.ndim == v.ndim:
        raise ValueError(f"query, key and value must be (T, H, K), or (N, T, H, K) for a batch; got {shapes}")
    if not (q.size and k.size and v.size):
        raise ValueError(f"T, H and K must be at least 1, got {shapes}")
    if q.shape[:-3] != k.shape[:-3] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"keys must be as many as values and as wide as queries, of one batch; got {shapes}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"the query's heads must be a multiple of the key's, got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"query, key and value must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if (mask.q_length, mask.kv_length) != (q.shape[-3], k.shape[-3]):
        raise ValueError(
            f"the mask is for {mask.q_length} queries and {mask.kv_length} keys, but there are {q.shape[-3]} and "
            f"{k.shape[-3]}; build the mask for the same sequence"
        )
    if mask.predicate.heads not in (1, q.shape[-2]):
        raise ValueError(f"the mask is for {mask.predicate.heads} heads, but the query has {q.shape[-2]}")
    if mask.batch and (q.ndim != 4 or mask.batch != q.shape[:1]):
        raise ValueError(
            f"the mask has a batch of {mask.batch[0]} but the query has shape {q.shape}; give both one leading axis"
        )
    if sinks is not None and (sinks.shape != (q.shape[-2],) or not jnp.issubdtype(sinks.dtype, jnp.floating)):
        raise ValueError(f"sinks must be floats of shape ({q.shape[-2]},), got {sinks.dtype} {sinks.shape}")
