"""What all Hopper kernels are written with: accumulators, broadcasting, shared memory, and how a kernel is launched.

On Hopper a running sum lives in the registers of a `wgmma` accumulator, and
the left operand of a matmul may be in registers too. Pallas' interpreter, which
runs the kernels on a CPU, knows neither: there a running sum is a float32
buffer and the matmul is `acc + dot`. The kernels are written once, against
these functions, which pick the form.
"""

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from ..implementation import interpreting, vary_together
from .config import WARPGROUPS

type Ref = Any  # a Pallas reference: its functions do not agree on a public type for one

ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value per column


def interpreter_buffers(*shapes: tuple[int, int]) -> list[pl.MemoryRef]:
    """Return the scratch of `with_accumulators`: nothing on a GPU."""
    return [plgpu.SMEM((WARPGROUPS, *shape), jnp.float32) for shape in shapes] if interpreting() else []


def with_accumulators(body: Callable[..., None], *shapes: tuple[int, int], buffers: list[Ref]) -> None:
    """Call `body` with one zeroed float32 accumulator per shape; `buffers` as from `interpreter_buffers`."""
    if not buffers:
        pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
        return
    own = [buffer.at[lax.axis_index("warpgroup")] for buffer in buffers]
    for ref in own:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    body(*own)


def multiply_add(acc: Ref, a: Array, b: Ref) -> None:
    """Start acc += a @ b, with `a` in registers and `b` in shared memory."""
    if interpreting():
        acc[...] += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    else:
        plgpu.wgmma(acc, a, b)


def preload(acc: Ref, value: Array) -> None:
    """Let a fresh accumulator start from `value`; in the interpreter `read_preloaded` adds it instead."""
    if not interpreting():
        acc[...] = value


def read_preloaded(acc: Ref, value: Array, *, in_flight: int) -> Array:
    """Return an accumulator that started from `value`, once at most `in_flight` later matmuls still run."""
    result = plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)
    return result + value if interpreting() else result


def rows(value: Array, shape: tuple[int, ...]) -> Array:
    """Broadcast one value per row to a tile."""
    return lax.broadcast_in_dim(value, shape, [0])


def columns(value: Array, shape: tuple[int, ...]) -> Array:
    """Broadcast one value per column to a tile."""
    return lax.broadcast_in_dim(value, shape, [1])


def positions(first: Array, size: int, layout: Any) -> Array:
    """`size` positions from `first` on, one per row or column: a whole tile of them would fill 64 registers."""
    return first + plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def tile(*shape: int, dtype: DTypeLike = jnp.bfloat16) -> pl.MemoryRef:
    """Shared memory in the swizzled form that the copy engine writes and wgmma reads."""
    item_bytes = jnp.dtype(dtype).itemsize
    row_bytes = min(128, shape[-1] * item_bytes)
    tiling = plgpu.TilingTransform((8, row_bytes // item_bytes))  # type: ignore[abstract]
    transforms = (tiling, plgpu.SwizzleTransform(row_bytes))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def kernel(body: Callable[..., None], out_type: Any, **options: Any) -> Callable[..., Any]:
    """Return `plgpu.kernel`, with results that vary over mesh axes as the arguments do, which Pallas does not say."""
    run = plgpu.kernel(body, out_type=out_type, **options)
    return lambda *arguments: vary_together(arguments, run(*arguments))[1]


def launch(
    body: Callable[..., None], name: str, out_type: Any, scratch: dict[str, Any], *, programs: int
) -> Callable[..., Any]:
    """Return a kernel over a line of programs, each of two warpgroups."""
    return kernel(
        body,
        out_type,
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        kernel_name=name,
        # All barriers are explicit: between them no buffer is both read and written by one thread.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
