"""The MLP's two products that meet relu squared, on Hopper, each with its pointwise part done in registers.

    forward      r2 = relu(s x W^T)^2           x (T, D), W (F, D), s (T): a factor of each row
    backward     dz = (dy P^T) 2 s sqrt(r2)     dy (T, D), P (F, D)

One program a multiprocessor walks over tiles of 128 x 256, all columns of a few rows before the next rows, so that W
stays in L2 and x comes from memory once. Two programs that stand on neighbouring rows form a cluster: they multiply the
same W, of which each fetches half for both. Three warpgroups:

    producer       x0 W0  x1 W1  x2 W2 ...      a ring of `stages` steps of 64 channels
    warpgroup 0    | 0 1 2 .. 11 | out  | 0 1 2 .. 11 | out  |         rows  0- 63 of a tile
    warpgroup 1       | 0 1 2 .. 11 | out  | 0 1 2 .. 11 | out  |      rows 64-127

A warpgroup's accumulator fills half of its registers, so it cannot write out a tile and multiply the next one at the
same time. But the other can: nothing keeps the two in step, and once they are apart they stay so, since each gets half
of the tensor cores while both multiply, and all of them while the other one writes. (To hold one back on purpose cost
2 to 5 %: docs/performance.md.)

Backward, 2 s sqrt(r2) is made during the product, a quarter at a time, and waits in registers as bf16:

    fetch r2 0, 1 | .. | take 0, fetch 2 | .. | take 1, fetch 3 | .. | take 2 | .. | take 3 | .. | out 0, 1, 2, 3

through the two buffers per warpgroup that the result then leaves by.

Barriers (s a slot of the ring; every count is per use, and no use begins before all have seen the last):

    ready[s]     2 copies                       producer: fills s              both warpgroups, before they multiply
    free[s]      warpgroups of the cluster      warpgroups: s is multiplied    producers, before they fill s again
    r2_ready     1                              a warpgroup: fetches           itself, before it takes

    producer     fill 0 1 2 3 | free[0] fill 0 | free[1] fill 1 | ..                               | free[0] .. free[3]
    a warpgroup  ready[0] mul | ready[1] mul, free[0]! | ready[2] mul, free[1]! | ..               (! signals)

Nobody waits in a circle: warpgroups wait for the producer alone, and a slot is freed when the next step has been
issued, which takes 2 stages. Last, a producer waits for all slots, and thereby for every arrival of its cluster: no
program ends while another writes to it or signals it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import MULTIPROCESSORS, HopperConfig
from .attention_hopper_ops import ROW, Ref, rows, split_roles, tile

WARPGROUPS = 2
HALF = 64
ROWS = WARPGROUPS * HALF
PART = 64  # columns that leave at a time: one row of swizzled shared memory
SLOTS = 2  # parts on their way, a warpgroup


class Config(NamedTuple):
    """How a product is cut up.

    `columns` of a tile: a multiple of 64, at most 256. `channels` of a step: 32 or 64. `stages`: steps in shared
    memory, at least 2; 64 channels of 256 columns and the rows take 48 KiB, and the parts on their way 32, of 227 in
    all. `cluster`: programs that share W, 1 or 2.
    """

    columns: int = 256
    channels: int = 64
    stages: int = 4
    cluster: int = 2


CONFIG = Config()


class Buffers(NamedTuple):
    x: Ref  # (stage, rows, channels)
    w: Ref  # (stage, columns, channels)
    part: Ref  # (warpgroup, slot, rows, columns)


class Barriers(NamedTuple):
    ready: Ref
    free: Ref
    r2_ready: Ref  # (warpgroup x slot)


def unsupported_shape(tokens: int, width: int, hidden: int) -> str | None:
    """What keeps the kernels from a shape, if anything does."""
    for what, size, multiple in (("T", tokens, ROWS), ("D", width, 64), ("F", hidden, CONFIG.columns)):
        if size % multiple or not size:
            return f"{what} a multiple of {multiple}, got {size}"
    return None


@functools.partial(jax.jit, static_argnames=("config", "interpret"))  # lowered once, not once a layer
def relu_squared_product(
    x_TD: Array, w_FD: Array, scale_T: Array, *, config: Config = CONFIG, interpret: bool
) -> Array:
    """relu(s x W^T)^2, (T, F) bf16, computed in float32 and rounded once; T, D and F as `unsupported_shape` says."""
    return _product("mlp_relu_squared", x_TD, w_FD, scale_T, None, config, interpret)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def slope_product(
    dy_TD: Array, proj_FD: Array, scale_T: Array, r2_TF: Array, *, config: Config = CONFIG, interpret: bool
) -> Array:
    """(dy P^T) 2 s sqrt(r2), (T, F) bf16: the gradient of z, given that of relu(s z)^2 as a product; 0 where r2 is."""
    return _product("mlp_slope", dy_TD, proj_FD, scale_T, r2_TF, config, interpret)


def _product(
    name: str, x_TD: Array, w_FD: Array, scale_T: Array, r2_TF: Array | None, config: Config, interpret: bool
) -> Array:
    if config.stages < 2:
        raise ValueError(
            f"a slot is freed while the next one is in use: stages must be at least 2, got {config.stages}"
        )
    (length, width), hidden = x_TD.shape, w_FD.shape[0]
    steps, parts = width // config.channels, config.columns // PART
    stages = min(config.stages, steps)
    cluster = config.cluster if length % (config.cluster * ROWS) == 0 else 1
    row_tiles, column_tiles = length // (cluster * ROWS), hidden // config.columns
    # The interpreter runs one cluster after the other: several tiles for each are what needs a test.
    programs = min(row_tiles * column_tiles, 2 if interpret else MULTIPROCESSORS // cluster)

    def body(x: Ref, w: Ref, scale: Ref, *rest: Ref, smem: Buffers, barriers: Barriers) -> None:
        r2, out = rest[0], rest[-1]
        program = lax.axis_index("program")
        count = pl.cdiv(row_tiles * column_tiles - program, programs)
        # Not 0: the compiler would know each step's slot, and keep all their addresses in registers.
        first_slot = lax.rem(program, stages)

        def corner(i: Array) -> tuple[Array, Array]:
            """First row and column of this program's i-th tile."""
            number = program + i * programs
            row_tile = lax.div(number, column_tiles) * cluster
            if cluster > 1:
                row_tile += lax.axis_index("pair")
            return row_tile * ROWS, lax.rem(number, column_tiles) * config.columns

        def produce() -> None:
            @pl.loop(0, count)
            def _tile(i: Array) -> None:
                row, column = corner(i)

                @pl.loop(0, steps)
                def _step(step: Array) -> None:
                    number = i * steps + step
                    slot = lax.rem(first_slot + number, stages)
                    channels = pl.ds(step * config.channels, config.channels)
                    ready = barriers.ready.at[slot]
                    pl.when(number >= stages)(lambda: plgpu.barrier_wait(barriers.free.at[slot]))
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(row, ROWS), channels], smem.x.at[slot], ready)
                    plgpu.copy_gmem_to_smem(
                        w.at[pl.ds(column, config.columns), channels],
                        smem.w.at[slot],
                        ready,
                        collective_axes="pair" if cluster > 1 else None,
                    )

            for slot in range(stages):  # every completion of a barrier must be awaited, the last one too
                plgpu.barrier_wait(barriers.free.at[slot])

        def consume() -> None:
            warpgroup = lax.axis_index("warpgroup")
            half = pl.ds(warpgroup * HALF, HALF)

            def one_tile(i: Array, slot: Array, acc: Ref) -> Array:
                row, column = corner(i)
                own = pl.ds(row + warpgroup * HALF, HALF)
                own_scale = plgpu.load(scale.at[own], layout=ROW, optimized=False)
                own_scale = rows(own_scale, (HALF, PART))
                slopes: list[Array] = []

                def columns(part: int) -> pl.Slice:
                    return pl.ds(column + part * PART, PART)

                def fetch(part: int) -> None:
                    slot = part % SLOTS
                    plgpu.copy_gmem_to_smem(
                        r2.at[own, columns(part)],
                        smem.part.at[warpgroup, slot],
                        barriers.r2_ready.at[warpgroup * SLOTS + slot],
                    )

                def take(part: int) -> None:
                    slot = part % SLOTS
                    plgpu.barrier_wait(barriers.r2_ready.at[warpgroup * SLOTS + slot])
                    r2_part = plgpu.load(smem.part.at[warpgroup, slot], layout=plgpu.Layout.WGMMA)
                    slope = (2 * jnp.sqrt(r2_part.astype(jnp.float32)) * own_scale).astype(jnp.bfloat16)
                    slopes.append(lax.optimization_barrier(slope))  # now, while the tensor cores are busy
                    if part + SLOTS < parts:
                        plgpu.commit_smem()  # all threads have read the slot
                        fetch(part + SLOTS)

                previous = slot
                for step in range(steps):
                    plgpu.barrier_wait(barriers.ready.at[slot])
                    plgpu.wgmma(acc, smem.x.at[slot, half], smem.w.at[slot].transpose((1, 0)))
                    if step:
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(barriers.free.at[previous])
                    previous, slot = slot, jnp.where(slot == stages - 1, 0, slot + 1)
                    if r2_TF is not None:
                        if step == steps // 12:
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's parts
                            for part in range(min(SLOTS, parts)):
                                fetch(part)
                        for part in range(parts):
                            if step == steps * (part + 2) // (parts + 2):
                                take(part)

                # An accumulator's registers are single, but bfloat16 is rounded in pairs.
                value = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)
                plgpu.barrier_arrive(barriers.free.at[previous])
                for part in range(parts):
                    result = value[:, part * PART : (part + 1) * PART]
                    if r2_TF is None:
                        result = jnp.maximum(result, 0) * own_scale
                        result = result * result
                    else:
                        result = result.astype(jnp.bfloat16) * slopes[part]  # pairs again, never unpacked
                    plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                    smem.part[warpgroup, part % SLOTS] = result.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(smem.part.at[warpgroup, part % SLOTS], out.at[own, columns(part)])
                return slot

            def next_tile(i: Array, slot: Array) -> Array:
                return pl.run_scoped(
                    functools.partial(one_tile, i, slot), plgpu.ACC((HALF, config.columns), jnp.float32)
                )

            lax.fori_loop(0, count, next_tile, first_slot)
            plgpu.wait_smem_to_gmem(0)

        split_roles(produce, consume, HopperConfig(stages=stages))

    free: Any = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    shared: dict[str, Any] = {}
    if cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=WARPGROUPS, num_barriers=stages)
        shared = {"cluster": (cluster,), "cluster_names": ("pair",)}
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((length, hidden), jnp.bfloat16),
        scratch_types=dict(
            smem=Buffers(
                x=tile(stages, ROWS, config.channels),
                w=tile(stages, config.columns, config.channels),
                part=tile(WARPGROUPS, SLOTS, HALF, PART),
            ),
            barriers=Barriers(
                ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                free=free,
                r2_ready=plgpu.Barrier(num_barriers=WARPGROUPS * SLOTS),
            ),
        ),
        grid=(programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        **shared,
        kernel_name=name,
        # All barriers are explicit.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(x_TD, w_FD, scale_T, *([] if r2_TF is None else [r2_TF]))
