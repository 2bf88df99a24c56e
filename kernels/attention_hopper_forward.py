"""Forward block-sparse attention on Hopper: one pass over the listed key blocks with a running softmax.

A program owns 128 queries of one head at a time, split over two compute
warpgroups, and a third warpgroup that only issues copies:

    producer          K0 V0  K1 V1  K2 V2 ...      (a ring of `stages` K/V tiles)
                       |      |      |
    warpgroup 0       q   0- 63  x  128 keys  ->  softmax  ->  x V, into o
    warpgroup 1       q  64-127  x  128 keys  ->  softmax  ->  x V, into o

    keys            [ 0 ][ 1 ][ 2 ][ 3 ][ 4 ]
    queries 4         .    F    F    P    D        the row's entries: 1 F, 2 F, 3 P, 4 D

A full block (F) is used as it is; a partial one compares documents (P), or on
the diagonal (D) positions, or both. The warpgroups take turns: while one is at
its softmax the other has the tensor cores,

    warpgroup 0    Q K  | softmax |  P V   Q K  | softmax |  P V
    warpgroup 1            P V   Q K  | softmax |  P V   Q K  | softmax

and the output of a tile replaces its queries in shared memory.

The softmax works in base 2: p = 2^(c s - m) with c = scale log2(e). Its maximum
starts at a finite number, so a row that has seen nothing yet stays free of NaN.
Source: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) for the two warpgroups in turn.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import BLOCK, COMPUTE_WARPGROUPS, FORWARD, HALF, MULTIPROCESSORS, HopperConfig
from .attention_hopper_ops import (
    COLUMN,
    ROW,
    Ref,
    columns,
    interpreter_buffers,
    launch,
    multiply_add,
    positions,
    ring_barriers,
    rows,
    split_roles,
    tile,
    with_accumulators,
)
from .attention_hopper_producer import Copy, Ring, Tile, for_each_tile, halves, produce, release_last
from .attention_hopper_walk import DOCUMENTS_BIT, HEADER, POSITIONS_BIT, share_out

LOWEST = -1e30


class Buffers(NamedTuple):
    """Shared memory; the first axis is the slot (q, query_documents, lse) or the stage."""

    q: Ref
    query_documents: Ref
    k: Ref
    key_documents: Ref
    v: Ref
    lse: Ref


class Sums(NamedTuple):
    """Of each row so far: the greatest c s, and the sum of 2^(c s - maximum)."""

    maximum: Array
    total: Array


@functools.partial(jax.jit, static_argnames=("scale", "interpret", "config"))  # lowered once, not once a layer
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

    def body(
        q: Ref, k: Ref, v: Ref, documents: Ref, walk: Ref, shares: Ref, o: Ref, lse: Ref,
        *, smem: Buffers, barriers: list[Ref], turn: Ref, accumulators: list[Ref],
    ) -> None:  # fmt: skip
        documents_of_queries = Copy(documents, lambda slot: smem.query_documents.at[slot], BLOCK)
        documents_of_keys = Copy(documents, lambda stage: smem.key_documents.at[stage], BLOCK)
        hold = Ring([*halves(q, smem.q), documents_of_queries], *barriers[:2])
        stream_k = Ring([Copy(k, lambda stage: smem.k.at[stage], BLOCK), documents_of_keys], *barriers[2:4])
        stream_v = Ring([Copy(v, lambda stage: smem.v.at[stage], BLOCK)], *barriers[4:])

        def consume() -> None:
            attend = functools.partial(
                _attend, walk, o, lse, smem, hold, stream_k, stream_v, turn, accumulators, scale * math.log2(math.e)
            )
            count, _ = for_each_tile(walk, shares, heads, attend)
            release_last(hold, count)

        producer = functools.partial(produce, walk, shares, heads, hold, [stream_k, stream_v], BLOCK)
        split_roles(producer, consume, config)

    return launch(
        body,
        "block_sparse_attention_forward",
        (jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype), jax.ShapeDtypeStruct((heads, length), jnp.float32)),
        dict(
            smem=Buffers(
                q=tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                query_documents=plgpu.SMEM((config.slots, BLOCK), jnp.int32),
                k=tile(config.stages, BLOCK, width),
                key_documents=plgpu.SMEM((config.stages, BLOCK), jnp.int32),
                v=tile(config.stages, BLOCK, width),
                lse=plgpu.SMEM((config.slots, COMPUTE_WARPGROUPS, HALF), jnp.float32),
            ),
            barriers=ring_barriers((COMPUTE_WARPGROUPS + 1, config.slots), (2, config.stages), (1, config.stages)),
            turn=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            accumulators=interpreter_buffers((HALF, width), interpret=interpret),
        ),
        programs=shares.shape[0],
        interpret=interpret,
    )(q_THK, k_THK, v_THK, documents_T, walk, shares)


def _attend(
    walk: Ref, o: Ref, lse: Ref, smem: Buffers, hold: Ring, stream_k: Ring, stream_v: Ring, turn: Ref,
    accumulators: list[Ref], c: float, at: Tile,
) -> None:  # fmt: skip
    """Attention of this warpgroup's 64 queries of a tile."""
    warpgroup = lax.axis_index("warpgroup")
    slot = hold.slot(at.number)
    q_tile = smem.q.at[slot, warpgroup]

    def over_the_row(o_acc: Ref) -> None:
        def step(i: Array, carry: tuple[Sums, Array]) -> tuple[Sums, Array]:
            sums, entry = carry
            following = walk[at.rank, HEADER + i + 1]
            stage = stream_k.slot(at.entries_before + i)
            plgpu.barrier_wait(stream_k.ready.at[stage])
            s = _scores(q_tile, smem.k.at[stage], turn)
            s = lax.cond(
                entry & (1 << DOCUMENTS_BIT) != 0, lambda: _hide_other_documents(s, smem, slot, stage), lambda: s
            )
            plgpu.barrier_arrive(stream_k.free.at[stage])
            s = lax.cond(entry & (1 << POSITIONS_BIT) != 0, lambda: _hide_later_keys(s), lambda: s)
            sums, p = _softmax(s, sums, o_acc, c)
            # The softmax must be over before the other warpgroup is let on.
            sums, p = lax.optimization_barrier((sums, p))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(stream_v.ready.at[stage])
            plgpu.barrier_wait(turn)
            multiply_add(o_acc, p, smem.v.at[stage], interpret=bool(accumulators))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(stream_v.free.at[stage])
            pl.when(i == 0)(lambda: release_last(hold, at.number))
            return sums, following

        lowest = plgpu.layout_cast(jnp.full((HALF,), LOWEST, jnp.float32), ROW)
        zero = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), ROW)
        pl.when(warpgroup == 1)(lambda: _take_turn(turn))
        sums, _ = lax.fori_loop(0, at.entries, step, (Sums(lowest, zero), at.first_entry))
        pl.when(warpgroup == 0)(lambda: _take_turn(turn))
        pl.when(at.entries == 0)(lambda: release_last(hold, at.number))

        sees = sums.total > 0
        total = jnp.where(sees, sums.total, 1.0)
        o_value = o_acc[...]
        q_tile[...] = (o_value * rows(1 / total, o_value.shape)).astype(jnp.bfloat16)
        smem.lse[slot, warpgroup] = jnp.where(sees, sums.maximum + jnp.log(total) * math.log2(math.e), 0.0)

    plgpu.barrier_wait(hold.ready.at[slot])
    with_accumulators(over_the_row, q_tile.shape, buffers=accumulators)
    plgpu.commit_smem()
    own = pl.ds(at.block * BLOCK + warpgroup * HALF, HALF)
    plgpu.copy_smem_to_gmem(q_tile, o.at[own, at.head])
    plgpu.copy_smem_to_gmem(smem.lse.at[slot, warpgroup], lse.at[at.head, own])


