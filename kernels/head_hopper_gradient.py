"""Gradient of the head's loss in its logits, on Hopper: one pass over the logits, both FP8 layouts written.

FP8 tensor cores contract only along the contiguous axis of both operands. dx = dz W contracts
words and dW = dz^T x tokens, so dz is needed twice, once with each axis contiguous:

    z (64 tokens x 64 words)   ->  registers  ->  dz, bf16  ->  e5m2  ->  dz   (tokens, words)
                                                     |
                                             shared memory, turned  ->  e5m2  ->  dz^T (words, tokens)

Shared memory turns 16-bit values at no cost (`stmatrix`, `ldmatrix`) but no 8-bit ones, hence the detour in
bfloat16, through which the recipe rounds in any case.

A program is one warpgroup that walks along the words of 64 tokens; while it works on a tile the
next one arrives, and three programs share a multiprocessor.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_ops import COLUMN, ROW, Ref, columns, positions, rows
from .head_hopper_ops import CAP_LOG2, gate, run_of_tiles, shared_tile
from .head_loss import CAP, GRADIENT_SCALE, TEMPERATURE

TOKENS = 64
WORDS = 64
SLOTS = 3
FP8 = plgpu.Layout.WGMMA_8BIT  # a thread's values lie four in a row


class Buffers(NamedTuple):
    z: Ref  # (slot, tokens, words) bf16
    turned: Ref  # (words, tokens) bf16
    d_z: Ref  # (tokens, words) e5m2
    d_z_turned: Ref  # (words, tokens) e5m2


def logit_gradient(
    z_TV: Array, log2_total_T: Array, targets_T: Array, *, tiles_a_program: int = 16, interpret: bool
) -> tuple[Array, Array]:
    """e5m2 of 2^13 dloss/dz, as (T, V) and as (V, T).

    Args:
      z_TV: bfloat16 logits before the cap; T and V multiples of 64.
      log2_total_T: log2 of the sum over V of exp(capped logit - 30).
      targets_T: int32 ids.
      tiles_a_program: longest run of tiles of 64 words for one program.
    """
    length, vocabulary = z_TV.shape
    word_tiles = vocabulary // WORDS
    runs = pl.cdiv(word_tiles, tiles_a_program)

    def body(z: Ref, log2_total: Ref, targets: Ref, d_z: Ref, d_z_turned: Ref, smem: Buffers, ready: Ref) -> None:
        program = lax.axis_index("program")
        own = pl.ds(lax.div(program, runs) * TOKENS, TOKENS)
        first, count = run_of_tiles(lax.rem(program, runs), runs, word_tiles)

        def fetch(i: Array) -> None:
            slot = lax.rem(i, SLOTS)
            plgpu.copy_gmem_to_smem(z.at[own, pl.ds((first + i) * WORDS, WORDS)], smem.z.at[slot], ready.at[slot])

        log2_total_row = plgpu.load(log2_total.at[own], layout=ROW, optimized=False)
        target_row = plgpu.load(targets.at[own], layout=ROW, optimized=False)
        for i in range(SLOTS):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))

        @pl.loop(0, count)
        def _tile(i: Array) -> None:
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(ready.at[slot])
            z_tile = plgpu.load(smem.z.at[slot], layout=plgpu.Layout.WGMMA)
            d_z_tile = _gradient(z_tile, log2_total_row, target_row, (first + i) * WORDS)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem.turned.transpose((1, 0))[...] = d_z_tile
            smem.d_z[...] = d_z_tile.astype(jnp.float32).astype(jnp.float8_e5m2)
            plgpu.commit_smem()
            # All threads have read the slot.
            pl.when(i + SLOTS < count)(lambda: fetch(i + SLOTS))
            turned = plgpu.load(smem.turned, layout=FP8)
            smem.d_z_turned[...] = turned.astype(jnp.float32).astype(jnp.float8_e5m2)
            plgpu.commit_smem()
            words = pl.ds((first + i) * WORDS, WORDS)
            plgpu.copy_smem_to_gmem(smem.d_z, d_z.at[own, words])
            plgpu.copy_smem_to_gmem(smem.d_z_turned, d_z_turned.at[words, own])

        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((length, vocabulary), jnp.float8_e5m2),
            jax.ShapeDtypeStruct((vocabulary, length), jnp.float8_e5m2),
        ),
        scratch_types=dict(
            smem=Buffers(
                z=shared_tile(SLOTS, TOKENS, WORDS, dtype=jnp.bfloat16),
                turned=shared_tile(WORDS, TOKENS, dtype=jnp.bfloat16),
                d_z=shared_tile(TOKENS, WORDS, dtype=jnp.float8_e5m2),
                d_z_turned=shared_tile(WORDS, TOKENS, dtype=jnp.float8_e5m2),
            ),
            ready=plgpu.Barrier(num_barriers=SLOTS),
        ),
        grid=(length // TOKENS * runs,),
        grid_names=("program",),
        kernel_name="head_logit_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(z_TV, log2_total_T, targets_T)


def _gradient(z: Array, log2_total: Array, target: Array, first_word: Array) -> Array:
    """2^13 (softmax - one hot) times the slope of the cap, bf16."""
    gate_tile = gate(z.astype(jnp.float32))
    p = jnp.exp2(gate_tile * CAP_LOG2 - rows(log2_total + CAP_LOG2, z.shape))
    words = columns(positions(first_word, WORDS, COLUMN), z.shape)
    p = jnp.where(words == rows(target, z.shape), p - 1, p)
    return (p * (gate_tile * (1 - gate_tile)) * (CAP / TEMPERATURE)).astype(jnp.bfloat16) * jnp.bfloat16(GRADIENT_SCALE)
