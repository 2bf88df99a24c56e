"""What the head's two Hopper kernels share: the cap, shares of the work, shared memory."""

import math

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from .head_loss import CAP, TEMPERATURE

CAP_LOG2 = CAP * math.log2(math.e)  # so that exp(CAP x) = 2^(CAP_LOG2 x)


def gate(z: Array) -> Array:
    """sigmoid(z / 7.5) in two of the special-function unit's operations."""
    # 1 / x = rsqrt(x)^2: a division would be a subroutine. Where the power overflows, rsqrt(inf) = 0 is the limit.
    root = lax.rsqrt(1 + jnp.exp2(z * (-math.log2(math.e) / TEMPERATURE)))
    return root * root


def run_of_tiles(run: Array, runs: int, tiles: int) -> tuple[Array, Array]:
    """First tile and number of tiles of one of `runs` nearly equal runs."""
    first = lax.div(run * tiles, runs)
    return first, lax.div((run + 1) * tiles, runs) - first


def shared_tile(*shape: int, dtype: DTypeLike) -> pl.MemoryRef:
    """Shared memory in the swizzled form that the copy engine writes and wgmma reads."""
    item_bytes = jnp.dtype(dtype).itemsize
    row_bytes = min(128, shape[-1] * item_bytes)
    transforms = (plgpu.TilingTransform((8, row_bytes // item_bytes)), plgpu.SwizzleTransform(row_bytes))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)
