"""Backward block-sparse attention on Hopper: two kernels that recompute the probabilities from the saved log-sum-exp.

    dQ       holds 128 queries and visits the key blocks of their row       matmuls: S, dP, dQ
    dK, dV   holds 128 keys and visits the query blocks of their column     matmuls: S, dP, dV, dK

Both stream tiles of 64 rows, which are copied two steps ahead. So each warpgroup meets quarters
of 64 x 64 (P compares, F does not) and passes over those in which no pair is visible:

              keys                                    queries
             [1a 1b][2a 2b]                          [2a 2b][3a 3b]
   q2 0-63    .  P   P  .    warpgroup 0    k2 0-63    P  P   F  F    warpgroup 0
   q2 64-127  .  P   P  P    warpgroup 1    k2 64-127  .  P   F  F    warpgroup 1

For dK and dV a warpgroup computes scores transposed (keys are rows), so that
P^T and dS^T are already in the registers the next matmul reads. No sum is
shared between programs: two runs give the same bits.

    P = 2^(c S - lse)     dP = dO V^T     dS = P (dP - delta)     delta = rowsum(O dO)
    dV = P^T dO           dQ = scale dS K                         dK = scale dS^T Q

lse / c and delta need no instructions: S and dP start from minus them. With a soft cap the exponent is no multiple of
S (`Logits`), so there lse is subtracted as usual, and dS = P (dP - delta) (1 - tanh^2). A gradient of lse itself adds P
times it to dS: delta - dlse takes the place of delta, for a sink too, whose P is exp(sink - lse), and its dP 0.

Query heads that share a key's head add to its gradients one after the other, in the same accumulators.

Told how q and k came of a matmul's results z, a kernel undoes it while the gradient g of n = q or k is in registers.
With n = rotate(norm(r z)) and f = r / rms(r z), as layer/self_attention.py derives,

    dz = f rotate_back(g - n mean_K(g n))     dz_v = r dV

so that g is rounded to bf16 once, as dz, and n is read from where the matmuls read it. What the gradient of r and the
layers before need besides, sum_K(g n) and sum_K(dV v), are a number for each token and head.
Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 2, as two passes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from ..block_mask import BLOCK_SIZE
from ..hopper.config import WARPGROUP_ROWS, WARPGROUPS
from ..hopper.pipeline import Ring, is_filler, ring_barriers
from ..hopper.primitives import (
    COLUMN,
    ROW,
    Ref,
    columns,
    interpreter_buffers,
    launch,
    multiply_add,
    positions,
    preload,
    read_preloaded,
    rows,
    tile,
    with_accumulators,
)
from ..hopper.rotary import HEAD_WIDTH, ROTATED, rotate
from .hopper_tiles import SLOTS, Copy, Header, Logits, Resident, Tile, for_each_tile, shared_head
from .schedule import DOCUMENTS_BIT, ENTRY_BITS, HEADER, POSITIONS_BIT, assign_tiles

STAGES = 3
"""Of the stream: one step is in use, two arrive. Shared memory has room for the third because documents, which few
quarters compare, are read from global memory."""
AHEAD = STAGES - 1
PARTS = BLOCK_SIZE // WARPGROUP_ROWS
QUARTER = (WARPGROUP_ROWS, WARPGROUP_ROWS)


class Origin(NamedTuple):
    """How q or k came of a matmul's result z: rotate(factor * z), by angles and a factor for each head and token.

    The kernels see the same of references, or None.
    """

    cos_TR: Array  # (T, K / 4) float32
    sin_TR: Array
    factor_HT: Array  # (H, T) float32: r / rms(r z), r the scale of the row


class DqBuffers(NamedTuple):
    """Shared memory of dQ; the first axis is the slot, and then the warpgroup, or (kv) the stage.

    At head width 128, of 227 KiB: 2 x 64 (queries and output gradients) + 3 x 32 (64 keys and values) + 1 = 225 KiB.
    """

    q: Ref
    do: Ref
    number: Ref  # of each query: lse comes, delta leaves at a tile's start, and dots, with an origin, at its end
    kv: Ref  # [stage, 0] keys, [stage, 1] values


class DkvBuffers(NamedTuple):
    """Shared memory of dK and dV, as large: slot and warpgroup (k, v), or stage."""

    k: Ref
    v: Ref
    qdo: Ref  # [stage, 0] queries, [stage, 1] output gradients
    lse: Ref
    delta: Ref


class Barriers(NamedTuple):
    """`resident`: on which a slot's copies arrive. `ring`: of the stream."""

    resident: Ref
    ring: list[Ref]


