"""Forward block-sparse attention on Hopper: one pass over the listed key blocks with a running softmax.

A program owns 128 queries of one head at a time, split over two warpgroups, and
streams tiles of keys and values past them (hopper_tiles.py):

                      K0 V0  K1 V1  K2 V2 ...      (a ring of two K/V tiles, which warpgroup 0 fills)
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
starts at a finite number, so a row that has seen nothing yet stays free of NaN;
a head's sink is one more key, whose score is given and whose value is 0: its
rows start from there. Heads that share keys and values read the same ones.
Source: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) for the two warpgroups in turn.
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
from jax.typing import DTypeLike

from ..block_mask import BLOCK_SIZE
from ..hopper.config import WARPGROUP_ROWS, WARPGROUPS
from ..hopper.pipeline import is_filler
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
    tile,
    with_accumulators,
)
from .hopper_tiles import SLOTS, Copy, Header, Logits, Resident, Tile, for_each_tile, shared_head
from .schedule import DOCUMENTS_BIT, ENTRY_BITS, HEADER, POSITIONS_BIT, assign_tiles

STAGES = 2
"""Of the stream: one step is in use, the next one arrives. For three, shared memory has room with one resident slot: up
to 14 % slower, measured when a third warpgroup did the copying."""
LOWEST = -1e30


class Buffers(NamedTuple):
    """Shared memory: the first axis is the slot, and then the warpgroup; or the stage of the stream.

    At head width 128, of 227 KiB: 2 x 32 (queries) + 2 x 64 (128 keys and values) = 192 KiB.
    """

    q: Ref
    query_documents: Ref
    lse: Ref
    k: Ref
    key_documents: Ref
    v: Ref


class Barriers(NamedTuple):
    """`resident`, `k`, `v`: on which a slot's or a stage's copies arrive. `schedule`: where the warpgroups take turns.

    Nobody says that a stage is free. Where the filler passes the schedule barrier the other warpgroup has got so far
    that it has read the last stage of keys, or of values.
    """

    resident: Ref
    k: Ref
    v: Ref
    schedule: Ref


class Sums(NamedTuple):
    """Of each row so far: the greatest c s, and the sum of 2^(c s - maximum)."""

    maximum: Array
    total: Array


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap", "lse_of_nothing"))  # lowered once, not once a layer
def forward(
    q_THK: Array,
    k_TJK: Array,
    v_TJK: Array,
    documents_T: Array,
    schedule: Array,
    sinks_H: Array | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
    lse_of_nothing: float = 0.0,
) -> tuple[Array, Array]:
    """Return attention's output, as q is, and log2-sum-exp2 of the scores (H, T) float32.

    Args:
      q_THK, k_TJK, v_TJK: of one dtype; H / J heads in a row share keys and values.
      documents_T: int32.
      schedule: `Schedule.by_query`.
      sinks_H: float32 scores of a key that every row sees, and whose value is 0; None for no such key.
      scale: factor on the scores.
      soft_cap: makes cap tanh(s / cap) of a scaled score s.
      lse_of_nothing: of rows that see nothing, whose output is 0.
    """
    length, heads, width = q_THK.shape
    dtype, group = q_THK.dtype, heads // k_TJK.shape[1]
    assignment = jnp.asarray(assign_tiles(schedule.shape[0] * heads))

    def body(
        q: Ref, k: Ref, v: Ref, documents: Ref, schedule: Ref, assignment: Ref, sinks: Ref, o: Ref, lse: Ref,
        *, smem: Buffers, barriers: Barriers, accumulators: list[Ref],
    ) -> None:  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        resident = Resident(
            barriers.resident,
            lambda slot: (
                Copy(q, smem.q.at[slot, warpgroup], WARPGROUP_ROWS),
                Copy(documents, smem.query_documents.at[slot, warpgroup], WARPGROUP_ROWS),
            ),
            warpgroup * WARPGROUP_ROWS,
        )

        def copy_keys(stage: Array, block: Array, head: Array) -> None:
            for copy in (
                Copy(k, smem.k.at[stage], BLOCK_SIZE),
                Copy(documents, smem.key_documents.at[stage], BLOCK_SIZE),
            ):
                copy.start(block * BLOCK_SIZE, shared_head(head, group), barriers.k.at[stage])

        def copy_values(stage: Array, block: Array, head: Array) -> None:
            copy = Copy(v, smem.v.at[stage], BLOCK_SIZE)
            copy.start(block * BLOCK_SIZE, shared_head(head, group), barriers.v.at[stage])

        def start(header: Header) -> None:
            resident.fill(jnp.int32(0), header)

            @pl.when(is_filler())
            def _first() -> None:
                block = header.first_entry >> ENTRY_BITS
                copy_keys(jnp.int32(0), block, header.head)
                copy_values(jnp.int32(0), block, header.head)

        logits = Logits(scale, soft_cap)
        attend = functools.partial(
            _attend, schedule, sinks, (o, lse), smem, barriers, resident, (copy_keys, copy_values), accumulators,
            logits, lse_of_nothing,
        )  # fmt: skip
        for_each_tile(schedule, assignment, heads, start, attend)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return launch(
        body,
        "block_sparse_attention_forward",
        (jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype), jax.ShapeDtypeStruct((heads, length), jnp.float32)),
        dict(
            smem=Buffers(
                q=tile(SLOTS, WARPGROUPS, WARPGROUP_ROWS, width, dtype=dtype),
                query_documents=plgpu.SMEM((SLOTS, WARPGROUPS, WARPGROUP_ROWS), jnp.int32),
                lse=plgpu.SMEM((SLOTS, WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
                k=tile(STAGES, BLOCK_SIZE, width, dtype=dtype),
                key_documents=plgpu.SMEM((STAGES, BLOCK_SIZE), jnp.int32),
                v=tile(STAGES, BLOCK_SIZE, width, dtype=dtype),
            ),
            barriers=Barriers(
                resident=plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS * SLOTS),
                k=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
                v=plgpu.Barrier(num_barriers=STAGES),
                schedule=plgpu.Barrier(num_arrivals=WARPGROUPS),
            ),
            accumulators=interpreter_buffers((WARPGROUP_ROWS, width)),
        ),
        programs=assignment.shape[0],
    )(q_THK, k_TJK, v_TJK, documents_T, schedule, assignment, sinks_H)


def _attend(
    schedule: Ref, sinks: Ref | None, out: tuple[Ref, Ref], smem: Buffers, barriers: Barriers, resident: Resident,
    copies: tuple[Callable[[Array, Array, Array], None], ...], accumulators: list[Ref], logits: Logits,
    lse_of_nothing: float, at: Tile,
) -> None:  # fmt: skip
    """Write attention of this warpgroup's 64 queries of a tile."""
    warpgroup = lax.axis_index("warpgroup")
    copy_keys, copy_values = copies
    slot = resident.slot(at.number)
    q_tile = smem.q.at[slot, warpgroup]

    def over_the_row(o_acc: Ref) -> None:
        def step(i: Array, carry: tuple[Sums, Array, Array]) -> tuple[Sums, Array, Array]:
            sums, entry, next_entry = carry
            later = schedule[at.header.rank, HEADER + i + 2]
            stage = lax.rem(at.entries_before + i, STAGES)
            here = i + 1 < at.header.entries  # the next step is of this tile
            fills = is_filler() & (here | at.more)
            block = jnp.where(here, next_entry, at.following.first_entry) >> ENTRY_BITS
            head = jnp.where(here, at.header.head, at.following.head)

            def fill_keys() -> None:
                pl.when(fills)(lambda: copy_keys(STAGES - 1 - stage, block, head))

            plgpu.barrier_wait(barriers.k.at[stage])
            s = _scores(q_tile, smem.k.at[stage], barriers.schedule, fill_keys)
            if logits.soft_cap is not None:
                s = logits.capped(logits.sigmoid(s))
            s = lax.cond(
                entry & (1 << DOCUMENTS_BIT) != 0,
                lambda: _hide_other_documents(s, smem, slot, stage, entry),
                lambda: s,
            )
            s = lax.cond(entry & (1 << POSITIONS_BIT) != 0, lambda: _hide_later_keys(s), lambda: s)
            sums, p = _softmax(s, sums, o_acc, logits.c if logits.soft_cap is None else 1.0, q_tile.dtype)
            # The softmax must be over before the other warpgroup is let on.
            sums, p = lax.optimization_barrier((sums, p))
            plgpu.barrier_arrive(barriers.schedule)
            plgpu.barrier_wait(barriers.v.at[stage])
            plgpu.barrier_wait(barriers.schedule)
            multiply_add(o_acc, p, smem.v.at[stage])
            pl.when(fills)(lambda: copy_values(STAGES - 1 - stage, block, head))
            plgpu.wgmma_wait(0)
            pl.when(i == 0)(lambda: resident.fill_next(at))
            return sums, next_entry, later

        if sinks is None:
            first = jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), jnp.zeros((WARPGROUP_ROWS,), jnp.float32)
        else:
            sink = jnp.maximum(sinks[at.header.head] * math.log2(math.e), LOWEST)
            first = jnp.full((WARPGROUP_ROWS,), sink, jnp.float32), jnp.ones((WARPGROUP_ROWS,), jnp.float32)
        first_sums = Sums(*(plgpu.layout_cast(x, ROW) for x in first))
        pl.when(warpgroup == 1)(lambda: _meet(barriers.schedule))
        entries = at.header.first_entry, at.header.second_entry
        sums, *_ = lax.fori_loop(0, at.header.entries, step, (first_sums, *entries))
        pl.when(warpgroup == 0)(lambda: _meet(barriers.schedule))

        sees = sums.total > 0
        total = jnp.where(sees, sums.total, 1.0)
        o_value = o_acc[...]
        q_tile[...] = (o_value * rows(1 / total, o_value.shape)).astype(q_tile.dtype)
        lse = sums.maximum + jnp.log(total) * math.log2(math.e)
        smem.lse[slot, warpgroup] = jnp.where(sees, lse, lse_of_nothing)

    resident.wait(slot)
    with_accumulators(over_the_row, q_tile.shape, buffers=accumulators)
    plgpu.commit_smem()
    own = pl.ds(at.header.block * BLOCK_SIZE + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    plgpu.copy_smem_to_gmem(q_tile, out[0].at[own, at.header.head])
    plgpu.copy_smem_to_gmem(smem.lse.at[slot, warpgroup], out[1].at[at.header.head, own])


def _scores(q_tile: Ref, k_tile: Ref, schedule_barrier: Ref, meanwhile: Callable[[], None]) -> Array:
    def multiply(s_acc: Ref) -> Array:
        plgpu.wgmma(s_acc, q_tile, k_tile.transpose((1, 0)))
        _meet(schedule_barrier)
        meanwhile()
        return s_acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, BLOCK_SIZE), jnp.float32))


