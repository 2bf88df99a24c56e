"""Gradient of the head's loss in its logits, on Hopper: one pass over the logits, both FP8 layouts written.

FP8 tensor cores contract only along the contiguous axis of both operands. dx = dz W contracts
the vocab and dW = dz^T x tokens, so dz is needed twice, once with each axis contiguous:

    z (64 tokens x 64 ids)     ->  registers  ->  dz, bf16  ->  e5m2  ->  dz   (tokens, vocab)
                                                     |
                                             shared memory, turned  ->  e5m2  ->  dz^T (vocab, tokens)

Shared memory turns 16-bit values at no cost (`stmatrix`, `ldmatrix`) but no 8-bit ones, hence the detour in
bfloat16, through which the recipe rounds in any case.

A program, one warpgroup, owns 64 tokens and walks along the vocab; while it works on a tile the next ones arrive.
Memory is fastest where long runs are read and written at about the same time, and a tile has only 128 bytes of a row of
z and 64 of a row of each result. So `TOGETHER` neighbouring programs hold neighbouring tokens, and `RUNS` such groups
take turns at the vocab:

    vocab tile          0  1  2  3  4  5  6  7  ...
    tokens    0-  63    a  b  c  a  b  c  a  b  ...      (three runs, of two programs together)
    tokens   64- 127    A  B  C  A  B  C  A  B  ...
    tokens  128- 191    those that start when these have ended
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from ..hopper.primitives import COLUMN, ROW, Ref, columns, kernel, positions, rows, tile
from .numerics import CAP, GRADIENT_SCALE, HALF_CAP_LOG2, TEMPERATURE, squash

TOKENS = 64
VOCAB_TILE = 64
# Their product is what an H100 holds at a time, 4 programs on each of 132 multiprocessors. Measured for 65,536 x 50,304
# logits, TOGETHER and RUNS: 1 and 528 5.23 ms, 4 and 132 5.15, 16 and 33 5.93, 64 and 8 6.52. Programs of four
# warpgroups, one a multiprocessor, were 2 % slower.
TOGETHER = 4
RUNS = 132
SLOTS = 3  # tiles of z on their way to a program
SCALE_LOG2 = math.log2(GRADIENT_SCALE)
FP8 = plgpu.Layout.WGMMA_8BIT  # a thread's values lie four in a row


class Buffers(NamedTuple):
    z: Ref  # (slot, tokens, ids) bf16
    turned: Ref  # (ids, tokens) bf16
    d_z: Ref  # (tokens, ids) e5m2
    d_z_turned: Ref  # (ids, tokens) e5m2


def logit_gradient(z_TV: Array, log2_total_T: Array, targets_T: Array) -> tuple[Array, Array]:
    """Return e5m2 of 2^13 dloss/dz, as (T, V) and as (V, T).

    Args:
      z_TV: bfloat16 logits before the cap; T and V multiples of 64.
      log2_total_T: log2 of the sum over V of exp(capped logit - 30).
      targets_T: int32 ids.
    """
    length, vocab_size = z_TV.shape
    vocab_tiles, token_tiles = vocab_size // VOCAB_TILE, length // TOKENS
    together, runs = math.gcd(TOGETHER, token_tiles), min(RUNS, vocab_tiles)

    def body(z: Ref, log2_total: Ref, targets: Ref, d_z: Ref, d_z_turned: Ref, *, smem: Buffers, ready: Ref) -> None:
        program = lax.axis_index("program")
        group, place = lax.div(program, together * runs), lax.rem(program, together * runs)
        token_tile = group * together + lax.rem(place, together)
        own, first = pl.ds(token_tile * TOKENS, TOKENS), lax.div(place, together)
        count = pl.cdiv(vocab_tiles - first, runs)

        def first_id(i: Array) -> Array:
            return (first + i * runs) * VOCAB_TILE

        def fetch(i: Array, slot: Array | int) -> None:
            plgpu.copy_gmem_to_smem(z.at[own, pl.ds(first_id(i), VOCAB_TILE)], smem.z.at[slot], ready.at[slot])

        offset_row = plgpu.load(log2_total.at[own], layout=ROW, optimized=False) + (HALF_CAP_LOG2 - SCALE_LOG2)
        target_row = plgpu.load(targets.at[own], layout=ROW, optimized=False)
        for i in range(SLOTS):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i), i))

        @pl.loop(0, count, init_carry=jnp.int32(0))
        def _tile(i: Array, slot: Array) -> Array:
            ids = pl.ds(first_id(i), VOCAB_TILE)
            plgpu.barrier_wait(ready.at[slot])
            z_tile = plgpu.load(smem.z.at[slot], layout=plgpu.Layout.WGMMA)
            d_z_tile = _gradient(z_tile, offset_row, target_row, first_id(i))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem.turned.transpose((1, 0))[...] = d_z_tile
            smem.d_z[...] = d_z_tile.astype(jnp.float32).astype(jnp.float8_e5m2)
            plgpu.commit_smem()  # all threads have also read the slot
            plgpu.copy_smem_to_gmem(smem.d_z, d_z.at[own, ids])
            pl.when(i + SLOTS < count)(lambda: fetch(i + SLOTS, slot))
            turned = plgpu.load(smem.turned, layout=FP8)
            smem.d_z_turned[...] = turned.astype(jnp.float32).astype(jnp.float8_e5m2)
            plgpu.commit_smem()  # all threads have also read `turned`
            plgpu.copy_smem_to_gmem(smem.d_z_turned, d_z_turned.at[ids, own])
            return jnp.where(slot == SLOTS - 1, 0, slot + 1)

        plgpu.wait_smem_to_gmem(0)

    return kernel(
        body,
        (
            jax.ShapeDtypeStruct((length, vocab_size), jnp.float8_e5m2),
            jax.ShapeDtypeStruct((vocab_size, length), jnp.float8_e5m2),
        ),
        scratch_types=dict(
            smem=Buffers(
                z=tile(SLOTS, TOKENS, VOCAB_TILE, dtype=jnp.bfloat16),
                turned=tile(VOCAB_TILE, TOKENS, dtype=jnp.bfloat16),
                d_z=tile(TOKENS, VOCAB_TILE, dtype=jnp.float8_e5m2),
                d_z_turned=tile(VOCAB_TILE, TOKENS, dtype=jnp.float8_e5m2),
            ),
            ready=plgpu.Barrier(num_barriers=SLOTS),
        ),
        grid=(token_tiles * runs,),
        grid_names=("program",),
        kernel_name="head_logit_gradient",
        # All barriers are explicit.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(z_TV, log2_total_T, targets_T)


def _gradient(z: Array, offset: Array, target: Array, first_id: Array) -> Array:
    """Return 2^13 (softmax - one hot) times the cap's slope, bf16; the softmax is 2^(c squash(z) - offset - 13)."""
    squashed = squash(z.astype(jnp.float32))
    p = jnp.exp2(squashed * HALF_CAP_LOG2 - rows(offset, z.shape))
    ids = columns(positions(first_id, VOCAB_TILE, COLUMN), z.shape)
    p = jnp.where(ids == rows(target, z.shape), p - GRADIENT_SCALE, p)
    return (p * (CAP / TEMPERATURE / 4 * (1 - squashed * squashed))).astype(jnp.bfloat16)
