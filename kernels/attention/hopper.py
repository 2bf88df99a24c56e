"""Block-sparse attention on Hopper GPUs: the differentiable op around the three kernels."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from ..block_mask import BLOCK_SIZE, BlockMask
from ..implementation import first_order, vary_together
from .hopper_backward import backward_dkv, backward_dq
from .hopper_forward import forward
from .schedule import Schedule, build_schedule

DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_WIDTHS = (64, 128)

type Saved = tuple[Array, Array, Array, Array, Array, Array, Schedule, Array | None]


def hopper_attention(
    q_THK: Array,
    k_TJK: Array,
    v_TJK: Array,
    mask: BlockMask,
    scale: float,
    *,
    soft_cap: float | None = None,
    sinks_H: Array | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Return softmax(scale * q k^T, where `mask` lets the query see the key) v, per head, for one sequence.

    Args:
      q_THK, k_TJK, v_TJK: as `unsupported` says, of one dtype. J divides H: query heads 0 to H / J - 1 use head 0 of
        the keys and values, and so on.
      mask: any lists of blocks of 128; a run-time value, so that a growing
        window recompiles nothing.
      scale: factor on the scores, above 0.
      soft_cap: makes cap tanh(s / cap) of a scaled score s; above 0.
      sinks_H: for each head, the score of one more key that every query sees, and whose value is 0. It is neither
        scaled nor capped.
      return_residual: whether to return log-sum-exp too.

    Returns:
      (T, H, K) as q, 0 for a query that sees no key; and, if wanted, the logarithm (base e) of the sum of the
      exponentials of a query's scores, sink included, (T, H) float32: -inf for a query that sees no key and has no
      sink. Differentiable in q, k, v and the sinks; the same inputs give the same bits, forward and backward. NaN and
      infinity show in what sees them, and nowhere else.

    Raises:
      ValueError: where H is no multiple of J, or the soft cap is not above 0.
    """
    heads, kv_heads = q_THK.shape[1], k_TJK.shape[1]
    if heads % kv_heads:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, got {heads} and {kv_heads}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be above 0, got {soft_cap}; None for no cap")
    arrays = vary_together(q_THK, k_TJK, v_TJK, mask.documents, build_schedule(mask), sinks_H)
    return attend(scale, *arrays, soft_cap, return_residual, True)


def unsupported(dtype: DTypeLike, head_width: int, block_size: int, scale: float) -> str | None:
    """Return what the kernels need of their arguments, None where they have it."""
    if jnp.dtype(dtype) not in map(jnp.dtype, DTYPES):
        return f"{' or '.join(map(str, map(jnp.dtype, DTYPES)))} q, k and v, got {jnp.dtype(dtype)}"
    if head_width not in HEAD_WIDTHS:
        return f"a head width of {' or '.join(map(str, HEAD_WIDTHS))}, got {head_width}"
    if block_size != BLOCK_SIZE:
        return f"a mask in blocks of {BLOCK_SIZE}, got blocks of {block_size}"
    if not scale > 0:
        return f"scale > 0, got {scale} (negate q)"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 7, 8, 9))
def attend(
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    documents: Array,
    schedule: Schedule,
    sinks: Array | None = None,
    soft_cap: float | None = None,
    return_residual: bool = False,
    contain: bool = False,
) -> Array | tuple[Array, Array]:
    """Run `hopper_attention` on a schedule that was built before: what a step repeats for every layer.

    For finite numbers: NaN and infinity also show where the mask hides them. To hold them back, `contain` passes over
    the arguments once more, which costs about a third of the time of the kernels.

    Matmuls multiply masked pairs too, by 0, and 0 x NaN is NaN. So, as in xla.py, 0 takes the place of what is not
    finite wherever it would be a right operand, and NaN stands where the kernels hide what is masked: in the scores.
    """
    return _forward(scale, q, k, v, documents, schedule, sinks, soft_cap, return_residual, contain)[0]


def _forward(
    scale: float, q: Array, k: Array, v: Array, documents: Array, schedule: Schedule, sinks: Array | None,
    soft_cap: float | None, return_residual: bool, contain: bool,
) -> tuple[Array | tuple[Array, Array], Saved]:  # fmt: skip
    if contain:
        finite_TJ1 = _finite(k) & _finite(v)
        k, v = jnp.where(finite_TJ1, k, jnp.nan), jnp.where(finite_TJ1, v, 0)
    q, k, v, sinks = first_order("block_sparse_attention", (q, k, v, sinks))
    sinks_f32 = None if sinks is None else sinks.astype(jnp.float32)
    o, lse = forward(
        q, k, v, documents, schedule.by_query, sinks_f32,
        scale=scale, soft_cap=soft_cap, lse_of_nothing=-math.inf if return_residual else 0.0,
    )  # fmt: skip
    saved = q, k, v, o, lse, documents, schedule, sinks
    return ((o, lse.T * math.log(2)) if return_residual else o), saved


def _backward(
    scale: float, soft_cap: float | None, return_residual: bool, contain: bool, saved: Saved,
    gradients: Array | tuple[Array, Array],
) -> tuple[Array, Array, Array, None, None, Array | None]:  # fmt: skip
    saved, gradients = first_order("block_sparse_attention", (saved, gradients))
    q, k, v, o, lse, documents, schedule, sinks = saved
    do, dlse = gradients if isinstance(gradients, tuple) else (gradients, None)  # with and without return_residual
    if dlse is not None:
        # A row that sees nothing has a constant for log-sum-exp; the kernels read a number there.
        sees = lse != -jnp.inf
        lse, dlse = jnp.where(sees, lse, 0), jnp.where(sees, dlse.T, 0)
    if contain:
        k = jnp.where(jnp.isnan(k), 0, k)
        # Of a query that is not finite the weights become NaN, by its log-sum-exp.
        finite_TH1 = _finite(q) & _finite(do)
        q, do = jnp.where(finite_TH1, q, 0), jnp.where(finite_TH1, do, 0)
        lse = jnp.where(finite_TH1[..., 0].T, lse, jnp.nan)
    dq, delta = backward_dq(
        q, k, v, o, do, lse, documents, schedule.by_query, None, dlse, scale=scale, soft_cap=soft_cap
    )
    if contain:
        # So is a query that has seen a key or value of that kind: its output tells.
        finite_HT = jnp.isfinite(delta)
        lse, delta = jnp.where(finite_HT, lse, jnp.nan), jnp.where(finite_HT, delta, 0)
    dk, dv = backward_dkv(q, k, v, do, lse, delta, documents, schedule.by_key, scale=scale, soft_cap=soft_cap)
    if sinks is None:
        return dq, dk, dv, None, None, None
    # P of the sink is exp(sink - lse), and its dP is 0.
    weights = jnp.exp2(sinks.astype(jnp.float32)[:, None] * math.log2(math.e) - lse)
    return dq, dk, dv, None, None, -jnp.sum(weights * delta, axis=1).astype(sinks.dtype)


attend.defvjp(_forward, _backward)


def _finite(x_THK: Array) -> Array:
    return jnp.isfinite(x_THK).all(axis=-1, keepdims=True)