class Stream(NamedTuple):
    """The stream, and what fills it.

    copy: starts the copies of half a block: (first row, head, slot, its `ready` barrier).
    group: how many heads in a row stream past a tile's own one, block by block.
    prologue: the same for what takes a tile's first step, before its entries, if anything does.
    """

    ring: Ring
    copy: Callable[[Array, Array, Array, Ref], None]
    group: int = 1
    prologue: Callable[[Array, Array, Array, Ref], None] | None = None

    @property
    def per_entry(self) -> int:
        """Steps of an entry."""
        return PARTS * self.group

    @property
    def extra(self) -> int:
        """Steps of a tile beside those of its entries."""
        return 0 if self.prologue is None else 1

    def fill_half(self, step: Array, entry: Array, half: Array | int, head: Array) -> None:
        """Have step number `step` bring a half of an entry's block."""
        first_row = (entry >> ENTRY_BITS) * BLOCK_SIZE + half * WARPGROUP_ROWS
        self.ring.refill(self.ring.slot(step), step >= STAGES, functools.partial(self.copy, first_row, head))

    def start(self, header: Header) -> None:
        """Have the first steps bring what the first tile begins with."""
        if self.prologue is not None:
            self.fill_prologue(jnp.int32(0), header)
        for step in range(self.extra, AHEAD):
            self.fill_half(jnp.int32(step), header.first_entry, step - self.extra, header.head * self.group)

    def fill_prologue(self, step: Array, header: Header) -> None:
        """Have step number `step` bring what a tile begins with."""
        assert self.prologue is not None
        copy = functools.partial(self.prologue, header.block * BLOCK_SIZE, header.head)
        self.ring.refill(self.ring.slot(step), step >= STAGES, copy)


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap"))  # lowered once, not once a layer
def backward_dq(
    q_THK: Array, k_TJK: Array, v_TJK: Array, o_THK: Array, do_THK: Array, lse_HT: Array, documents_T: Array,
    schedule: Array, origin: Origin | None = None, dlse_HT: Array | None = None,
    *, scale: float, soft_cap: float | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """Return the gradient of q, as it is, and delta (H, T) float32. `schedule` is `Schedule.by_query`.

    With an `origin` the gradient is that of z, and the third result (H, T) float32 holds sum_K(dq q). With `dlse_HT`,
    the gradient of log-sum-exp in base e, that is subtracted from delta.

    Raises:
      ValueError: for an origin with a head width other than 128.
    """
    length, heads, width = q_THK.shape
    dtype, group = q_THK.dtype, heads // k_TJK.shape[1]
    _check_origin(origin, width)
    assignment = jnp.asarray(assign_tiles(schedule.shape[0] * heads))

    def body(
        q: Ref, k: Ref, v: Ref, o: Ref, do: Ref, lse: Ref, documents: Ref, schedule: Ref, assignment: Ref,
        origin: Ref, dlse: Ref, *out: Ref, smem: DqBuffers, barriers: Barriers, accumulators: list[Ref],
    ) -> None:  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        resident = Resident(
            barriers.resident,
            lambda slot: (
                Copy(q, smem.q.at[slot, warpgroup], WARPGROUP_ROWS),
                Copy(do, smem.do.at[slot, warpgroup], WARPGROUP_ROWS),
                Copy(lse, smem.number.at[slot, warpgroup], WARPGROUP_ROWS),
            ),
            warpgroup * WARPGROUP_ROWS,
        )

        def copy_keys(first_row: Array, head: Array, stage: Array, ready: Ref) -> None:
            for copy in (
                Copy(k, smem.kv.at[stage, 0], WARPGROUP_ROWS),
                Copy(v, smem.kv.at[stage, 1], WARPGROUP_ROWS),
            ):
                copy.start(first_row, shared_head(head, group), ready)

        # O is needed once a tile, for delta: it passes through the stream, where it
        # just fills one step, instead of taking resident memory of its own.
        def copy_o(first_row: Array, head: Array, stage: Array, ready: Ref) -> None:
            for half in range(WARPGROUPS):
                copy = Copy(o, smem.kv.at[stage, half], WARPGROUP_ROWS, half * WARPGROUP_ROWS)
                copy.start(first_row, head, ready)

        stream = Stream(_ring(barriers), copy_keys, prologue=copy_o)
        logits = Logits(scale, soft_cap)
        one_tile = functools.partial(
            _dq_tile, schedule, documents, origin, dlse, out, smem, resident, stream, accumulators, logits
        )
        _run(schedule, assignment, heads, resident, stream, one_tile)

    number = jax.ShapeDtypeStruct((heads, length), jnp.float32)
    results: tuple[Array, ...] = launch(
        body,
        "block_sparse_attention_dq",
        (jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype), number, *[number] * bool(origin)),
        dict(
            smem=DqBuffers(
                q=tile(SLOTS, WARPGROUPS, WARPGROUP_ROWS, width, dtype=dtype),
                do=tile(SLOTS, WARPGROUPS, WARPGROUP_ROWS, width, dtype=dtype),
                number=plgpu.SMEM((SLOTS, WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
                kv=tile(STAGES, 2, WARPGROUP_ROWS, width, dtype=dtype),
            ),
            barriers=Barriers(
                resident=plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS * SLOTS),
                ring=ring_barriers(2, STAGES),
            ),
            accumulators=interpreter_buffers((WARPGROUP_ROWS, width)),
        ),
        programs=assignment.shape[0],
    )(q_THK, k_TJK, v_TJK, o_THK, do_THK, lse_HT, documents_T, schedule, assignment, origin, dlse_HT)
    return results


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap"))  # lowered once, not once a layer
def backward_dkv(
    q_THK: Array, k_TJK: Array, v_TJK: Array, do_THK: Array, lse_HT: Array, delta_HT: Array, documents_T: Array,
    schedule: Array, origin: Origin | None = None, rstd_T: Array | None = None,
    *, scale: float, soft_cap: float | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """Return the gradients of k and v, as they are. `schedule` is `Schedule.by_key`.

    With k's `origin` and `rstd_T`, (T,) float32, the gradients are those of z: k's, and v's, where v = rstd_T z.
    The third and fourth result, (J, T) float32, then hold sum_K(dk k) and sum_K(dv v).

    Raises:
      ValueError: for an origin with a head width other than 128.
    """
    length, heads, width = k_TJK.shape
    dtype, group = k_TJK.dtype, q_THK.shape[1] // heads
    _check_origin(origin, width)
    assignment = jnp.asarray(assign_tiles(schedule.shape[0] * heads))

    def body(
        q: Ref, k: Ref, v: Ref, do: Ref, lse: Ref, delta: Ref, documents: Ref, schedule: Ref, assignment: Ref,
        origin: Ref, rstd: Ref, *out: Ref,
        smem: DkvBuffers, barriers: Barriers, accumulators: list[Ref],
    ) -> None:  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        resident = Resident(
            barriers.resident,
            lambda slot: (
                Copy(k, smem.k.at[slot, warpgroup], WARPGROUP_ROWS),
                Copy(v, smem.v.at[slot, warpgroup], WARPGROUP_ROWS),
            ),
            warpgroup * WARPGROUP_ROWS,
        )

        def copy_queries(first_row: Array, head: Array, stage: Array, ready: Ref) -> None:
            for copy in (
                Copy(q, smem.qdo.at[stage, 0], WARPGROUP_ROWS),
                Copy(do, smem.qdo.at[stage, 1], WARPGROUP_ROWS),
                Copy(lse, smem.lse.at[stage], WARPGROUP_ROWS),
                Copy(delta, smem.delta.at[stage], WARPGROUP_ROWS),
            ):
                copy.start(first_row, head, ready)

        stream = Stream(_ring(barriers), copy_queries, group)
        logits = Logits(scale, soft_cap)
        one_tile = functools.partial(
            _dkv_tile, schedule, documents, origin, rstd, out, smem, resident, stream, accumulators, logits
        )
        _run(schedule, assignment, heads, resident, stream, one_tile)

    gradient, number = (
        jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in ((k_TJK.shape, dtype), ((heads, length), jnp.float32))
    )
    results: tuple[Array, ...] = launch(
        body,
        "block_sparse_attention_dkv",
        (gradient, gradient, *[number, number] * bool(origin)),
        dict(
            smem=DkvBuffers(
                k=tile(SLOTS, WARPGROUPS, WARPGROUP_ROWS, width, dtype=dtype),
                v=tile(SLOTS, WARPGROUPS, WARPGROUP_ROWS, width, dtype=dtype),
                qdo=tile(STAGES, 2, WARPGROUP_ROWS, width, dtype=dtype),
                lse=plgpu.SMEM((STAGES, WARPGROUP_ROWS), jnp.float32),
                delta=plgpu.SMEM((STAGES, WARPGROUP_ROWS), jnp.float32),
            ),
            barriers=Barriers(
                resident=plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS * SLOTS),
                ring=ring_barriers(4, STAGES),
            ),
            accumulators=interpreter_buffers((WARPGROUP_ROWS, width), (WARPGROUP_ROWS, width)),
        ),
        programs=assignment.shape[0],
    )(q_THK, k_TJK, v_TJK, do_THK, lse_HT, delta_HT, documents_T, schedule, assignment, origin, rstd_T)
    return results


def _ring(barriers: Barriers) -> Ring:
    ready, free = barriers.ring
    return Ring(ready, free, jnp.int32(0))


def _run(
    schedule: Ref, assignment: Ref, heads: int, resident: Resident, stream: Stream, one_tile: Callable[[Tile], None]
) -> None:
    """Do all tiles of a program."""

    def start(header: Header) -> None:
        resident.fill(jnp.int32(0), header)
        pl.when(is_filler())(lambda: stream.start(header))

    count, entries = for_each_tile(schedule, assignment, heads, start, one_tile)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    # The slots' numbers as something new here, or their addresses are made before the loops, and spill.
    ring = stream.ring._replace(first=_opaque(stream.ring.first, entries))
    ring.drain(entries * stream.per_entry + count * stream.extra)


def _dq_tile(
    schedule: Ref, documents: Ref, origin: Ref, dlse: Ref | None, out: Sequence[Ref], smem: DqBuffers,
    resident: Resident, stream: Stream, accumulators: list[Ref], logits: Logits, at: Tile,
) -> None:  # fmt: skip
    """Write dQ and delta of this warpgroup's 64 queries; score tiles have queries as rows."""
    warpgroup = lax.axis_index("warpgroup")
    slot, head = resident.slot(at.number), at.header.head
    first_query = at.header.block * BLOCK_SIZE + warpgroup * WARPGROUP_ROWS
    queries = pl.ds(first_query, WARPGROUP_ROWS)
    q_tile, number = smem.q.at[slot, warpgroup], smem.number.at[slot, warpgroup]
    resident.wait(slot)
    lse = plgpu.load(number, layout=ROW)
    if dlse is not None:
        of_lse = plgpu.load(dlse.at[head, queries], layout=ROW, optimized=False)

    step = at.entries_before * stream.per_entry + at.number  # each tile before had one for O
    pl.when(is_filler())(lambda: stream.fill_half(step + AHEAD, at.header.first_entry, 1, head))
    stage = stream.ring.slot(step)
    stream.ring.wait(stage)
    delta = _row_dots(smem.kv.at[stage, warpgroup], smem.do.at[slot, warpgroup])
    if dlse is not None:
        delta -= of_lse
    stream.ring.release(stage)
    plgpu.commit_smem()  # all threads have read lse
    number[...] = delta
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(number, out[1].at[head, queries])

    def over_the_row(dq_acc: Ref) -> None:
        def quarter(stage: Array, first_key: Array, *, masked: bool) -> None:
            k_tile, v_tile = smem.kv.at[stage, 0], smem.kv.at[stage, 1]
            s_start, dp_start = rows(-lse / logits.lse_unit, QUARTER), rows(-delta, QUARTER)
            here = _opaque(slot, stage)
            visible = _sees(documents, first_query, first_key, queries_are_rows=True) if masked else None

            ds = _score_gradient(
                (smem.q.at[here, warpgroup], smem.do.at[here, warpgroup]),
                (k_tile, v_tile),
                (lambda: s_start, lambda: dp_start),
                logits,
                visible,
            )
            multiply_add(dq_acc, ds.astype(k_tile.dtype), k_tile)
            plgpu.wgmma_wait(0)

        _for_each_quarter(schedule, at, resident, stream, step + 1, lambda half: 2 * warpgroup + half, quarter)
        gradient = dq_acc[...] * logits.scale
        if origin is not None:
            of_rows = _load_origin(origin, head, queries)
            gradient, number[...] = _undo(gradient, q_tile, *of_rows)
        q_tile[...] = gradient.astype(q_tile.dtype)

    with_accumulators(over_the_row, q_tile.shape, buffers=accumulators)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, out[0].at[queries, head])
    if origin is not None:
        plgpu.copy_smem_to_gmem(number, out[2].at[head, queries])


