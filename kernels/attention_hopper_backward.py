"""Backward block-sparse attention on Hopper: two kernels that recompute the probabilities from the saved log-sum-exp.

    dQ      holds 128 queries and walks the key blocks of their row     (3 products a quarter, after
    dK, dV  holds 128 keys and walks the query blocks of their column    S: dP, dQ; then S, dP, dV, dK)

Both stream tiles of 64 rows, so that each warpgroup meets quarters of 64 x 64
and passes over those in which no pair is visible:

            keys                                queries
           [0a 0b][1a 1b]                      [1a 1b][2a 2b]
  q 0-63    .  .   P  .    warpgroup 0   k 0-63  P  P   F  F    warpgroup 0
  q 64-127  F  F   P  P    warpgroup 1   k 64-   .  P   F  F    warpgroup 1

For dK and dV a warpgroup computes scores transposed (keys are rows), so that
P^T and dS^T leave the softmax in the registers the next product reads. No sum
is shared between programs: two runs give the same bits.

    P = 2^(c S - lse)     dP = dO V^T     dS = P (dP - delta)     delta = rowsum(O dO)
    dV = P^T dO           dQ = scale dS K                         dK = scale dS^T Q
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import COMPUTE_WARPGROUPS, DKV, DQ, HALF, KEY_BLOCK, MULTIPROCESSORS, QUERY_BLOCK, HopperConfig
from .attention_hopper_ops import (
    COLUMN,
    ROW,
    columns,
    interpreter_buffers,
    launch,
    multiply_add,
    preload,
    read,
    ring_barriers,
    rows,
    split_roles,
    tile,
    with_accumulators,
)
from .attention_hopper_producer import Copy, Ring, Tile, for_each_tile, halves, produce, release_last
from .attention_hopper_walk import DOCUMENTS_BIT, ENTRY_BITS, HEADER, POSITIONS_BIT, share_out

PARTS = KEY_BLOCK // HALF
SCORES = plgpu.ACC((HALF, HALF), jnp.float32)


def backward_dq(
    q_THK: Array,
    k_THK: Array,
    v_THK: Array,
    o_THK: Array,
    do_THK: Array,
    lse_HT: Array,
    documents_T: Array,
    walk: Array,
    *,
    scale: float,
    interpret: bool,
    config: HopperConfig = DQ,
) -> tuple[Array, Array]:
    """Gradient of q, (T, H, K) bf16, and delta (H, T) float32. `walk` is `Walks.by_query`."""
    length, heads, width = q_THK.shape
    shares = jnp.asarray(share_out(walk.shape[0] * heads, 1 if interpret else MULTIPROCESSORS))

    def body(q, k, v, o, do, lse, documents, walk, shares, dq, delta, *, smem, barriers, accumulators) -> None:
        q_smem, do_smem, lse_smem, query_documents, kv_smem, key_documents, delta_smem = smem
        hold = Ring(
            [
                *halves(q, q_smem),
                *halves(do, do_smem),
                Copy(lse, lambda slot: lse_smem.at[slot], QUERY_BLOCK),
                Copy(documents, lambda slot: query_documents.at[slot], QUERY_BLOCK),
            ],
            *barriers[:2],
        )
        stream_documents = Copy(documents, lambda stage: key_documents.at[stage], HALF)
        stream = Ring(
            [
                Copy(k, lambda stage: kv_smem.at[stage, 0], HALF),
                Copy(v, lambda stage: kv_smem.at[stage, 1], HALF),
                stream_documents,
            ],
            *barriers[2:],
        )
        # O is needed once a tile, for delta: it passes through the stream, where
        # it just fills one step, instead of taking resident memory of its own.
        preface = [*halves(o, kv_smem), stream_documents]

        one_tile = functools.partial(_one_dq_tile, walk, dq, delta, hold, stream, smem, accumulators, scale)
        split_roles(
            functools.partial(produce, walk, shares, heads, hold, [stream], HALF, preface),
            functools.partial(_consume, walk, shares, heads, hold, one_tile),
            config,
        )

    return launch(
        body,
        "block_sparse_attention_dq",
        (jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype), jax.ShapeDtypeStruct((heads, length), jnp.float32)),
        dict(
            smem=[
                tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                plgpu.SMEM((config.slots, QUERY_BLOCK), jnp.float32),
                plgpu.SMEM((config.slots, QUERY_BLOCK), jnp.int32),
                tile(config.stages, 2, HALF, width),
                plgpu.SMEM((config.stages, HALF), jnp.int32),
                plgpu.SMEM((config.slots, COMPUTE_WARPGROUPS, HALF), jnp.float32),
            ],
            barriers=ring_barriers((2 * COMPUTE_WARPGROUPS + 2, config.slots), (3, config.stages)),
            accumulators=interpreter_buffers((HALF, width), interpret=interpret),
        ),
        programs=shares.shape[0],
        interpret=interpret,
    )(q_THK, k_THK, v_THK, o_THK, do_THK, lse_HT, documents_T, walk, shares)


def backward_dkv(
    q_THK: Array,
    k_THK: Array,
    v_THK: Array,
    do_THK: Array,
    lse_HT: Array,
    delta_HT: Array,
    documents_T: Array,
    walk: Array,
    *,
    scale: float,
    interpret: bool,
    config: HopperConfig = DKV,
) -> tuple[Array, Array]:
    """Gradients of k and v, each (T, H, K) bf16. `walk` is `Walks.by_key`."""
    length, heads, width = q_THK.shape
    shares = jnp.asarray(share_out(walk.shape[0] * heads, 1 if interpret else MULTIPROCESSORS))

    def body(q, k, v, do, lse, delta, documents, walk, shares, dk, dv, *, smem, barriers, accumulators) -> None:
        k_smem, v_smem, key_documents, qdo_smem, lse_smem, delta_smem, query_documents = smem
        hold = Ring(
            [
                *halves(k, k_smem),
                *halves(v, v_smem),
                Copy(documents, lambda slot: key_documents.at[slot], KEY_BLOCK),
            ],
            *barriers[:2],
        )
        stream = Ring(
            [
                Copy(q, lambda stage: qdo_smem.at[stage, 0], HALF),
                Copy(do, lambda stage: qdo_smem.at[stage, 1], HALF),
                Copy(lse, lambda stage: lse_smem.at[stage], HALF),
                Copy(delta, lambda stage: delta_smem.at[stage], HALF),
                Copy(documents, lambda stage: query_documents.at[stage], HALF),
            ],
            *barriers[2:],
        )

        one_tile = functools.partial(_one_dkv_tile, walk, dk, dv, hold, stream, smem, accumulators, scale)
        split_roles(
            functools.partial(produce, walk, shares, heads, hold, [stream], HALF),
            functools.partial(_consume, walk, shares, heads, hold, one_tile),
            config,
        )

    out = jax.ShapeDtypeStruct(k_THK.shape, k_THK.dtype)
    return launch(
        body,
        "block_sparse_attention_dkv",
        (out, out),
        dict(
            smem=[
                tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                plgpu.SMEM((config.slots, KEY_BLOCK), jnp.int32),
                tile(config.stages, 2, HALF, width),
                plgpu.SMEM((config.stages, HALF), jnp.float32),
                plgpu.SMEM((config.stages, HALF), jnp.float32),
                plgpu.SMEM((config.stages, HALF), jnp.int32),
            ],
            barriers=ring_barriers((2 * COMPUTE_WARPGROUPS + 1, config.slots), (5, config.stages)),
            accumulators=interpreter_buffers((HALF, width), (HALF, width), interpret=interpret),
        ),
        programs=shares.shape[0],
        interpret=interpret,
    )(q_THK, k_THK, v_THK, do_THK, lse_HT, delta_HT, documents_T, walk, shares)


def _consume(walk, shares, heads, hold: Ring, one_tile) -> None:
    count, _ = for_each_tile(walk, shares, heads, one_tile)
    release_last(hold, count)


def _for_each_quarter(walk, at: Tile, hold: Ring, stream: Ring, first_step: Array, seen_bit, quarter) -> None:
    """Run quarter(stage, first row, masked) on each streamed half block that this warpgroup needs."""

    def one_half(i: Array, entry: Array) -> Array:
        following = walk[at.rank, HEADER + lax.div(i + 1, PARTS)]
        half = lax.rem(i, PARTS)
        stage = stream.slot(first_step + i)
        first_row = (entry >> ENTRY_BITS) * KEY_BLOCK + half * HALF
        partial = ((entry >> DOCUMENTS_BIT) & 1) | ((entry >> POSITIONS_BIT) & 1)
        seen = (entry >> seen_bit(half)) & 1
        plgpu.barrier_wait(stream.ready.at[stage])
        pl.when(partial == 0)(functools.partial(quarter, stage, first_row, masked=False))
        pl.when((partial == 1) & (seen == 1))(functools.partial(quarter, stage, first_row, masked=True))
        plgpu.barrier_arrive(stream.free.at[stage])
        pl.when(i == 0)(lambda: release_last(hold, at.index))
        return following

    lax.fori_loop(0, at.entries * PARTS, one_half, at.first_entry)
    pl.when(at.entries == 0)(lambda: release_last(hold, at.index))


def _one_dq_tile(walk, dq, delta_out, hold: Ring, stream: Ring, smem, accumulators, scale, at: Tile) -> None:
    """dQ and delta of this warpgroup's 64 queries; score tiles have queries as rows."""
    warpgroup = lax.axis_index("warpgroup")
    q_smem, do_smem, lse_smem, query_documents, kv_smem, key_documents, delta_smem = smem
    c = scale * math.log2(math.e)
    interpret = bool(accumulators)
    slot = hold.slot(at.index)
    own = pl.ds(warpgroup * HALF, HALF)
    first_query = at.block * QUERY_BLOCK + warpgroup * HALF
    q_tile, do_tile = q_smem.at[slot, warpgroup], do_smem.at[slot, warpgroup]
    first_step = at.entries_before * PARTS + at.index
    plgpu.barrier_wait(hold.ready.at[slot])
    lse = plgpu.load(lse_smem.at[slot, own], layout=ROW)
    documents_q = plgpu.load(query_documents.at[slot, own], layout=ROW)
    position_q = first_query + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROW)

    stage = stream.slot(first_step)
    plgpu.barrier_wait(stream.ready.at[stage])
    o_value = plgpu.load(kv_smem.at[stage, warpgroup], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    do_value = plgpu.load(do_tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    delta = (o_value * do_value).sum(axis=1)
    delta_smem[slot, warpgroup] = delta
    plgpu.barrier_arrive(stream.free.at[stage])

    def accumulate(dq_acc: jax.Ref) -> None:
        def quarter(stage: Array, first_key: Array, *, masked: bool) -> None:
            k_tile, v_tile = kv_smem.at[stage, 0], kv_smem.at[stage, 1]
            s_start, dp_start = rows(-lse / c, (HALF, HALF)), rows(-delta, (HALF, HALF))

            def score_gradient(s_acc: jax.Ref, dp_acc: jax.Ref) -> Array:
                preload(s_acc, s_start, interpret=interpret)
                preload(dp_acc, dp_start, interpret=interpret)
                plgpu.wgmma(s_acc, q_tile, k_tile.transpose((1, 0)))
                plgpu.wgmma(dp_acc, do_tile, v_tile.transpose((1, 0)))
                p = jnp.exp2(read(s_acc, s_start, in_flight=1, interpret=interpret) * c)
                if masked:
                    documents_k = plgpu.load(key_documents.at[stage], layout=COLUMN)
                    position_k = first_key + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=COLUMN)
                    visible = (rows(documents_q, p.shape) == columns(documents_k, p.shape)) & (
                        columns(position_k, p.shape) <= rows(position_q, p.shape)
                    )
                    p = jnp.where(visible, p, 0.0)
                return p * read(dp_acc, dp_start, in_flight=0, interpret=interpret)

            ds = pl.run_scoped(score_gradient, SCORES, SCORES)
            multiply_add(dq_acc, ds.astype(jnp.bfloat16), k_tile, interpret=interpret)
            plgpu.wgmma_wait(0)

        _for_each_quarter(walk, at, hold, stream, first_step + 1, lambda half: 2 * warpgroup + half, quarter)
        q_tile[...] = (dq_acc[...] * scale).astype(jnp.bfloat16)

    with_accumulators(accumulate, q_tile.shape, buffers=accumulators)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, dq.at[pl.ds(first_query, HALF), at.head])
    plgpu.copy_smem_to_gmem(delta_smem.at[slot, warpgroup], delta_out.at[at.head, pl.ds(first_query, HALF)])


