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
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import COMPUTE_WARPGROUPS, DKV, DQ, HALF, KEY_BLOCK, QUERY_BLOCK, HopperConfig
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

PARTS = KEY_BLOCK // HALF
SCORES = plgpu.ACC((HALF, HALF), jnp.float32)


def backward_dq(
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
    config: HopperConfig = DQ,
) -> Array:
    """Gradient of q, (T, H, K) bf16. `walk` is `Walks.by_query`."""
    length, heads, width = q_THK.shape
    resident = (config.slots, COMPUTE_WARPGROUPS, HALF, width)
    streamed = (config.stages, HALF, width)

    def body(q, k, v, do, lse, delta, documents, walk, dq, *, buffers, barriers, accumulators) -> None:
        q_smem, do_smem, lse_smem, delta_smem, query_documents, k_smem, v_smem, key_documents = buffers
        hold = Ring(
            (q, do, lse, delta, documents), (q_smem, do_smem, lse_smem, delta_smem, query_documents), *barriers[:2]
        )
        stream = Ring((k, v, documents), (k_smem, v_smem, key_documents), *barriers[2:])
        split_roles(
            functools.partial(produce, walk, heads, config, hold, [stream], HALF),
            functools.partial(
                _consume_dq, walk, dq, hold, stream, scale=scale, config=config, accumulators=accumulators
            ),
            config,
        )

    return _launch(
        body,
        "block_sparse_attention_dq",
        jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype),
        buffers=[
            tile(*resident),
            tile(*resident),
            plgpu.SMEM((config.slots, QUERY_BLOCK), jnp.float32),
            plgpu.SMEM((config.slots, QUERY_BLOCK), jnp.float32),
            plgpu.SMEM((config.slots, QUERY_BLOCK), jnp.int32),
            tile(*streamed),
            tile(*streamed),
            plgpu.SMEM((config.stages, HALF), jnp.int32),
        ],
        arrivals=(2 * COMPUTE_WARPGROUPS + 3, 3),
        accumulators=interpreter_buffers((HALF, width), interpret=interpret),
        tiles=walk.shape[0] * heads,
        config=config,
        interpret=interpret,
    )(q_THK, k_THK, v_THK, do_THK, lse_HT, delta_HT, documents_T, walk)


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
    resident = (config.slots, COMPUTE_WARPGROUPS, HALF, width)
    streamed = (config.stages, HALF, width)

    def body(q, k, v, do, lse, delta, documents, walk, dk, dv, *, buffers, barriers, accumulators) -> None:
        k_smem, v_smem, key_documents, q_smem, do_smem, lse_smem, delta_smem, query_documents = buffers
        hold = Ring((k, v, documents), (k_smem, v_smem, key_documents), *barriers[:2])
        stream = Ring(
            (q, do, lse, delta, documents), (q_smem, do_smem, lse_smem, delta_smem, query_documents), *barriers[2:]
        )
        split_roles(
            functools.partial(produce, walk, heads, config, hold, [stream], HALF),
            functools.partial(
                _consume_dkv, walk, dk, dv, hold, stream, scale=scale, config=config, accumulators=accumulators
            ),
            config,
        )

    out = jax.ShapeDtypeStruct(k_THK.shape, k_THK.dtype)
    return _launch(
        body,
        "block_sparse_attention_dkv",
        (out, out),
        buffers=[
            tile(*resident),
            tile(*resident),
            plgpu.SMEM((config.slots, KEY_BLOCK), jnp.int32),
            tile(*streamed),
            tile(*streamed),
            plgpu.SMEM((config.stages, HALF), jnp.float32),
            plgpu.SMEM((config.stages, HALF), jnp.float32),
            plgpu.SMEM((config.stages, HALF), jnp.int32),
        ],
        arrivals=(2 * COMPUTE_WARPGROUPS + 1, 5),
        accumulators=interpreter_buffers((HALF, width), (HALF, width), interpret=interpret),
        tiles=walk.shape[0] * heads,
        config=config,
        interpret=interpret,
    )(q_THK, k_THK, v_THK, do_THK, lse_HT, delta_HT, documents_T, walk)


