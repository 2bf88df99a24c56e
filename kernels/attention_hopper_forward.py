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

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import COMPUTE_WARPGROUPS, FORWARD, HALF, KEY_BLOCK, QUERY_BLOCK, HopperConfig
from .attention_hopper_ops import (
    COLUMN,
    ROW,
    columns,
    interpreter_buffers,
    launch,
    multiply_add,
    rows,
    split_roles,
    tile,
    with_accumulators,
)
from .attention_hopper_producer import Ring, Tile, for_each_tile, produce
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
    free = functools.partial(plgpu.Barrier, num_arrivals=COMPUTE_WARPGROUPS)

    def body(q, k, v, documents, walk, o, lse, *, buffers, barriers, lse_smem, accumulators) -> None:
        q_smem, query_documents, k_smem, key_documents, v_smem = buffers
        hold = Ring((q, documents), (q_smem, query_documents), *barriers[:2])
        stream_k = Ring((k, documents), (k_smem, key_documents), *barriers[2:4])
        stream_v = Ring((v,), (v_smem,), *barriers[4:])
        split_roles(
            functools.partial(produce, walk, heads, config, hold, [stream_k, stream_v], KEY_BLOCK),
            functools.partial(
                _consume,
                walk,
                o,
                lse,
                hold,
                stream_k,
                stream_v,
                lse_smem,
                scale=scale,
                config=config,
                accumulators=accumulators,
            ),
            config,
        )

    return launch(
        body,
        "block_sparse_attention_forward",
        (jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype), jax.ShapeDtypeStruct((heads, length), jnp.float32)),
        dict(
            buffers=[
                tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                plgpu.SMEM((config.slots, QUERY_BLOCK), jnp.int32),
                tile(config.stages, KEY_BLOCK, width),
                plgpu.SMEM((config.stages, KEY_BLOCK), jnp.int32),
                tile(config.stages, KEY_BLOCK, width),
            ],
            barriers=[
                plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS + 1, num_barriers=config.slots),
                free(num_barriers=config.slots),
                plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
                free(num_barriers=config.stages),
                plgpu.Barrier(num_arrivals=1, num_barriers=config.stages),
                free(num_barriers=config.stages),
            ],
            lse_smem=plgpu.SMEM((COMPUTE_WARPGROUPS, HALF), jnp.float32),
            accumulators=interpreter_buffers((HALF, width), interpret=interpret),
        ),
        programs=pl.cdiv(walk.shape[0] * heads, config.tiles),
        interpret=interpret,
    )(q_THK, k_THK, v_THK, documents_T, walk)


def _consume(walk, o, lse, hold, stream_k, stream_v, lse_smem, *, scale, config, accumulators) -> None:
    """Compute 64 rows of each tile."""
    warpgroup = lax.axis_index("warpgroup")
    q_smem, query_documents = hold.buffers
    k_smem, key_documents = stream_k.buffers
    (v_smem,) = stream_v.buffers
    c = scale * math.log2(math.e)

    def one_tile(at: Tile) -> None:
        slot = lax.rem(at.index, hold.ready.shape[0])
        first_query = at.block * QUERY_BLOCK + warpgroup * HALF
        q_tile = q_smem.at[slot, warpgroup]
        plgpu.barrier_wait(hold.ready.at[slot])
        documents_q = plgpu.load(query_documents.at[slot, pl.ds(warpgroup * HALF, HALF)], layout=ROW)
        position_q = first_query + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROW)

        def mask_out(scores: Array, entry: Array, stage: Array) -> Array:
            documents_k = plgpu.load(key_documents.at[stage], layout=COLUMN)
            first_key = (entry >> ENTRY_BITS) * KEY_BLOCK
            position_k = first_key + plgpu.broadcasted_iota(jnp.int32, (KEY_BLOCK,), 0, layout=COLUMN)
            visible = (rows(documents_q, scores) == columns(documents_k, scores)) & (
                columns(position_k, scores) <= rows(position_q, scores)
            )
            return jnp.where(visible, scores, -jnp.inf)

        def attend(o_acc: jax.Ref) -> None:
            def one_step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                maximum, total = carry
                stage = lax.rem(at.first_entry + i, stream_k.ready.shape[0])
                entry = walk[at.rank, HEADER + i]

                def scores(s_acc: jax.Ref) -> Array:
                    plgpu.wgmma(s_acc, q_tile, k_smem.at[stage].transpose((1, 0)))
                    return s_acc[...]

                plgpu.barrier_wait(stream_k.ready.at[stage])
                s = pl.run_scoped(scores, plgpu.ACC((HALF, KEY_BLOCK), jnp.float32))
                is_partial = (entry >> PARTIAL_BIT) & 1 == 1
                s = lax.cond(is_partial, lambda: mask_out(s, entry, stage), lambda: s)
                plgpu.barrier_arrive(stream_k.free.at[stage])

                new_maximum = jnp.maximum(maximum, s.max(axis=1) * c)
                rescale = jnp.exp2(maximum - new_maximum)
                p = jnp.exp2(s * c - rows(new_maximum, s))
                total = total * rescale + p.sum(axis=1)
                o_value = o_acc[...]
                o_acc[...] = o_value * rows(rescale, o_value)
                plgpu.barrier_wait(stream_v.ready.at[stage])
                multiply_add(o_acc, p.astype(jnp.bfloat16), v_smem.at[stage], interpret=bool(accumulators))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(stream_v.free.at[stage])
                return new_maximum, total

            start = plgpu.layout_cast(jnp.full((HALF,), LOWEST, jnp.float32), ROW)
            zero = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), ROW)
            maximum, total = lax.fori_loop(0, at.entries, one_step, (start, zero))

            sees = total > 0
            safe_total = jnp.where(sees, total, 1.0)
            o_value = o_acc[...]
            q_tile[...] = (o_value * rows(1 / safe_total, o_value)).astype(jnp.bfloat16)
            lse_smem[warpgroup] = jnp.where(sees, maximum + jnp.log(safe_total) * math.log2(math.e), 0.0)

        with_accumulators(attend, q_tile.shape, buffers=accumulators)
        own = pl.ds(first_query, HALF)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, o.at[own, at.head])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse.at[at.head, own])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(hold.free.at[slot])

    for_each_tile(walk, o.shape[1], config, one_tile)
