"""Block-sparse attention on Hopper GPUs: the differentiable op around the three kernels."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from .attention_hopper_backward import backward_dkv, backward_dq
from .attention_hopper_config import BLOCK
from .attention_hopper_forward import forward
from .attention_hopper_walk import Walks, build_walks
from .block_mask import BlockMask

HEAD_WIDTHS = (64, 128)


def hopper_attention(
    q_THK: Array, k_THK: Array, v_THK: Array, mask: BlockMask, *, scale: float, interpret: bool = False
) -> Array:
    """softmax(scale * q k^T, where `mask` lets the query see the key) v, per head, for one sequence.

    Args:
      q_THK, k_THK, v_THK: bfloat16; T a multiple of 128, head width K 64 or 128.
      mask: any lists of blocks of 128; a run-time value, so that a growing
        window recompiles nothing.
      scale: factor on the scores, above 0.
      interpret: run in Pallas' interpreter (any device, slow; for tests).

    Returns:
      (T, H, K) bfloat16, 0 for a query that sees no key. Differentiable in q, k
      and v; the same inputs give the same bits, forward and backward. Inside
      `shard_map`, switch off `check_vma`: Pallas' GPU kernels do not carry it.

    Raises:
      ValueError: for a shape, dtype, block size or scale that is not supported.
    """
    _check(q_THK, k_THK, v_THK, mask, scale)
    return attend(scale, interpret, q_THK, k_THK, v_THK, mask.documents, build_walks(mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(scale: float, interpret: bool, q: Array, k: Array, v: Array, documents: Array, walks: Walks) -> Array:
    """`hopper_attention` on walks that were built before: what a step repeats for every layer."""
    return _attention_forward(scale, interpret, q, k, v, documents, walks)[0]


def _attention_forward(
    scale: float, interpret: bool, q: Array, k: Array, v: Array, documents: Array, walks: Walks
) -> tuple[Array, tuple[Array, Array, Array, Array, Array, Array, Walks]]:
    o, lse = forward(q, k, v, documents, walks.by_query, scale=scale, interpret=interpret)
    return o, (q, k, v, o, lse, documents, walks)


def _attention_backward(
    scale: float,
    interpret: bool,
    saved: tuple[Array, Array, Array, Array, Array, Array, Walks],
    do: Array,
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, o, lse, documents, walks = saved
    dq, delta = backward_dq(q, k, v, o, do, lse, documents, walks.by_query, scale=scale, interpret=interpret)
    dk, dv = backward_dkv(q, k, v, do, lse, delta, documents, walks.by_key, scale=scale, interpret=interpret)
    return dq, dk, dv, None, None


attend.defvjp(_attention_forward, _attention_backward)


def _check(q: Array, k: Array, v: Array, mask: BlockMask, scale: float) -> None:
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"the Hopper kernel needs q, k and v of one shape (T, H, K); got {q.shape}, {k.shape} and {v.shape}"
        )
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        raise ValueError(
            f"the Hopper kernel needs bfloat16 q, k and v; got {q.dtype}, {k.dtype} and {v.dtype}: "
            "cast them, or use implementation='xla'"
        )
    if q.shape[-1] not in HEAD_WIDTHS:
        raise ValueError(
            f"the Hopper kernel supports head widths {HEAD_WIDTHS}, got {q.shape[-1]}; use implementation='xla'"
        )
    if mask.block_size != BLOCK or q.shape[0] % BLOCK or q.shape[0] != mask.documents.shape[-1]:
        raise ValueError(
            f"the Hopper kernel needs a mask in blocks of {BLOCK} for the same T, a multiple of {BLOCK}; "
            f"got blocks of {mask.block_size} for T = {mask.documents.shape[-1]}, and q with T = {q.shape[0]}"
        )
    if not scale > 0:
        raise ValueError(f"the Hopper kernel needs scale > 0, got {scale}; negate q, or use implementation='xla'")