def _dkv_tile(
    schedule: Ref, documents: Ref, origin: Ref, rstd: Ref, out: Sequence[Ref], smem: DkvBuffers, resident: Resident,
    stream: Stream, accumulators: list[Ref], logits: Logits, at: Tile,
) -> None:  # fmt: skip
    """Write dK and dV of this warpgroup's 64 keys; score tiles are transposed, with keys as rows."""
    warpgroup = lax.axis_index("warpgroup")
    slot, head = resident.slot(at.number), at.header.head
    first_key = at.header.block * BLOCK_SIZE + warpgroup * WARPGROUP_ROWS
    keys = pl.ds(first_key, WARPGROUP_ROWS)
    k_tile, v_tile = smem.k.at[slot, warpgroup], smem.v.at[slot, warpgroup]
    resident.wait(slot)

    def over_the_column(dk_acc: Ref, dv_acc: Ref) -> None:
        def quarter(stage: Array, first_query: Array, *, masked: bool) -> None:
            q_tile, do_tile = smem.qdo.at[stage, 0], smem.qdo.at[stage, 1]
            here = _opaque(slot, stage)

            def minus(numbers: Ref, unit: float) -> Callable[[], Array]:
                return lambda: columns(plgpu.load(numbers.at[stage], layout=COLUMN) * (-1 / unit), QUARTER)

            visible = _sees(documents, first_key, first_query, queries_are_rows=False) if masked else None

            def add_to_dv(p: Array) -> None:
                multiply_add(dv_acc, p, do_tile)

            ds = _score_gradient(
                (smem.k.at[here, warpgroup], smem.v.at[here, warpgroup]),
                (q_tile, do_tile),
                (minus(smem.lse, logits.lse_unit), minus(smem.delta, 1.0)),
                logits,
                visible,
                add_to_dv,
            )
            multiply_add(dk_acc, ds.astype(q_tile.dtype), q_tile)
            plgpu.wgmma_wait(0)

        first_step = at.entries_before * stream.per_entry
        _for_each_quarter(schedule, at, resident, stream, first_step, lambda half: 2 * half + warpgroup, quarter)
        if origin is None:
            k_tile[...] = (dk_acc[...] * logits.scale).astype(k_tile.dtype)
            v_tile[...] = dv_acc[...].astype(v_tile.dtype)
            return
        of_rows = _load_origin(origin, head, keys)
        v_factor = plgpu.load(rstd.at[keys], layout=ROW, optimized=False)
        # v first, while what k needs is on its way.
        d_v = plgpu.layout_cast(dv_acc[...], plgpu.Layout.WGMMA)
        out[3][head, keys] = (d_v * _tile_values(v_tile)).sum(axis=1)
        v_tile[...] = (d_v * rows(v_factor, v_tile.shape)).astype(v_tile.dtype)
        d_k, out[2][head, keys] = _undo(dk_acc[...] * logits.scale, k_tile, *of_rows)
        k_tile[...] = d_k.astype(k_tile.dtype)

    with_accumulators(over_the_column, k_tile.shape, v_tile.shape, buffers=accumulators)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_tile, out[0].at[keys, head])
    plgpu.copy_smem_to_gmem(v_tile, out[1].at[keys, head])


