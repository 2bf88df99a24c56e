"""Forward block-sparse attention on Hopper: one pass over the listed key blocks with a running softmax.

A program owns 128 queries of one head at a time, split over two compute
warpgroups, and a third warpgroup that only issues copies:

    producer          K0 V0  K1 V1  K2 V2 ...      (a ring of `stages` K/V tiles)
                       |      |      |
    warpgroup 0       q   0- 63  x  128 keys  ->  softmax  ->  x V, into o
    warpgroup 1       q  64-127  x  128 keys  ->  softmax  ->  x V, into o

    keys        ....  [ 0 ][ 1 ][ 2 ][ 3 ][ 4 ]         entries of row 4, nearest
    queries 4                F    F    P    P           first: 4 P, 3 P, 2 F, 1 F

Partial blocks (P) compare documents and positions, full blocks (F) do not.
While one warpgroup does its softmax the other has the tensor cores. Queries
and output share one of `slots` buffers, so that the next tile's queries
arrive, and its keys start to, before this tile's output has left.

The softmax works in base 2: p = 2^(c s - m) with c = scale log2(e). Its maximum
starts at a finite number, so a row that has seen nothing yet stays free of NaN.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import (
    COMPUTE_WARPGROUPS,
    FORWARD,
    HALF,
    KEY_BLOCK,
    PRODUCER,
    QUERY_BLOCK,
    THREADS,
    HopperConfig,
)
from .attention_hopper_ops import COLUMN, ROW, columns, interpreter_buffers, multiply_add, rows, tile, with_accumulators
from .attention_hopper_walk import ENTRY_BITS, HEADER, PARTIAL_BIT

LOWEST = -1e30


def forward(
    q_THK: Array,
    k_THK: Array,
    v_THK: Array,
    documents_T: Array,
    walk: Array,
    *,
    scale: float,
    interpret: bool,
    config: HopperConfig = FORWARD,
) -> tuple[Array, Array]:
    """Attention output (T, H, K) bf16 and log2-sum-exp2 of the scaled scores (H, T) float32.

    Rows that see nothing give 0 in both. `walk` is `Walks.by_query`.
    """
    length, heads, width = q_THK.shape
    tiles = walk.shape[0] * heads
    return plgpu.kernel(
        functools.partial(_body, scale=scale, config=config),
        out_type=(
            jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype),
            jax.ShapeDtypeStruct((heads, length), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
            k_smem=tile(config.stages, KEY_BLOCK, width),
            v_smem=tile(config.stages, KEY_BLOCK, width),
            query_documents=plgpu.SMEM((config.slots, QUERY_BLOCK), jnp.int32),
            key_documents=plgpu.SMEM((config.stages, KEY_BLOCK), jnp.int32),
            lse_smem=plgpu.SMEM((COMPUTE_WARPGROUPS, HALF), jnp.float32),
            q_ready=plgpu.Barrier(num_arrivals=3, num_barriers=config.slots),
            q_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=config.slots),
            k_ready=plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            k_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=config.stages),
            v_ready=plgpu.Barrier(num_barriers=config.stages),
            v_free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=config.stages),
            accumulators=interpreter_buffers((HALF, width), interpret=interpret),
        ),
        grid=(pl.cdiv(tiles, config.tiles),),
        grid_names=("program",),
        num_threads=THREADS,
        thread_name="warpgroup",
        kernel_name="block_sparse_attention_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(q_THK, k_THK, v_THK, documents_T, walk)


class Tile(NamedTuple):
    """Where a program stands: its tile's number, the walk's row behind it, and the steps done before."""

    index: Array
    rank: Array
    row: Array
    head: Array
    steps: Array
    first_step: Array


def _body(q, k, v, documents, walk, o, lse, *, scale, config, **scratch) -> None:
    @pl.when(lax.axis_index("warpgroup") == PRODUCER)
    def _producer() -> None:
        plgpu.set_max_registers(config.producer_registers, action="decrease")
        _produce(q, k, v, documents, walk, config=config, **scratch)

    @pl.when(lax.axis_index("warpgroup") != PRODUCER)
    def _consumer() -> None:
        plgpu.set_max_registers(config.compute_registers, action="increase")
        _consume(walk, o, lse, scale=scale, config=config, **scratch)


def for_each_tile(walk: jax.Ref, heads: int, tiles: int, body: Callable[[Tile], None]) -> tuple[Array, Array]:
    """Run `body` on each tile of this program, the same in every warpgroup; returns their number and their steps."""
    first = lax.axis_index("program") * tiles
    count = jnp.minimum(tiles, walk.shape[0] * heads - first)

    def one(index: Array, first_step: Array) -> Array:
        rank, head = lax.div(first + index, heads), lax.rem(first + index, heads)
        steps = walk[rank, 1]
        body(Tile(index, rank, walk[rank, 0], head, steps, first_step))
        return first_step + steps

    return count, lax.fori_loop(0, count, one, jnp.int32(0))


def _produce(
    q, k, v, documents, walk, *, config, q_smem, k_smem, v_smem, query_documents, key_documents,
    q_ready, q_free, k_ready, k_free, v_ready, v_free, lse_smem, accumulators,
) -> None:
    """Copy the queries of each tile, then the keys and values of each entry, as buffers come free."""

    def one_tile(tile: Tile) -> None:
        index, rank, row, head, steps, first_step = tile
        slot = lax.rem(index, config.slots)

        @pl.when(index >= config.slots)
        def _reuse() -> None:
            plgpu.barrier_wait(q_free.at[slot])

        for half in range(COMPUTE_WARPGROUPS):
            queries = pl.ds(row * QUERY_BLOCK + half * HALF, HALF)
            plgpu.copy_gmem_to_smem(q.at[queries, head], q_smem.at[slot, half], q_ready.at[slot])
        queries = pl.ds(row * QUERY_BLOCK, QUERY_BLOCK)
        plgpu.copy_gmem_to_smem(documents.at[queries], query_documents.at[slot], q_ready.at[slot])

        @pl.loop(0, steps)
        def _step(i) -> None:
            step = first_step + i
            stage = lax.rem(step, config.stages)
            keys = pl.ds((walk[rank, HEADER + i] >> ENTRY_BITS) * KEY_BLOCK, KEY_BLOCK)
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(k_free.at[stage]))
            plgpu.copy_gmem_to_smem(k.at[keys, head], k_smem.at[stage], k_ready.at[stage])
            plgpu.copy_gmem_to_smem(documents.at[keys], key_documents.at[stage], k_ready.at[stage])
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(v_free.at[stage]))
            plgpu.copy_gmem_to_smem(v.at[keys, head], v_smem.at[stage], v_ready.at[stage])

    tiles, steps = for_each_tile(walk, q.shape[1], config.tiles, one_tile)
    for slot in range(config.slots):
        pl.when(slot < tiles)(functools.partial(plgpu.barrier_wait, q_free.at[slot]))
    for stage in range(config.stages):
        pl.when(stage < steps)(functools.partial(plgpu.barrier_wait, k_free.at[stage]))
        pl.when(stage < steps)(functools.partial(plgpu.barrier_wait, v_free.at[stage]))


def _consume(
    walk, o, lse, *, scale, config, q_smem, k_smem, v_smem, query_documents, key_documents,
    q_ready, q_free, k_ready, k_free, v_ready, v_free, lse_smem, accumulators,
) -> None:
    """Compute 64 rows of each tile."""
    warpgroup = lax.axis_index("warpgroup")
    width = q_smem.shape[-1]
    c = scale * math.log2(math.e)

    def one_tile(tile: Tile) -> None:
        index, rank, row, head, steps, first_step = tile
        slot = lax.rem(index, config.slots)
        first_query = row * QUERY_BLOCK + warpgroup * HALF
        own = pl.ds(first_query, HALF)
        q_tile = q_smem.at[slot, warpgroup]
        plgpu.barrier_wait(q_ready.at[slot])
        documents_q = plgpu.load(query_documents.at[slot, pl.ds(warpgroup * HALF, HALF)], layout=ROW)
        position_q = first_query + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROW)

        def visible(scores: Array, key_block: Array, stage: Array) -> Array:
            documents_k = plgpu.load(key_documents.at[stage], layout=COLUMN)
            position_k = key_block * KEY_BLOCK + plgpu.broadcasted_iota(jnp.int32, (KEY_BLOCK,), 0, layout=COLUMN)
            same_document = rows(documents_q, scores) == columns(documents_k, scores)
            return same_document & (columns(position_k, scores) <= rows(position_q, scores))

        def attend(o_acc: jax.Ref) -> None:
            def one_step(i, carry):
                maximum, total = carry
                stage = lax.rem(first_step + i, config.stages)
                entry = walk[rank, HEADER + i]

                def score(s_acc: jax.Ref) -> Array:
                    plgpu.wgmma(s_acc, q_tile, k_smem.at[stage].transpose((1, 0)))
                    return s_acc[...]

                plgpu.barrier_wait(k_ready.at[stage])
                s = pl.run_scoped(score, plgpu.ACC((HALF, KEY_BLOCK), jnp.float32))
                s = lax.cond(
                    (entry >> PARTIAL_BIT) & 1 == 1,
                    lambda: jnp.where(visible(s, entry >> ENTRY_BITS, stage), s, -jnp.inf),
                    lambda: s,
                )
                plgpu.barrier_arrive(k_free.at[stage])
                new_maximum = jnp.maximum(maximum, s.max(axis=1) * c)
                rescale = jnp.exp2(maximum - new_maximum)
                p = jnp.exp2(s * c - rows(new_maximum, s))
                total = total * rescale + p.sum(axis=1)
                o_value = o_acc[...]
                o_acc[...] = o_value * rows(rescale, o_value)
                plgpu.barrier_wait(v_ready.at[stage])
                multiply_add(o_acc, p.astype(jnp.bfloat16), v_smem.at[stage], interpret=bool(accumulators))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(v_free.at[stage])
                return new_maximum, total

            start = plgpu.layout_cast(jnp.full((HALF,), LOWEST, jnp.float32), ROW)
            zero = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), ROW)
            maximum, total = lax.fori_loop(0, steps, one_step, (start, zero))

            sees = total > 0
            o_value = o_acc[...]
            inverse = jnp.where(sees, 1 / jnp.where(sees, total, 1.0), 0.0)
            q_tile[...] = (o_value * rows(inverse, o_value)).astype(jnp.bfloat16)
            lse_smem[warpgroup] = jnp.where(sees, maximum + jnp.log(jnp.where(sees, total, 1.0)) * math.log2(math.e), 0.0)

        with_accumulators(attend, (HALF, width), buffers=accumulators)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, o.at[own, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse.at[head, own])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(q_free.at[slot])

    for_each_tile(walk, o.shape[1], config.tiles, one_tile)
