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
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from ..block_mask import BLOCK_SIZE
from ..hopper.config import COMPUTE_WARPGROUPS, WARPGROUP_ROWS, KernelConfig
from ..hopper.pipeline import Ring, ring_barriers
from ..hopper.primitives import (
    COLUMN,
    ROW,
    Ref,
    columns,
    interpreter_buffers,
    launch,
    multiply_add,
    positions,
    rows,
    split_roles,
    tile,
    with_accumulators,
)
from .hopper_producer import Copy, Stream, Tile, for_each_tile, halves, produce, release_last
from .schedule import DOCUMENTS_BIT, HEADER, POSITIONS_BIT, assign_tiles

CONFIG = KernelConfig(stages=2)
"""Shared memory at head width 128, of 227 KiB: 2 x 32 (queries) + 2 x 64 (128 keys and values) = 192 KiB."""
LOWEST = -1e30


class Buffers(NamedTuple):
    """Shared memory; the first axis is the slot (q, query_documents, lse) or the stage."""

    q: Ref
    query_documents: Ref
    k: Ref
    key_documents: Ref
    v: Ref
    lse: Ref


class Rings(NamedTuple):
    """The rings of the resident queries, of keys and of values; or the barriers of each."""

    resident: Any
    k: Any
    v: Any


class Barriers(NamedTuple):
    rings: Rings
    schedule: Ref  # where the two compute warpgroups take turns


class Sums(NamedTuple):
    """Of each row so far: the greatest c s, and the sum of 2^(c s - maximum)."""

    maximum: Array
    total: Array


@functools.partial(jax.jit, static_argnames=("scale", "config"))  # lowered once, not once a layer
def forward(
    q_THK: Array,
    k_THK: Array,
    v_THK: Array,
    documents_T: Array,
    schedule: Array,
    *,
    scale: float,
    config: KernelConfig = CONFIG,
) -> tuple[Array, Array]:
    """Return attention's output (T, H, K) bf16 and log2-sum-exp2 of the scaled scores (H, T) float32.

    Rows that see nothing give 0 in both. `schedule` is `Schedule.by_query`.
    """
    length, heads, width = q_THK.shape
    assignment = jnp.asarray(assign_tiles(schedule.shape[0] * heads))

    def body(
        q: Ref, k: Ref, v: Ref, documents: Ref, schedule: Ref, assignment: Ref, o: Ref, lse: Ref,
        *, smem: Buffers, barriers: Barriers, accumulators: list[Ref],
    ) -> None:  # fmt: skip
        documents_of_queries = Copy(documents, lambda slot: smem.query_documents.at[slot], BLOCK_SIZE)
        documents_of_keys = Copy(documents, lambda stage: smem.key_documents.at[stage], BLOCK_SIZE)
        rings = Rings(*(Ring(*ring) for ring in barriers.rings))
        keys = Stream(rings.k, [Copy(k, lambda stage: smem.k.at[stage], BLOCK_SIZE), documents_of_keys])
        values = Stream(rings.v, [Copy(v, lambda stage: smem.v.at[stage], BLOCK_SIZE)])
        queries = Stream(rings.resident, [*halves(q, smem.q), documents_of_queries])

        def consume() -> None:
            c = scale * math.log2(math.e)
            attend = functools.partial(_attend, schedule, o, lse, smem, rings, barriers.schedule, accumulators, c)
            count, _ = for_each_tile(schedule, assignment, heads, attend)
            release_last(rings.resident, count)

        producer = functools.partial(produce, schedule, assignment, heads, queries, [keys, values], BLOCK_SIZE)
        split_roles(producer, consume, config)

    return launch(
        body,
        "block_sparse_attention_forward",
        (jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype), jax.ShapeDtypeStruct((heads, length), jnp.float32)),
        dict(
            smem=Buffers(
                q=tile(config.slots, COMPUTE_WARPGROUPS, WARPGROUP_ROWS, width),
                query_documents=plgpu.SMEM((config.slots, BLOCK_SIZE), jnp.int32),
                k=tile(config.stages, BLOCK_SIZE, width),
                key_documents=plgpu.SMEM((config.stages, BLOCK_SIZE), jnp.int32),
                v=tile(config.stages, BLOCK_SIZE, width),
                lse=plgpu.SMEM((config.slots, COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
            ),
            barriers=Barriers(
                rings=Rings(
                    resident=ring_barriers(COMPUTE_WARPGROUPS + 1, config.slots),
                    k=ring_barriers(2, config.stages),
                    v=ring_barriers(1, config.stages),
                ),
                schedule=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            ),
            accumulators=interpreter_buffers((WARPGROUP_ROWS, width)),
        ),
        programs=assignment.shape[0],
    )(q_THK, k_THK, v_THK, documents_T, schedule, assignment)


def _attend(
    schedule: Ref, o: Ref, lse: Ref, smem: Buffers, rings: Rings, schedule_barrier: Ref,
    accumulators: list[Ref], c: float, at: Tile,
) -> None:  # fmt: skip
    """Write attention of this warpgroup's 64 queries of a tile."""
    warpgroup = lax.axis_index("warpgroup")
    slot = rings.resident.slot(at.number)
    q_tile = smem.q.at[slot, warpgroup]

    def over_the_row(o_acc: Ref) -> None:
        def step(i: Array, carry: tuple[Sums, Array]) -> tuple[Sums, Array]:
            sums, entry = carry
            following = schedule[at.rank, HEADER + i + 1]
            stage = rings.k.slot(at.entries_before + i)
            rings.k.wait(stage)
            s = _scores(q_tile, smem.k.at[stage], schedule_barrier)
            s = lax.cond(
                entry & (1 << DOCUMENTS_BIT) != 0, lambda: _hide_other_documents(s, smem, slot, stage), lambda: s
            )
            rings.k.release(stage)
            s = lax.cond(entry & (1 << POSITIONS_BIT) != 0, lambda: _hide_later_keys(s), lambda: s)
            sums, p = _softmax(s, sums, o_acc, c)
            # The softmax must be over before the other warpgroup is let on.
            sums, p = lax.optimization_barrier((sums, p))
            plgpu.barrier_arrive(schedule_barrier)
            rings.v.wait(stage)
            plgpu.barrier_wait(schedule_barrier)
            multiply_add(o_acc, p, smem.v.at[stage])
            plgpu.wgmma_wait(0)
            rings.v.release(stage)
            pl.when(i == 0)(lambda: release_last(rings.resident, at.number))
            return sums, following

        lowest = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), ROW)
        zero = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW)
        pl.when(warpgroup == 1)(lambda: _meet(schedule_barrier))
        sums, _ = lax.fori_loop(0, at.entries, step, (Sums(lowest, zero), at.first_entry))
        pl.when(warpgroup == 0)(lambda: _meet(schedule_barrier))
        pl.when(at.entries == 0)(lambda: release_last(rings.resident, at.number))

        sees = sums.total > 0
        total = jnp.where(sees, sums.total, 1.0)
        o_value = o_acc[...]
        q_tile[...] = (o_value * rows(1 / total, o_value.shape)).astype(jnp.bfloat16)
        smem.lse[slot, warpgroup] = jnp.where(sees, sums.maximum + jnp.log(total) * math.log2(math.e), 0.0)

    rings.resident.wait(slot)
    with_accumulators(over_the_row, q_tile.shape, buffers=accumulators)
    plgpu.commit_smem()
    own = pl.ds(at.block * BLOCK_SIZE + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    plgpu.copy_smem_to_gmem(q_tile, o.at[own, at.head])
    plgpu.copy_smem_to_gmem(smem.lse.at[slot, warpgroup], lse.at[at.head, own])


def _scores(q_tile: Ref, k_tile: Ref, schedule_barrier: Ref) -> Array:
    def multiply(s_acc: Ref) -> Array:
        plgpu.wgmma(s_acc, q_tile, k_tile.transpose((1, 0)))
        _meet(schedule_barrier)
        return s_acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, BLOCK_SIZE), jnp.float32))