def _opaque(slot: Array, stage: Array) -> Array:
    """Return `slot`, as something that the compiler takes for new wherever `stage`, a number from 0 up, is new.

    Else it makes the descriptors of a whole resident tile before the loop, and they spill from registers.
    """
    return slot + lax.min(stage, jnp.int32(0))


def _row_dots(a: Ref, b: Ref) -> Array:
    """Return the rows' inner products of two tiles, 64 columns at a time: whole ones would fill all registers."""
    parts = (pl.ds(first, WARPGROUP_ROWS) for first in range(0, a.shape[-1], WARPGROUP_ROWS))
    dots = ((_tile_values(a.at[:, part]) * _tile_values(b.at[:, part])).sum(axis=1) for part in parts)
    return functools.reduce(jnp.add, dots)


def _score_gradient(
    own: tuple[Ref, Ref],
    other: tuple[Ref, Ref],
    starts: tuple[Callable[[], Array], Callable[[], Array]],
    logits: Logits,
    visible: Callable[[], Array] | None,
    with_weights: Callable[[Array], None] | None = None,
) -> Array:
    """Return the scaled scores' gradient of a quarter, float32: its rows are this warpgroup's, its columns streamed.

    Args:
      own, other: two tiles each. S is the matmul of the first ones, dP that of the second ones.
      starts: what S and dP start from: minus lse in units of S, and minus delta.
      logits: what stands in the exponents. With a soft cap S starts from 0.
      visible: tells which pairs count; None where all do.
      with_weights: starts a matmul with P, rounded; it may still run when this returns.
    """

    minus_lse, minus_delta = starts

    def gradient(s_acc: Ref, dp_acc: Ref) -> Array:
        if logits.soft_cap is None:
            s_start, dp_start = minus_lse(), minus_delta()
            preload(s_acc, s_start)
        else:
            dp_start = minus_delta()
        preload(dp_acc, dp_start)
        plgpu.wgmma(s_acc, own[0], other[0].transpose((1, 0)))
        plgpu.wgmma(dp_acc, own[1], other[1].transpose((1, 0)))
        if logits.soft_cap is None:
            p = jnp.exp2(read_preloaded(s_acc, s_start, in_flight=1) * logits.c)
        else:
            r = logits.sigmoid(plgpu.wgmma_accumulator_load(s_acc, wait_n=1))
            p = jnp.exp2(logits.capped(r) + minus_lse())
        if visible is not None:
            p = jnp.where(visible(), p, 0.0)
        rounded = p.astype(other[0].dtype)
        if logits.soft_cap is not None:
            p = p * logits.slope(r)  # before a matmul holds the rounded ones: r need not outlive them
        if with_weights is not None:
            with_weights(rounded)
        return p * read_preloaded(dp_acc, dp_start, in_flight=0 if with_weights is None else 1)

    return pl.run_scoped(gradient, plgpu.ACC(QUARTER, jnp.float32), plgpu.ACC(QUARTER, jnp.float32))