def _scores(q_tile: Ref, k_tile: Ref, turn: Ref) -> Array:
    def product(s_acc: Ref) -> Array:
        plgpu.wgmma(s_acc, q_tile, k_tile.transpose((1, 0)))
        _take_turn(turn)
        return s_acc[...]

    return pl.run_scoped(product, plgpu.ACC((HALF, BLOCK), jnp.float32))


def _hide_other_documents(s: Array, smem: Buffers, slot: Array, stage: Array) -> Array:
    own = pl.ds(lax.axis_index("warpgroup") * HALF, HALF)
    documents_q = plgpu.load(smem.query_documents.at[slot, own], layout=ROW)
    documents_k = plgpu.load(smem.key_documents.at[stage], layout=COLUMN)
    return jnp.where(rows(documents_q, s.shape) == columns(documents_k, s.shape), s, -jnp.inf)


def _hide_later_keys(s: Array) -> Array:
    # Only for blocks on the diagonal, where queries and keys start at the same token.
    position_q = positions(lax.axis_index("warpgroup") * HALF, HALF, ROW)
    position_k = positions(jnp.int32(0), BLOCK, COLUMN)
    return jnp.where(columns(position_k, s.shape) <= rows(position_q, s.shape), s, -jnp.inf)


def _softmax(s: Array, sums: Sums, o_acc: Ref, c: float) -> tuple[Sums, Array]:
    """Weights of this block's keys in bf16; the sums, and the output so far, rescaled to the new maximum."""
    maximum = jnp.maximum(sums.maximum, s.max(axis=1) * c)
    rescale = jnp.exp2(sums.maximum - maximum)
    p = jnp.exp2(s * c - rows(maximum, s.shape))
    o_value = o_acc[...]
    o_acc[...] = o_value * rows(rescale, o_value.shape)
    return Sums(maximum, sums.total * rescale + p.sum(axis=1)), p.astype(jnp.bfloat16)


def _take_turn(turn: Ref) -> None:
    """Meet the other warpgroup: one goes on to its products, one to its softmax."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)