def _hide_other_documents(s: Array, smem: Buffers, slot: Array, stage: Array, entry: Array) -> Array:
    warpgroup = lax.axis_index("warpgroup")
    documents_q = plgpu.load(smem.query_documents.at[slot, warpgroup], layout=ROW)
    documents_k = plgpu.load(smem.key_documents.at[stage], layout=COLUMN)
    same = rows(documents_q, s.shape) == columns(documents_k, s.shape)
    sees_any = (entry >> (2 * warpgroup)) & 0b11 != 0  # not so in a row that visits nothing
    return jnp.where(same & sees_any, s, -jnp.inf)


def _hide_later_keys(s: Array) -> Array:
    # Only for blocks on the diagonal, where queries and keys start at the same token.
    position_q = positions(lax.axis_index("warpgroup") * WARPGROUP_ROWS, WARPGROUP_ROWS, ROW)
    position_k = positions(jnp.int32(0), BLOCK_SIZE, COLUMN)
    return jnp.where(columns(position_k, s.shape) <= rows(position_q, s.shape), s, -jnp.inf)


def _softmax(s: Array, sums: Sums, o_acc: Ref, c: float, dtype: DTypeLike) -> tuple[Sums, Array]:
    """Return this block's weights, rounded, and the new sums; rescale the output so far to the new maximum."""
    maximum = jnp.maximum(sums.maximum, s.max(axis=1) * c)
    rescale = jnp.exp2(sums.maximum - maximum)
    p = jnp.exp2(s * c - rows(maximum, s.shape))
    o_value = o_acc[...]
    o_acc[...] = o_value * rows(rescale, o_value.shape)
    return Sums(maximum, sums.total * rescale + p.sum(axis=1)), p.astype(dtype)


def _meet(schedule_barrier: Ref) -> None:
    """Meet the other warpgroup: one goes on to its matmuls, one to its softmax."""
    plgpu.barrier_arrive(schedule_barrier)
    plgpu.barrier_wait(schedule_barrier)