def _sees(documents: Ref, first_row: Array, first_column: Array, *, queries_are_rows: bool) -> Callable[[], Array]:
    """Start to read a quarter's documents; return what tells, once scores are there, which of its pairs count."""
    of_row, of_column = (
        plgpu.load(documents.at[pl.ds(first, WARPGROUP_ROWS)], layout=layout, optimized=False)
        for first, layout in ((first_row, ROW), (first_column, COLUMN))
    )

    def visible() -> Array:
        same = rows(of_row, QUARTER) == columns(of_column, QUARTER)
        row = rows(positions(first_row, WARPGROUP_ROWS, ROW), QUARTER)
        column = columns(positions(first_column, WARPGROUP_ROWS, COLUMN), QUARTER)
        return same & (column <= row if queries_are_rows else row <= column)

    return visible


def _check_origin(origin: Origin | None, width: int) -> None:
    if origin is not None and width != HEAD_WIDTH:
        raise ValueError(f"an origin needs head width {HEAD_WIDTH}, got {width}: undo norm and rotation outside")


def _load_origin(origin: Ref, head: Array, own: pl.Slice) -> tuple[Array, Array, Array]:
    """Return cosines and sines, (64, K / 4), and factors of the rows `own`."""
    cos, sin = (plgpu.load(ref.at[own], layout=plgpu.Layout.WGMMA, optimized=False) for ref in origin[:2])
    return cos, sin, plgpu.load(origin.factor_HT.at[head, own], layout=ROW, optimized=False)


