"""The few operations that differ between a Hopper and the interpreter which tests the kernels on a CPU.

On Hopper a running sum lives in the registers of a `wgmma` accumulator, and
the left operand of a product may be in registers too. The interpreter knows
neither, so there a running sum is a float32 buffer and the product is
`acc + dot`. The kernels are written once, against these functions.
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import COMPUTE_WARPGROUPS

ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value per column


def interpreter_buffers(*shapes: tuple[int, int], interpret: bool) -> list[pl.MemoryRef]:
    """Scratch for `with_accumulators`; nothing on a GPU."""
    return [plgpu.SMEM((COMPUTE_WARPGROUPS, *shape), jnp.float32) for shape in shapes] if interpret else []


def with_accumulators(body: Callable[..., None], *shapes: tuple[int, int], buffers: list[jax.Ref]) -> None:
    """Call `body` with one zeroed float32 accumulator per shape; `buffers` as from `interpreter_buffers`."""
    if not buffers:
        pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
        return
    own = [buffer.at[lax.axis_index("warpgroup")] for buffer in buffers]
    for ref in own:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    body(*own)


def multiply_add(acc: jax.Ref, a: Array, b: jax.Ref, *, interpret: bool) -> None:
    """Start acc += a @ b, with `a` in registers and `b` in shared memory."""
    if interpret:
        acc[...] += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    else:
        plgpu.wgmma(acc, a, b)


def rows(value: Array, like: Array) -> Array:
    """Broadcast one value per row to a tile."""
    return lax.broadcast_in_dim(value, like.shape, [0])


def columns(value: Array, like: Array) -> Array:
    """Broadcast one value per column to a tile."""
    return lax.broadcast_in_dim(value, like.shape, [1])


def tile(*shape: int) -> pl.MemoryRef:
    """A bf16 shared-memory tile in the swizzled form that the copy engine writes and wgmma reads."""
    return plgpu.SMEM(
        shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    )