def _one_dkv_tile(walk, dk, dv, hold: Ring, stream: Ring, smem, accumulators, scale, at: Tile) -> None:
    """dK and dV of this warpgroup's 64 keys; score tiles are transposed, with keys as rows."""
    warpgroup = lax.axis_index("warpgroup")
    k_smem, v_smem, key_documents, qdo_smem, lse_smem, delta_smem, query_documents = smem
    c = scale * math.log2(math.e)
    interpret = bool(accumulators)
    slot = hold.slot(at.index)
    first_key = at.block * KEY_BLOCK + warpgroup * HALF
    k_tile, v_tile = k_smem.at[slot, warpgroup], v_smem.at[slot, warpgroup]
    plgpu.barrier_wait(hold.ready.at[slot])
    documents_k = plgpu.load(key_documents.at[slot, pl.ds(warpgroup * HALF, HALF)], layout=ROW)
    position_k = first_key + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROW)

    def accumulate(dk_acc: jax.Ref, dv_acc: jax.Ref) -> None:
        def quarter(stage: Array, first_query: Array, *, masked: bool) -> None:
            q_tile, do_tile = qdo_smem.at[stage, 0], qdo_smem.at[stage, 1]

            def score_gradient(s_acc: jax.Ref, dp_acc: jax.Ref) -> Array:
                s_start = columns(plgpu.load(lse_smem.at[stage], layout=COLUMN) * (-1 / c), (HALF, HALF))
                dp_start = columns(-plgpu.load(delta_smem.at[stage], layout=COLUMN), (HALF, HALF))
                preload(s_acc, s_start, interpret=interpret)
                preload(dp_acc, dp_start, interpret=interpret)
                plgpu.wgmma(s_acc, k_tile, q_tile.transpose((1, 0)))
                plgpu.wgmma(dp_acc, v_tile, do_tile.transpose((1, 0)))
                p = jnp.exp2(read(s_acc, s_start, in_flight=1, interpret=interpret) * c)
                if masked:
                    documents_q = plgpu.load(query_documents.at[stage], layout=COLUMN)
                    position_q = first_query + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=COLUMN)
                    visible = (rows(documents_k, p.shape) == columns(documents_q, p.shape)) & (
                        rows(position_k, p.shape) <= columns(position_q, p.shape)
                    )
                    p = jnp.where(visible, p, 0.0)
                multiply_add(dv_acc, p.astype(jnp.bfloat16), do_tile, interpret=interpret)
                return p * read(dp_acc, dp_start, in_flight=1, interpret=interpret)  # dV may still run

            ds = pl.run_scoped(score_gradient, SCORES, SCORES)
            multiply_add(dk_acc, ds.astype(jnp.bfloat16), q_tile, interpret=interpret)
            plgpu.wgmma_wait(0)

        first_step = at.entries_before * PARTS
        _for_each_quarter(walk, at, hold, stream, first_step, lambda half: 2 * half + warpgroup, quarter)
        k_tile[...] = (dk_acc[...] * scale).astype(jnp.bfloat16)
        v_tile[...] = dv_acc[...].astype(jnp.bfloat16)

    with_accumulators(accumulate, k_tile.shape, v_tile.shape, buffers=accumulators)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_tile, dk.at[pl.ds(first_key, HALF), at.head])
    plgpu.copy_smem_to_gmem(v_tile, dv.at[pl.ds(first_key, HALF), at.head])