def _launch(
    body: Callable[..., None],
    name: str,
    out_type: Any,
    *,
    buffers: list[pl.MemoryRef],
    arrivals: tuple[int, int],
    accumulators: list[pl.MemoryRef],
    tiles: int,
    config: HopperConfig,
    interpret: bool,
) -> Callable[..., Any]:
    free = functools.partial(plgpu.Barrier, num_arrivals=COMPUTE_WARPGROUPS)
    barriers = [
        plgpu.Barrier(num_arrivals=arrivals[0], num_barriers=config.slots),
        free(num_barriers=config.slots),
        plgpu.Barrier(num_arrivals=arrivals[1], num_barriers=config.stages),
        free(num_barriers=config.stages),
    ]
    scratch = dict(buffers=buffers, barriers=barriers, accumulators=accumulators)
    return launch(body, name, out_type, scratch, programs=pl.cdiv(tiles, config.tiles), interpret=interpret)


def _for_each_quarter(walk, at: Tile, stream: Ring, seen_bit, quarter) -> None:
    """Run `quarter(stage, other_block, half, masked)` on each streamed half block that this warpgroup needs."""

    @pl.loop(0, at.entries * PARTS)
    def _step(step: Array) -> None:
        stage = lax.rem(at.first_entry * PARTS + step, stream.ready.shape[0])
        entry = walk[at.rank, HEADER + lax.div(step, PARTS)]
        half = lax.rem(step, PARTS)
        first_row = (entry >> ENTRY_BITS) * KEY_BLOCK + half * HALF
        partial = (entry >> PARTIAL_BIT) & 1
        seen = (entry >> seen_bit(half)) & 1
        plgpu.barrier_wait(stream.ready.at[stage])
        pl.when(partial == 0)(lambda: quarter(stage, first_row, masked=False))
        pl.when((partial == 1) & (seen == 1))(lambda: quarter(stage, first_row, masked=True))
        plgpu.barrier_arrive(stream.free.at[stage])


