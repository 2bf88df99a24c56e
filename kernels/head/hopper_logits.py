"""The head's FP8 matmul on Hopper, with the sum of the softmax taken while a tile is in registers.

A program owns 128 tokens, whose x stays in shared memory, and walks along the vocab, 128 ids at a time. Two compute
warpgroups of 64 tokens, of which the first also fills the ring of steps, 128 ids x 128 channels (pipeline.py):

    warpgroup 0      | x W0^T |  x W1^T   |  x W2^T   | ..        tokens  0- 63
                              |  z0, exp  |  z1, exp  | ..
    warpgroup 1      the same, some time later or earlier         tokens 64-127

so the logits are written but not read again for the loss. The exponentials of a tile take about as long as its matmul,
so they must not wait for each other: a warpgroup starts a step of the next tile's matmul, and turns to the last one's
exponentials while the tensor cores work. For that its registers hold two tiles.

Measured for 65,536 x 50,304 logits of 768 channels on an H100: 4.99 ms. When clusters of two or four programs shared W,
5.02 and 9.22 ms; with tiles of 192 ids in clusters of two, 5.50. One tile in registers, with one warpgroup held back
so that it multiplies while the other writes, took 4.94 ms in clusters of two: 1 % for two more kinds of barrier.

Barriers: those of the ring (hopper/pipeline.py), and one on which both warpgroups wait once, for x. A step is let go
when the tile's next one has been issued, or the tile is done. That takes two slots, or one where a tile is one step;
the ring is never shorter.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from ..hopper.config import MULTIPROCESSORS, WARPGROUP_ROWS, WARPGROUPS
from ..hopper.pipeline import Ring, Steps, is_filler, ring_barriers
from ..hopper.primitives import ROW, Ref, launch, tile
from .numerics import HALF_CAP_LOG2, squash

TOKENS = WARPGROUPS * WARPGROUP_ROWS
VOCAB_TILE = 128
CHANNELS = 128  # of a step: one row of swizzled shared memory
STAGES = 6  # steps of W in shared memory
MAX_WIDTH = 768  # x, the ring, and the parts of z on their way: 96 + 96 + 32 of 227 KiB
PART = 64  # ids that leave at a time: one row of swizzled shared memory
PARTS = VOCAB_TILE // PART


class Buffers(NamedTuple):
    x: Ref  # (step, tokens, channels) e4m3
    w: Ref  # (stage, ids, channels) e4m3
    z: Ref  # (warpgroup, part, tokens, ids) bf16
    total: Ref  # (warpgroup, tokens) float32


class Barriers(NamedTuple):
    x_ready: Ref
    ring: list[Ref]


def logits_and_totals(x_TD: Array, w_VD: Array, *, unscale: float, splits: int | None = None) -> tuple[Array, Array]:
    """Return z = `unscale` x W^T, (T, V) bf16, and sums of exp(capped logit - 30) over parts of V, (parts, T) float32.

    Args:
      x_TD, w_VD: e4m3; T and V multiples of 128, D of 128 and at most 768.
      unscale: what takes the operands' scales out; a power of two.
      splits: programs that share a row of logits; by default as many as fill the device.
    """
    length, width = x_TD.shape
    vocab_size = w_VD.shape[0]
    steps, token_tiles, vocab_tiles = width // CHANNELS, length // TOKENS, vocab_size // VOCAB_TILE
    stages = min(STAGES, steps)
    splits = splits or max(1, min(vocab_tiles, MULTIPROCESSORS // token_tiles))

    def body(x: Ref, w: Ref, z: Ref, totals: Ref, *, smem: Buffers, barriers: Barriers) -> None:
        program = lax.axis_index("program")
        token_tile, split = lax.div(program, splits), lax.rem(program, splits)
        first_tile, tiles = run_of_tiles(split, splits, vocab_tiles)
        run = Run(first_tile, tiles, steps, token_tile)
        warpgroup = lax.axis_index("warpgroup")
        ready, free = barriers.ring
        ring = Ring(ready, free, lax.rem(program, stages))
        run_steps = Steps(ring, tiles * steps, functools.partial(_copy_step, run, w, smem))
        tokens = pl.ds(token_tile * TOKENS + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        pl.when(is_filler())(functools.partial(_copy_x, run, x, smem, barriers.x_ready))
        run_steps.start()
        plgpu.barrier_wait(barriers.x_ready)
        smem.total[warpgroup] = Consumer(run, smem, run_steps, z, unscale, warpgroup, tokens, rows).all_tiles()
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.total.at[warpgroup], totals.at[split, tokens])
        plgpu.wait_smem_to_gmem(0)
        ring.drain(run_steps.total)

    return launch(
        body,
        "head_logits",
        (
            jax.ShapeDtypeStruct((length, vocab_size), jnp.bfloat16),
            jax.ShapeDtypeStruct((splits, length), jnp.float32),
        ),
        dict(
            smem=Buffers(
                x=tile(steps, TOKENS, CHANNELS, dtype=jnp.float8_e4m3fn),
                w=tile(stages, VOCAB_TILE, CHANNELS, dtype=jnp.float8_e4m3fn),
                z=tile(WARPGROUPS, PARTS, WARPGROUP_ROWS, PART, dtype=jnp.bfloat16),
                total=plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
            ),
            barriers=Barriers(
                x_ready=plgpu.Barrier(num_arrivals=steps),
                ring=ring_barriers(1, stages),
            ),
        ),
        programs=token_tiles * splits,
    )(x_TD, w_VD)


class Run(NamedTuple):
    """What a program does: `tiles` tiles of the vocab, from number `first_tile` on, for 128 tokens."""

    first_tile: Array
    tiles: Array
    steps: int  # of a tile
    token_tile: Array


def _copy_x(run: Run, x: Ref, smem: Buffers, ready: Ref) -> None:
    own = pl.ds(run.token_tile * TOKENS, TOKENS)
    for step in range(run.steps):
        plgpu.copy_gmem_to_smem(x.at[own, pl.ds(step * CHANNELS, CHANNELS)], smem.x.at[step], ready)


def _copy_step(run: Run, w: Ref, smem: Buffers, number: Array, slot: Array, ready: Ref) -> None:
    """Start the copy of a program's step `number`, counted through all of its tiles."""
    ids = pl.ds((run.first_tile + lax.div(number, run.steps)) * VOCAB_TILE, VOCAB_TILE)
    channels = pl.ds(lax.rem(number, run.steps) * CHANNELS, CHANNELS)
    plgpu.copy_gmem_to_smem(w.at[ids, channels], smem.w.at[slot], ready)