def _hide_other_documents(s: Array, smem: Buffers, slot: Array, stage: Array) -> Array:
    own = pl.ds(lax.axis_index("warpgroup") * WARPGROUP_ROWS, WARPGROUP_ROWS)
    documents_q = plgpu.load(smem.query_documents.at[slot, own], layout=ROW)
    documents_k = plgpu.load(smem.key_documents.at[stage], layout=COLUMN)
    return jnp.where(rows(documents_q, s.shape) == columns(documents_k, s.shape), s, -jnp.inf)


def _hide_later_keys(s: Array) -> Array:
    # Only for blocks on the diagonal, where queries and keys start at the same token.
    position_q = positions(lax.axis_index("warpgroup") * WARPGROUP_ROWS, WARPGROUP_ROWS, ROW)
    position_k = positions(jnp.int32(0), BLOCK_SIZE, COLUMN)
    return jnp.where(columns(position_k, s.shape) <= rows(position_q, s.shape), s, -jnp.inf)


def _softmax(s: Array, sums: Sums, o_acc: Ref, c: float) -> tuple[Sums, Array]:
    """Return this block's weights in bf16 and the new sums; rescale the output so far to the new maximum."""
    maximum = jnp.maximum(sums.maximum, s.max(axis=1) * c)
    rescale = jnp.exp2(sums.maximum - maximum)
    p = jnp.exp2(s * c - rows(maximum, s.shape))
    o_value = o_acc[...]
    o_acc[...] = o_value * rows(rescale, o_value.shape)
    return Sums(maximum, sums.total * rescale + p.sum(axis=1)), p.astype(jnp.bfloat16)


def _meet(schedule_barrier: Ref) -> None:
    """Meet the other warpgroup: one goes on to its matmuls, one to its softmax."""
    plgpu.barrier_arrive(schedule_barrier)
    plgpu.barrier_wait(schedule_barrier)
