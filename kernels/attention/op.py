"""Block-sparse attention: one call, several implementations that agree.

`reference` is dense and exact, for small T and for tests. `xla` walks the block
lists in plain JAX on any device. `hopper` is the Pallas kernel for H100/H200.
"""

from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ..block_mask import BlockMask
from ..implementation import Implementation, choose, known_number
from .reference import reference_attention
from .xla import xla_attention


def block_sparse_attention(
    q: Array, k: Array, v: Array, mask: BlockMask, *, scale: ArrayLike, implementation: Implementation = "auto"
) -> Array:
    """Return softmax(scale * q k^T, where `mask` lets the query see the key) v, per head.

    Args:
      q, k, v: (T, H, K), or (N, T, H, K) for a batch of sequences.
      mask: the blocks to visit; its leaves carry the same leading axis as q, or
        none, in which case all sequences share it.
      scale: factor on the scores. A number is compiled in; an array, also a traced one, multiplies q before it is
        rounded to its dtype.
      implementation: `auto` picks `hopper` where it runs, else `xla`.

    Returns:
      An array shaped and typed like `q`. A query that sees no key gives 0.
      Differentiable in q, k and v, once, in reverse mode; with `reference` in any way.

    Raises:
      ValueError: for shapes, dtypes or block sizes that are not supported, or an
        implementation that does not run here.
    """
    q, k, v = map(jnp.asarray, (q, k, v))
    mask = mask.checked()
    _check(q, k, v, mask)
    if isinstance(scale, jax.Array | np.ndarray):
        if scale.ndim != 0:
            raise ValueError(f"scale must be one number, got an array of shape {scale.shape}")
        q, scale = (q * jnp.asarray(scale)).astype(q.dtype), 1.0
    scale = known_number("block_sparse_attention", "scale", scale)
    name = choose(
        "block_sparse_attention",
        implementation,
        lambda: unsupported(q.dtype, q.shape[-1], mask.block_size, scale),
        arrays=(q, k, v),
        names=get_args(Implementation),
    )
    attend = _IMPLEMENTATIONS[name]

    def attend_one(q: Array, k: Array, v: Array, mask: BlockMask) -> Array:
        return attend(q, k, v, mask, scale).astype(q.dtype)

    if q.ndim == 3:
        return attend_one(q, k, v, mask)
    if mask.documents.ndim == 1:
        return jax.lax.map(lambda qkv: attend_one(qkv[0], qkv[1], qkv[2], mask), (q, k, v))
    return jax.lax.map(lambda args: attend_one(*args), (q, k, v, mask))


def unsupported(dtype: DTypeLike, head_width: int, block_size: int, scale: float) -> str | None:
    """Return what the Hopper kernels need of their arguments, None where they have it."""
    # Imported when used, here as below: Pallas' GPU backend is not part of every jaxlib.
    from . import hopper

    return hopper.unsupported(dtype, head_width, block_size, scale)


def _hopper_attention(q: Array, k: Array, v: Array, mask: BlockMask, scale: float) -> Array:
    from . import hopper

    return hopper.hopper_attention(q, k, v, mask, scale)


_IMPLEMENTATIONS: dict[Implementation, Callable[[Array, Array, Array, BlockMask, float], Array]] = {
    "hopper": _hopper_attention,
    "reference": reference_attention,
    "xla": xla_attention,
}


def _check(q: Array, k: Array, v: Array, mask: BlockMask) -> None:
    if q.ndim in (3, 4) and not q.size:
        raise ValueError(f"T, H and K must be at least 1, got q {q.shape}")
    if q.ndim not in (3, 4) or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q, k and v must have one shape, (T, H, K) or (N, T, H, K); got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if mask.block_size <= 0 or q.shape[-3] % mask.block_size:
        raise ValueError(
            f"T must be a multiple of the mask's block size {mask.block_size}, got T = {q.shape[-3]}; pad the sequence"
        )
    if mask.documents.shape[-1] != q.shape[-3] or mask.partial_indices.shape[-2] * mask.block_size != q.shape[-3]:
        raise ValueError(
            f"the mask is for T = {mask.documents.shape[-1]} tokens in {mask.partial_indices.shape[-2]} blocks, "
            f"but q has T = {q.shape[-3]}; build the mask from the same sequence"
        )
    if mask.documents.ndim == 2 and (q.ndim != 4 or mask.documents.shape[0] != q.shape[0]):
        raise ValueError(
            f"the mask has a batch of {mask.documents.shape[0]} but q has shape {q.shape}; give q the same leading axis"
        )
