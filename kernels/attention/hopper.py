"""Block-sparse attention on Hopper GPUs: the differentiable op around the three kernels."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from ..block_mask import BLOCK_SIZE, BlockMask
from ..implementation import first_order, vary_together
from .hopper_backward import backward_dkv, backward_dq
from .hopper_forward import forward
from .schedule import Schedule, build_schedule

HEAD_WIDTHS = (64, 128)


def hopper_attention(q_THK: Array, k_THK: Array, v_THK: Array, mask: BlockMask, scale: float) -> Array:
    """Return softmax(scale * q k^T, where `mask` lets the query see the key) v, per head, for one sequence.

    Args:
      q_THK, k_THK, v_THK: as `unsupported` says.
      mask: any lists of blocks of 128; a run-time value, so that a growing
        window recompiles nothing.
      scale: factor on the scores, above 0.

    Returns:
      (T, H, K) bfloat16, 0 for a query that sees no key. Differentiable in q, k
      and v; the same inputs give the same bits, forward and backward. NaN and
      infinity show in what sees them, and nowhere else.
    """
    arrays = vary_together(q_THK, k_THK, v_THK, mask.documents, build_schedule(mask))
    return _contained(scale, *arrays)


def unsupported(dtype: DTypeLike, head_width: int, block_size: int, scale: float) -> str | None:
    """Return what the kernels need of their arguments, None where they have it."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"bfloat16 q, k and v, got {jnp.dtype(dtype)}"
    if head_width not in HEAD_WIDTHS:
        return f"a head width of {' or '.join(map(str, HEAD_WIDTHS))}, got {head_width}"
    if block_size != BLOCK_SIZE:
        return f"a mask in blocks of {BLOCK_SIZE}, got blocks of {block_size}"
    if not scale > 0:
        return f"scale > 0, got {scale} (negate q)"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(scale: float, q: Array, k: Array, v: Array, documents: Array, schedule: Schedule) -> Array:
    """Run `hopper_attention` on a schedule that was built before: what a step repeats for every layer.

    For finite numbers: NaN and infinity also show where the mask hides them. To hold them back, `hopper_attention`
    passes over its arguments once more, which costs about a third of the time of the kernels.
    """
    return _attention_forward(scale, q, k, v, documents, schedule)[0]


def _attention_forward(
    scale: float, q: Array, k: Array, v: Array, documents: Array, schedule: Schedule
) -> tuple[Array, tuple[Array, Array, Array, Array, Array, Array, Schedule]]:
    q, k, v = first_order("block_sparse_attention", (q, k, v))
    o, lse = forward(q, k, v, documents, schedule.by_query, scale=scale)
    return o, (q, k, v, o, lse, documents, schedule)


def _attention_backward(
    scale: float, saved: tuple[Array, Array, Array, Array, Array, Array, Schedule], do: Array
) -> tuple[Array, Array, Array, None, None]:
    (q, k, v, o, lse, documents, schedule), do = first_order("block_sparse_attention", (saved, do))
    dq, delta = backward_dq(q, k, v, o, do, lse, documents, schedule.by_query, scale=scale)
    dk, dv = backward_dkv(q, k, v, do, lse, delta, documents, schedule.by_key, scale=scale)
    return dq, dk, dv, None, None


attend.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contained(scale: float, q: Array, k: Array, v: Array, documents: Array, schedule: Schedule) -> Array:
    """Attend; what is not finite shows in what sees it alone.

    Matmuls multiply masked pairs too, by 0, and 0 x NaN is NaN. So, as in xla.py, 0 takes the place of what is not
    finite wherever it would be a right operand, and NaN stands where the kernels hide what is masked: in the scores.
    """
    return _contained_forward(scale, q, k, v, documents, schedule)[0]


def _contained_forward(
    scale: float, q: Array, k: Array, v: Array, documents: Array, schedule: Schedule
) -> tuple[Array, tuple[Array, Array, Array, Array, Array, Array, Schedule]]:
    finite_TH1 = _finite(k) & _finite(v)
    k, v = jnp.where(finite_TH1, k, jnp.nan), jnp.where(finite_TH1, v, 0)
    return _attention_forward(scale, q, k, v, documents, schedule)


def _contained_backward(
    scale: float, saved: tuple[Array, Array, Array, Array, Array, Array, Schedule], do: Array
) -> tuple[Array, Array, Array, None, None]:
    (q, k, v, o, lse, documents, schedule), do = first_order("block_sparse_attention", (saved, do))
    k = jnp.where(jnp.isnan(k), 0, k)
    # Of a query that is not finite the weights become NaN, by its log-sum-exp.
    finite_TH1 = _finite(q) & _finite(do)
    q, do = jnp.where(finite_TH1, q, 0), jnp.where(finite_TH1, do, 0)
    lse = jnp.where(finite_TH1[..., 0].T, lse, jnp.nan)
    dq, delta = backward_dq(q, k, v, o, do, lse, documents, schedule.by_query, scale=scale)
    # So is a query that has seen a key or value of that kind: its output tells.
    finite_HT = jnp.isfinite(delta)
    lse, delta = jnp.where(finite_HT, lse, jnp.nan), jnp.where(finite_HT, delta, 0)
    dk, dv = backward_dkv(q, k, v, do, lse, delta, documents, schedule.by_key, scale=scale)
    return dq, dk, dv, None, None


_contained.defvjp(_contained_forward, _contained_backward)


def _finite(x_THK: Array) -> Array:
    return jnp.isfinite(x_THK).all(axis=-1, keepdims=True)