class Consumer(NamedTuple):
    """A warpgroup: multiplies its 64 tokens with each tile of the run, and sums the exponentials of the last one."""

    run: Run
    smem: Buffers
    steps: Steps
    z: Ref
    unscale: float
    warpgroup: Array
    tokens: pl.Slice  # of the sequence
    rows: pl.Slice  # of the tile, the same tokens

    def all_tiles(self) -> Array:
        """Write the logits; return each token's sum of exp(capped logit - 30)."""

        def one_tile(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            slot, total, last = carry
            slot, value, *sums = self.multiply(i, slot, functools.partial(self.store, i - 1, last))
            return slot, sum(sums, start=total), value

        zero = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW)
        slot, value = self.multiply(jnp.int32(0), self.steps.ring.first)
        _, total, value = lax.fori_loop(1, self.run.tiles, one_tile, (slot, zero, value))
        return sum((self.store(self.run.tiles - 1, value, part) for part in range(PARTS)), start=total)

    def multiply(self, i: Array, slot: Array, store_last: Callable[[int], Array] | None = None) -> tuple[Array, ...]:
        """Return the next slot, the i-th tile, and the sums of the last one's parts, which `store_last` writes."""
        steps = self.run.steps

        def into(acc: Ref) -> tuple[Array, ...]:
            previous, current, sums = slot, slot, []
            for step in range(steps):
                self.steps.ring.wait(current)
                plgpu.wgmma(acc, self.smem.x.at[step, self.rows], self.smem.w.at[current].transpose((1, 0)))
                for part in range(PARTS):
                    if store_last and step == steps * (part + 1) // (PARTS + 1):
                        sums.append(store_last(part))
                if step:
                    plgpu.wgmma_wait(1)
                    self.steps.release(i * steps + step - 1, previous)
                previous, current = current, self.steps.ring.after(current)
            # An accumulator's registers are single, but bfloat16 is rounded in pairs.
            value = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)
            self.steps.release(i * steps + steps - 1, previous)
            return current, value, *sums

        return pl.run_scoped(into, plgpu.ACC((WARPGROUP_ROWS, VOCAB_TILE), jnp.float32))

    def store(self, i: Array, value: Array, part: int) -> Array:
        """Write a part of the i-th tile, and return its sums."""
        z_part = value[:, part * PART : (part + 1) * PART].astype(jnp.bfloat16) * jnp.bfloat16(self.unscale)
        # Or the compiler would round each value again for the exponential.
        z_part = lax.optimization_barrier(z_part)
        buffer = self.smem.z.at[self.warpgroup, part]
        plgpu.wait_smem_to_gmem(PARTS - 1, wait_read_only=True)
        buffer[...] = z_part
        plgpu.commit_smem()
        ids = pl.ds((self.run.first_tile + i) * VOCAB_TILE + part * PART, PART)
        plgpu.copy_smem_to_gmem(buffer, self.z.at[self.tokens, ids])
        return jnp.exp2(squash(z_part.astype(jnp.float32)) * HALF_CAP_LOG2 - HALF_CAP_LOG2).sum(axis=1)


def run_of_tiles(run: Array, runs: int, tiles: int) -> tuple[Array, Array]:
    """Return the first tile and the number of tiles of one of `runs` nearly equal runs."""
    first = lax.div(run * tiles, runs)
    return first, lax.div((run + 1) * tiles, runs) - first
