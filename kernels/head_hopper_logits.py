"""The head's FP8 matrix product on Hopper, with the sum of the softmax taken while a tile is in registers.

A program owns 128 tokens, whose x stays in shared memory, and walks along the words, 128 at a time. Two compute
warpgroups of 64 tokens, and a third one that only issues copies:

    producer         W00 W01 .. W05  W10 W11 .. W15  W20 ...     (a ring of steps: 128 words x 128 channels)
    warpgroup 0      | x W0^T |  x W1^T   |  x W2^T   | ..        tokens  0- 63
                              |  z0, exp  |  z1, exp  | ..
    warpgroup 1      the same, some time later or earlier         tokens 64-127

so the logits are written but not read again for the loss. The exponentials of a tile take about as long as its product,
so they must not wait for each other: a warpgroup starts a step of the next tile's product, and turns to the last one's
exponentials while the tensor cores work. For that its registers hold two tiles.

Measured for 65,536 x 50,304 logits of 768 channels on an H100: 4.99 ms. When clusters of two or four programs shared W,
5.02 and 9.22 ms; with tiles of 192 words in clusters of two, 5.50. One tile in registers, with one warpgroup held back
so that it multiplies while the other writes, took 4.94 ms in clusters of two: 1 % for two more kinds of barrier.

Barriers (s a slot of the ring, n its n-th use; all counts are per use, so phases alternate with n):

    x_ready   1 copy a step    once
    ready[s]  1 copy           producer: copy (s, n)           both warpgroups wait before they multiply (s, n)
    free[s]   2 warpgroups     warpgroups: done with (s, n)    producer waits before copy (s, n + 1) and at the end

Nobody waits in a circle: the warpgroups wait for the producer alone, and free a slot when the tile's next step has been
issued, or the tile is done. That takes two slots, or one where a tile is one step; the ring is never shorter.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import MULTIPROCESSORS, HopperConfig
from .attention_hopper_ops import ROW, Ref, launch, split_roles, tile
from .head_hopper_ops import HALF_CAP_LOG2, run_of_tiles, squash

WARPGROUPS = 2
HALF = 64
TOKENS = WARPGROUPS * HALF
WORDS = 128
CHANNELS = 128  # of a step: one row of swizzled shared memory
STAGES = 6  # steps of W in shared memory
MAX_WIDTH = 768  # x, the ring, and the parts of z on their way: 96 + 96 + 32 of 227 KiB
PART = 64  # words that leave at a time: one row of swizzled shared memory
PARTS = WORDS // PART


class Buffers(NamedTuple):
    x: Ref  # (step, tokens, channels) e4m3
    w: Ref  # (stage, words, channels) e4m3
    z: Ref  # (warpgroup, part, tokens, words) bf16
    total: Ref  # (warpgroup, tokens) float32


class Barriers(NamedTuple):
    x_ready: Ref
    ready: Ref
    free: Ref


def logits_and_totals(
    x_TD: Array, w_VD: Array, *, unscale: float, splits: int | None = None, interpret: bool
) -> tuple[Array, Array]:
    """z = `unscale` x W^T, (T, V) bf16, and sums of exp(capped logit - 30) over parts of V, (parts, T) float32.

    Args:
      x_TD, w_VD: e4m3; T and V multiples of 128, D of 128 and at most 768.
      unscale: what takes the operands' scales out; a power of two.
      splits: programs that share a row of logits; by default as many as fill the device.
    """
    length, width = x_TD.shape
    vocabulary = w_VD.shape[0]
    steps, token_tiles, word_tiles = width // CHANNELS, length // TOKENS, vocabulary // WORDS
    stages = min(STAGES, steps)
    splits = splits or max(1, min(word_tiles, MULTIPROCESSORS // token_tiles))

    def body(x: Ref, w: Ref, z: Ref, totals: Ref, *, smem: Buffers, barriers: Barriers) -> None:
        program = lax.axis_index("program")
        token_tile, split = lax.div(program, splits), lax.rem(program, splits)
        first_tile, tiles = run_of_tiles(split, splits, word_tiles)
        # Not 0: the compiler would know each step's slot, and keep all their addresses in registers.
        first_slot = lax.rem(program, stages)

        def produce() -> None:
            own = pl.ds(token_tile * TOKENS, TOKENS)
            for step in range(steps):
                plgpu.copy_gmem_to_smem(x.at[own, pl.ds(step * CHANNELS, CHANNELS)], smem.x.at[step], barriers.x_ready)

            @pl.loop(0, tiles)
            def _tile(i: Array) -> None:
                words = pl.ds((first_tile + i) * WORDS, WORDS)

                @pl.loop(0, steps)
                def _step(step: Array) -> None:
                    number = i * steps + step
                    slot = lax.rem(first_slot + number, stages)
                    pl.when(number >= stages)(lambda: plgpu.barrier_wait(barriers.free.at[slot]))
                    source = w.at[words, pl.ds(step * CHANNELS, CHANNELS)]
                    plgpu.copy_gmem_to_smem(source, smem.w.at[slot], barriers.ready.at[slot])

            for slot in range(stages):  # every completion of a barrier must be awaited, the last one too
                plgpu.barrier_wait(barriers.free.at[slot])

        def consume() -> None:
            warpgroup = lax.axis_index("warpgroup")
            own = pl.ds(token_tile * TOKENS + warpgroup * HALF, HALF)
            half = pl.ds(warpgroup * HALF, HALF)
            plgpu.barrier_wait(barriers.x_ready)

            def product(slot: Array, leave_last: Callable[[int], Array] | None, acc: Ref) -> tuple[Array, ...]:
                """The next slot, a tile, and the shares of the parts of the last tile, which leave meanwhile."""
                previous, shares = slot, []
                for step in range(steps):
                    plgpu.barrier_wait(barriers.ready.at[slot])
                    plgpu.wgmma(acc, smem.x.at[step, half], smem.w.at[slot].transpose((1, 0)))
                    for part in range(PARTS):
                        if leave_last and step == steps * (part + 1) // (PARTS + 1):
                            shares.append(leave_last(part))
                    if step:
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(barriers.free.at[previous])
                    previous, slot = slot, jnp.where(slot == stages - 1, 0, slot + 1)
                # An accumulator's registers are single, but bfloat16 is rounded in pairs.
                value = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)
                plgpu.barrier_arrive(barriers.free.at[previous])
                return slot, value, *shares

            def multiply(slot: Array, leave_last: Callable[[int], Array] | None = None) -> tuple[Array, ...]:
                acc = plgpu.ACC((HALF, WORDS), jnp.float32)
                return pl.run_scoped(functools.partial(product, slot, leave_last), acc)

            def leave(i: Array, value: Array, part: int) -> Array:
                """Write a part of the i-th tile, and give its share of the totals."""
                z_part = value[:, part * PART : (part + 1) * PART].astype(jnp.bfloat16) * jnp.bfloat16(unscale)
                # Or the compiler would round each value again for the exponential.
                z_part = lax.optimization_barrier(z_part)
                buffer = smem.z.at[warpgroup, part]
                plgpu.wait_smem_to_gmem(PARTS - 1, wait_read_only=True)
                buffer[...] = z_part
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(buffer, z.at[own, pl.ds((first_tile + i) * WORDS + part * PART, PART)])
                return jnp.exp2(squash(z_part.astype(jnp.float32)) * HALF_CAP_LOG2 - HALF_CAP_LOG2).sum(axis=1)

            def one_tile(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                slot, total, last = carry
                slot, value, *shares = multiply(slot, functools.partial(leave, i - 1, last))
                return slot, sum(shares, start=total), value

            zero = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), ROW)
            slot, value = multiply(first_slot)
            _, total, value = lax.fori_loop(1, tiles, one_tile, (slot, zero, value))
            smem.total[warpgroup] = sum((leave(tiles - 1, value, part) for part in range(PARTS)), start=total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem.total.at[warpgroup], totals.at[split, own])
            plgpu.wait_smem_to_gmem(0)

        split_roles(produce, consume, HopperConfig(stages=stages))

    return launch(
        body,
        "head_logits",
        (
            jax.ShapeDtypeStruct((length, vocabulary), jnp.bfloat16),
            jax.ShapeDtypeStruct((splits, length), jnp.float32),
        ),
        dict(
            smem=Buffers(
                x=tile(steps, TOKENS, CHANNELS, dtype=jnp.float8_e4m3fn),
                w=tile(stages, WORDS, CHANNELS, dtype=jnp.float8_e4m3fn),
                z=tile(WARPGROUPS, PARTS, HALF, PART, dtype=jnp.bfloat16),
                total=plgpu.SMEM((WARPGROUPS, HALF), jnp.float32),
            ),
            barriers=Barriers(
                x_ready=plgpu.Barrier(num_arrivals=steps),
                ready=plgpu.Barrier(num_barriers=stages),
                free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            ),
        ),
        programs=token_tiles * splits,
        interpret=interpret,
    )(x_TD, w_VD)