def _consume_dq(walk, dq, hold: Ring, stream: Ring, *, scale, config, accumulators) -> None:
    """dQ of 64 rows of each tile; score tiles have queries as rows."""
    warpgroup = lax.axis_index("warpgroup")
    q_smem, do_smem, lse_smem, delta_smem, query_documents = hold.buffers
    k_smem, v_smem, key_documents = stream.buffers
    c = scale * math.log2(math.e)

    def one_tile(at: Tile) -> None:
        slot = lax.rem(at.index, hold.ready.shape[0])
        first_query = at.block * QUERY_BLOCK + warpgroup * HALF
        own = pl.ds(warpgroup * HALF, HALF)
        q_tile, do_tile = q_smem.at[slot, warpgroup], do_smem.at[slot, warpgroup]
        plgpu.barrier_wait(hold.ready.at[slot])
        lse = plgpu.load(lse_smem.at[slot, own], layout=ROW)
        delta = plgpu.load(delta_smem.at[slot, own], layout=ROW)
        documents_q = plgpu.load(query_documents.at[slot, own], layout=ROW)
        position_q = first_query + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROW)

        def accumulate(dq_acc: jax.Ref) -> None:
            def quarter(stage: Array, first_key: Array, *, masked: bool) -> None:
                def score_gradient(s_acc: jax.Ref, dp_acc: jax.Ref) -> Array:
                    plgpu.wgmma(s_acc, q_tile, k_smem.at[stage].transpose((1, 0)))
                    plgpu.wgmma(dp_acc, do_tile, v_smem.at[stage].transpose((1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    p = jnp.exp2(s * c - rows(lse, s))
                    if masked:
                        documents_k = plgpu.load(key_documents.at[stage], layout=COLUMN)
                        position_k = first_key + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=COLUMN)
                        visible = (rows(documents_q, s) == columns(documents_k, s)) & (
                            columns(position_k, s) <= rows(position_q, s)
                        )
                        p = jnp.where(visible, p, 0.0)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                    return p * (dp - rows(delta, dp))

                ds = pl.run_scoped(score_gradient, SCORES, SCORES)
                multiply_add(dq_acc, ds.astype(jnp.bfloat16), k_smem.at[stage], interpret=bool(accumulators))
                plgpu.wgmma_wait(0)

            _for_each_quarter(walk, at, stream, lambda half: 2 * warpgroup + half, quarter)
            q_tile[...] = (dq_acc[...] * scale).astype(jnp.bfloat16)

        with_accumulators(accumulate, q_tile.shape, buffers=accumulators)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, dq.at[pl.ds(first_query, HALF), at.head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(hold.free.at[slot])

    for_each_tile(walk, dq.shape[1], config, one_tile)


def _consume_dkv(walk, dk, dv, hold: Ring, stream: Ring, *, scale, config, accumulators) -> None:
    """dK and dV of 64 rows of each tile; score tiles are transposed, with keys as rows."""
    warpgroup = lax.axis_index("warpgroup")
    k_smem, v_smem, key_documents = hold.buffers
    q_smem, do_smem, lse_smem, delta_smem, query_documents = stream.buffers
    c = scale * math.log2(math.e)
    interpret = bool(accumulators)

    def one_tile(at: Tile) -> None:
        slot = lax.rem(at.index, hold.ready.shape[0])
        first_key = at.block * KEY_BLOCK + warpgroup * HALF
        k_tile, v_tile = k_smem.at[slot, warpgroup], v_smem.at[slot, warpgroup]
        plgpu.barrier_wait(hold.ready.at[slot])
        documents_k = plgpu.load(key_documents.at[slot, pl.ds(warpgroup * HALF, HALF)], layout=ROW)
        position_k = first_key + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROW)

        def accumulate(dk_acc: jax.Ref, dv_acc: jax.Ref) -> None:
            def quarter(stage: Array, first_query: Array, *, masked: bool) -> None:
                def score_gradient(s_acc: jax.Ref, dp_acc: jax.Ref) -> Array:
                    plgpu.wgmma(s_acc, k_tile, q_smem.at[stage].transpose((1, 0)))
                    plgpu.wgmma(dp_acc, v_tile, do_smem.at[stage].transpose((1, 0)))
                    lse = plgpu.load(lse_smem.at[stage], layout=COLUMN)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    p = jnp.exp2(s * c - columns(lse, s))
                    if masked:
                        documents_q = plgpu.load(query_documents.at[stage], layout=COLUMN)
                        position_q = first_query + plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=COLUMN)
                        visible = (rows(documents_k, s) == columns(documents_q, s)) & (
                            rows(position_k, s) <= columns(position_q, s)
                        )
                        p = jnp.where(visible, p, 0.0)
                    multiply_add(dv_acc, p.astype(jnp.bfloat16), do_smem.at[stage], interpret=interpret)
                    delta = plgpu.load(delta_smem.at[stage], layout=COLUMN)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)  # dV may still run
                    return p * (dp - columns(delta, dp))

                ds = pl.run_scoped(score_gradient, SCORES, SCORES)
                multiply_add(dk_acc, ds.astype(jnp.bfloat16), q_smem.at[stage], interpret=interpret)
                plgpu.wgmma_wait(0)

            _for_each_quarter(walk, at, stream, lambda half: 2 * half + warpgroup, quarter)
            k_tile[...] = (dk_acc[...] * scale).astype(jnp.bfloat16)
            v_tile[...] = dv_acc[...].astype(jnp.bfloat16)

        with_accumulators(accumulate, k_tile.shape, v_tile.shape, buffers=accumulators)
        plgpu.commit_smem()
        own = pl.ds(first_key, HALF)
        plgpu.copy_smem_to_gmem(k_tile, dk.at[own, at.head])
        plgpu.copy_smem_to_gmem(v_tile, dv.at[own, at.head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(hold.free.at[slot])

    for_each_tile(walk, dk.shape[1], config, one_tile)
