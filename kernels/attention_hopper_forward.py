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

from .attention_hopper_config import COMPUTE_WARPGROUPS, FORWARD, HALF, KEY_BLOCK, MULTIPROCESSORS, QUERY_BLOCK, HopperConfig
from .attention_hopper_ops import (
    COLUMN,
    ROW,
    columns,
    interpreter_buffers,
    launch,
    multiply_add,
    ring_barriers,
    rows,
    split_roles,
    tile,
    with_accumulators,
)
from .attention_hopper_producer import Copy, Ring, Tile, for_each_tile, halves, produce, release_last
from .attention_hopper_walk import DOCUMENTS_BIT, ENTRY_BITS, HEADER, POSITIONS_BIT, share_out

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
    shares = jnp.asarray(share_out(walk.shape[0] * heads, 1 if interpret else MULTIPROCESSORS))

    def body(q, k, v, documents, walk, shares, o, lse, *, smem, barriers, accumulators, turn) -> None:
        q_smem, query_documents, k_smem, key_documents, v_smem, lse_smem = smem
        hold = Ring(
            [*halves(q, q_smem), Copy(documents, lambda slot: query_documents.at[slot], QUERY_BLOCK)], *barriers[:2]
        )
        stream_k = Ring(
            [
                Copy(k, lambda stage: k_smem.at[stage], KEY_BLOCK),
                Copy(documents, lambda stage: key_documents.at[stage], KEY_BLOCK),
            ],
            *barriers[2:4],
        )
        stream_v = Ring([Copy(v, lambda stage: v_smem.at[stage], KEY_BLOCK)], *barriers[4:])

        def consume() -> None:
            one_tile = functools.partial(
                _one_tile, walk, o, lse, hold, stream_k, stream_v, smem, turn, accumulators, scale
            )
            count, _ = for_each_tile(walk, shares, heads, one_tile)
            release_last(hold, count)

        split_roles(
            functools.partial(produce, walk, shares, heads, hold, [stream_k, stream_v], KEY_BLOCK), consume, config
        )

    return launch(
        body,
        "block_sparse_attention_forward",
        (jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype), jax.ShapeDtypeStruct((heads, length), jnp.float32)),
        dict(
            smem=[
                tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                plgpu.SMEM((config.slots, QUERY_BLOCK), jnp.int32),
                tile(config.stages, KEY_BLOCK, width),
                plgpu.SMEM((config.stages, KEY_BLOCK), jnp.int32),
                tile(config.stages, KEY_BLOCK, width),
                plgpu.SMEM((config.slots, COMPUTE_WARPGROUPS, HALF), jnp.float32),
            ],
            barriers=ring_barriers((COMPUTE_WARPGROUPS + 1, config.slots), (2, config.stages), (1, config.stages)),
            accumulators=interpreter_buffers((HALF, width), interpret=interpret),
            turn=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        ),
        programs=shares.shape[0],
        interpret=interpret,
    )(q_THK, k_THK, v_THK, documents_T, walk, shares)


def _one_tile(walk, o, lse, hold, stream_k, stream_v, smem, turn, accumulators, scale, at: Tile) -> None:
    """Attention of this warpgroup's 64 queries."""
    warpgroup = lax.axis_index("warpgroup")
    q_smem, query_documents, k_smem, key_documents, v_smem, lse_smem = smem
    c = scale * math.log2(math.e)
    slot = hold.slot(at.index)
    first_query = at.block * QUERY_BLOCK + warpgroup * HALF
    q_tile = q_smem.at[slot, warpgroup]
    plgpu.barrier_wait(hold.ready.at[slot])
    documents_q = plgpu.load(query_documents.at[slot, pl.ds(warpgroup * HALF, HALF)], layout=ROW)
    position_q = warpgroup * HALF + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROW)

    def hide_other_documents(s: Array, stage: Array) -> Array:
        documents_k = plgpu.load(key_documents.at[stage], layout=COLUMN)
        return jnp.where(rows(documents_q, s.shape) == columns(documents_k, s.shape), s, -jnp.inf)

    def hide_later_keys(s: Array) -> Array:
        # Positions matter on the diagonal only, where both blocks start at the same token.
        position_k = plgpu.broadcasted_iota(jnp.int32, (KEY_BLOCK,), 0, layout=COLUMN)
        return jnp.where(columns(position_k, s.shape) <= rows(position_q, s.shape), s, -jnp.inf)

    def attend(o_acc: jax.Ref) -> None:
        def one_step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, entry = carry
            stage = stream_k.slot(at.entries_before + i)
            following = walk[at.rank, HEADER + i + 1]

            def scores(s_acc: jax.Ref) -> Array:
                plgpu.wgmma(s_acc, q_tile, k_smem.at[stage].transpose((1, 0)))
                _take_turn(turn)
                return s_acc[...]

            plgpu.barrier_wait(stream_k.ready.at[stage])
            s = pl.run_scoped(scores, plgpu.ACC((HALF, KEY_BLOCK), jnp.float32))
            s = lax.cond(entry & (1 << DOCUMENTS_BIT) != 0, lambda: hide_other_documents(s, stage), lambda: s)
            plgpu.barrier_arrive(stream_k.free.at[stage])
            s = lax.cond(entry & (1 << POSITIONS_BIT) != 0, lambda: hide_later_keys(s), lambda: s)

            new_maximum = jnp.maximum(maximum, s.max(axis=1) * c)
            rescale = jnp.exp2(maximum - new_maximum)
            p = jnp.exp2(s * c - rows(new_maximum, s.shape))
            total = total * rescale + p.sum(axis=1)
            o_value = o_acc[...]
            o_acc[...] = o_value * rows(rescale, o_value.shape)
            # The softmax must be over before the other warpgroup is let on.
            new_maximum, total, p_bf16 = lax.optimization_barrier((new_maximum, total, p.astype(jnp.bfloat16)))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(stream_v.ready.at[stage])
            plgpu.barrier_wait(turn)
            multiply_add(o_acc, p_bf16, v_smem.at[stage], interpret=bool(accumulators))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(stream_v.free.at[stage])
            pl.when(i == 0)(lambda: release_last(hold, at.index))
            return new_maximum, total, following

        start = plgpu.layout_cast(jnp.full((HALF,), LOWEST, jnp.float32), ROW)
        zero = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), ROW)
        pl.when(warpgroup == 1)(lambda: _take_turn(turn))
        maximum, total, _ = lax.fori_loop(0, at.entries, one_step, (start, zero, at.first_entry))
        pl.when(warpgroup == 0)(lambda: _take_turn(turn))
        pl.when(at.entries == 0)(lambda: release_last(hold, at.index))

        sees = total > 0
        safe_total = jnp.where(sees, total, 1.0)
        o_value = o_acc[...]
        q_tile[...] = (o_value * rows(1 / safe_total, o_value.shape)).astype(jnp.bfloat16)
        lse_smem[slot, warpgroup] = jnp.where(sees, maximum + jnp.log(safe_total) * math.log2(math.e), 0.0)

    with_accumulators(attend, q_tile.shape, buffers=accumulators)
    plgpu.commit_smem()
    own = pl.ds(first_query, HALF)
    plgpu.copy_smem_to_gmem(q_tile, o.at[own, at.head])
    plgpu.copy_smem_to_gmem(lse_smem.at[slot, warpgroup], lse.at[at.head, own])


def _take_turn(turn: jax.Ref) -> None:
    """Meet the other warpgroup: they take turns, one at its products, one at its softmax."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)
