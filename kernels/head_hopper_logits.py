"""The head's FP8 matrix product on Hopper, with the sum of the softmax taken while a tile is in registers.

A program owns 128 tokens, whose x stays in shared memory, and walks along the words: two compute
warpgroups of 64 tokens, and a third one that only issues copies:

    producer         W00 W01 .. W05  W10 W11 .. W15  W20 ...     (a ring of tiles, 128 words x 128 channels)

    warpgroup 0      | x W0^T |  z0, exp    | x W1^T |  z1, exp    | x W2^T | ..        tokens  0- 63
    warpgroup 1               | x W0^T |  z0, exp    | x W1^T |  z1, exp    | ..        tokens 64-127

so the logits are written but not read again for the loss. The warpgroups take turns at the tensor cores: the
exponentials of a tile take about as long as its product, and would otherwise run after it. For that a ring must
hold all channels of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import MULTIPROCESSORS, HopperConfig
from .attention_hopper_ops import ROW, Ref, launch, split_roles
from .head_hopper_ops import CAP_LOG2, gate, run_of_tiles, shared_tile

WARPGROUPS = 2
HALF = 64
TOKENS = WARPGROUPS * HALF
WORDS = 128
CHANNELS = 128  # of a step: one row of swizzled shared memory
MAX_WIDTH = 768  # x, a ring that holds a tile, and z: 96 + 96 + 32 of 227 KiB


class Buffers(NamedTuple):
    x: Ref  # (step, tokens, channels) e4m3
    w: Ref  # (step, words, channels) e4m3
    z: Ref  # (warpgroup, tokens, words) bf16
    total: Ref  # (warpgroup, tokens) float32


class Barriers(NamedTuple):
    x_ready: Ref
    ready: Ref  # the words' channels of a step are there
    free: Ref  # both warpgroups are done with them
    turn: Ref  # a warpgroup may use the tensor cores


def logits_and_totals(
    x_TD: Array, w_VD: Array, *, unscale: float, splits: int | None = None, interpret: bool
) -> tuple[Array, Array]:
    """z = `unscale` x W^T, (T, V) bf16, and sums of exp(capped logit - 30) over parts of V, (parts, T) float32.

    Args:
      x_TD, w_VD: e4m3; T and V multiples of 128, D of 128 and at most 768.
      unscale: what takes the operands' scales out.
      splits: programs that share a row of logits; by default as many as fill the device.
    """
    length, width = x_TD.shape
    vocabulary = w_VD.shape[0]
    steps, word_tiles = width // CHANNELS, vocabulary // WORDS
    splits = splits or max(1, min(word_tiles, MULTIPROCESSORS // (length // TOKENS)))

    def body(x: Ref, w: Ref, z: Ref, totals: Ref, *, smem: Buffers, barriers: Barriers) -> None:
        program = lax.axis_index("program")
        token_tile, split = lax.div(program, splits), lax.rem(program, splits)
        first_tile, tiles = run_of_tiles(split, splits, word_tiles)

        def produce() -> None:
            own = pl.ds(token_tile * TOKENS, TOKENS)
            for step in range(steps):
                plgpu.copy_gmem_to_smem(x.at[own, pl.ds(step * CHANNELS, CHANNELS)], smem.x.at[step], barriers.x_ready)

            @pl.loop(0, tiles)
            def _tile(tile: Array) -> None:
                words = pl.ds((first_tile + tile) * WORDS, WORDS)
                for step in range(steps):
                    pl.when(tile > 0)(functools.partial(plgpu.barrier_wait, barriers.free.at[step]))
                    source = w.at[words, pl.ds(step * CHANNELS, CHANNELS)]
                    plgpu.copy_gmem_to_smem(source, smem.w.at[step], barriers.ready.at[step])

            for step in range(steps):  # every completion of a barrier must be awaited, the last one too
                plgpu.barrier_wait(barriers.free.at[step])

        def consume() -> None:
            warpgroup = lax.axis_index("warpgroup")
            own = pl.ds(token_tile * TOKENS + warpgroup * HALF, HALF)
            half = pl.ds(warpgroup * HALF, HALF)
            plgpu.barrier_wait(barriers.x_ready)

            def product(acc: Ref) -> Array:
                for step in range(steps):
                    plgpu.barrier_wait(barriers.ready.at[step])
                    plgpu.wgmma(acc, smem.x.at[step, half], smem.w.at[step].transpose((1, 0)))
                    if step:
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(barriers.free.at[step - 1])
                plgpu.barrier_arrive(barriers.turn.at[1 - warpgroup])
                value = acc[...]
                plgpu.barrier_arrive(barriers.free.at[steps - 1])
                return value

            def one_tile(tile: Array, total: Array) -> Array:
                pl.when((tile > 0) | (warpgroup == 1))(lambda: plgpu.barrier_wait(barriers.turn.at[warpgroup]))
                acc = pl.run_scoped(product, plgpu.ACC((HALF, WORDS), jnp.float32))
                # An accumulator's registers are single, but bfloat16 is rounded in pairs. The barrier keeps the
                # compiler from rounding each value again for the exponential.
                z_tile = plgpu.layout_cast(acc * unscale, plgpu.Layout.WGMMA).astype(jnp.bfloat16)
                z_tile = lax.optimization_barrier(z_tile)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                smem.z[warpgroup] = z_tile
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem.z.at[warpgroup], z.at[own, pl.ds((first_tile + tile) * WORDS, WORDS)])
                weights = jnp.exp2(gate(z_tile.astype(jnp.float32)) * CAP_LOG2 - CAP_LOG2)
                return total + weights.sum(axis=1)

            zero = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), ROW)
            smem.total[warpgroup] = lax.fori_loop(0, tiles, one_tile, zero)
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(barriers.turn.at[0]))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem.total.at[warpgroup], totals.at[split, own])
            plgpu.wait_smem_to_gmem(0)

        split_roles(produce, consume, HopperConfig(stages=steps))

    return launch(
        body,
        "head_logits",
        (
            jax.ShapeDtypeStruct((length, vocabulary), jnp.bfloat16),
            jax.ShapeDtypeStruct((splits, length), jnp.float32),
        ),
        dict(
            smem=Buffers(
                x=shared_tile(steps, TOKENS, CHANNELS, dtype=jnp.float8_e4m3fn),
                w=shared_tile(steps, WORDS, CHANNELS, dtype=jnp.float8_e4m3fn),
                z=shared_tile(WARPGROUPS, HALF, WORDS, dtype=jnp.bfloat16),
                total=plgpu.SMEM((WARPGROUPS, HALF), jnp.float32),
            ),
            barriers=Barriers(
                x_ready=plgpu.Barrier(num_arrivals=steps),
                ready=plgpu.Barrier(num_barriers=steps),
                free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=steps),
                turn=plgpu.Barrier(num_barriers=WARPGROUPS),
            ),
        ),
        programs=length // TOKENS * splits,
        interpret=interpret,
    )(x_TD, w_VD)