def _tile_values(tile: Ref) -> Array:
    return plgpu.load(tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _undo(g: Array, n_tile: Ref, cos: Array, sin: Array, factor: Array) -> tuple[Array, Array]:
    """Return z's gradient, where n = rotate(factor z) has gradient g, and the rows' sums of g n; float32."""
    g, n = plgpu.layout_cast(g, plgpu.Layout.WGMMA), _tile_values(n_tile)
    dots = (g * n).sum(axis=1)
    across = (g - n * rows(dots * (1 / HEAD_WIDTH), n_tile.shape)) * rows(factor, n_tile.shape)
    half = HEAD_WIDTH // 2
    first, second = rotate([across[:, :ROTATED], across[:, half : half + ROTATED]], cos, -sin)
    turned = [first, across[:, ROTATED:half], second, across[:, half + ROTATED :]]
    return jnp.concatenate(turned, axis=1), dots


def _for_each_quarter(
    schedule: Ref, at: Tile, resident: Resident, stream: Stream, first_step: Array,
    seen_bit: Callable[[Array], Array], quarter: Callable[..., None],
) -> None:  # fmt: skip
    """Run quarter(stage, first row, masked=...) on each streamed half block in which this warpgroup's rows see any."""
    per_entry, group = stream.per_entry, stream.group
    count = at.header.entries * per_entry

    def one_half(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        entry, next_entry = carry
        half, place = lax.rem(i, PARTS), lax.rem(i, per_entry)
        later = schedule[at.header.rank, HEADER + lax.div(i, per_entry) + 2]
        step = first_step + i

        @pl.when(is_filler())
        def _fill() -> None:
            # AHEAD steps are as many as halves of a block: what comes is the same half, of the next head of the group,
            # or of the next entry, or of the next tile's first one; or, where a tile has a prologue, that and then the
            # first half.
            here = i + AHEAD < count
            following = at.more
            if stream.prologue is not None:
                following &= i + AHEAD > count
                pl.when((i + AHEAD == count) & at.more)(lambda: stream.fill_prologue(step + AHEAD, at.following))
            coming, head = next_entry, at.header.head * group
            if group > 1:
                same_block = place + AHEAD < per_entry
                coming = jnp.where(same_block, entry, next_entry)
                head += jnp.where(same_block, lax.div(place + AHEAD, PARTS), 0)
            coming = jnp.where(here, coming, at.following.first_entry)
            head = jnp.where(here, head, at.following.head * group)
            pl.when(here | following)(
                lambda: stream.fill_half(step + AHEAD, coming, jnp.where(here, half, half - stream.extra), head)
            )

        stage = stream.ring.slot(step)
        first_row = (entry >> ENTRY_BITS) * BLOCK_SIZE + half * WARPGROUP_ROWS
        masked = entry & (1 << DOCUMENTS_BIT | 1 << POSITIONS_BIT) != 0
        seen = (entry >> seen_bit(half)) & 1 == 1
        stream.ring.wait(stage)
        pl.when(~masked)(functools.partial(quarter, stage, first_row, masked=False))
        pl.when(masked & seen)(functools.partial(quarter, stage, first_row, masked=True))
        stream.ring.release(stage)
        pl.when(i == 0)(lambda: resident.fill_next(at))
        last = place == per_entry - 1
        return jnp.where(last, next_entry, entry), jnp.where(last, later, next_entry)

    # + 0: inside shard_map JAX says of numbers that are read that they vary over mesh axes, but not of computed ones,
    # and with those the loop goes on.
    lax.fori_loop(0, count, one_half, (at.header.first_entry + 0, at.header.second_entry + 0))
