"""Backward block-sparse attention on Hopper: two kernels that recompute the probabilities from the saved log-sum-exp.

    dQ       holds 128 queries and walks the key blocks of their row        products: S, dP, dQ
    dK, dV   holds 128 keys and walks the query blocks of their column      products: S, dP, dV, dK

Both stream tiles of 64 rows, so that each warpgroup meets quarters of 64 x 64
(P compares, F does not) and passes over those in which no pair is visible:

              keys                                    queries
             [1a 1b][2a 2b]                          [2a 2b][3a 3b]
   q2 0-63    .  P   P  .    warpgroup 0    k2 0-63    P  P   F  F    warpgroup 0
   q2 64-127  .  P   P  P    warpgroup 1    k2 64-127  .  P   F  F    warpgroup 1

For dK and dV a warpgroup computes scores transposed (keys are rows), so that
P^T and dS^T are already in the registers the next product reads. No sum is
shared between programs: two runs give the same bits.

    P = 2^(c S - lse)     dP = dO V^T     dS = P (dP - delta)     delta = rowsum(O dO)
    dV = P^T dO           dQ = scale dS K                         dK = scale dS^T Q

lse / c and delta need no instructions: S and dP start from minus them.

Told how q and k came of products z, a kernel undoes it while the gradient g of n = q or k is in registers. With
n = rotate(norm(r z)) and f = r / rms(r z), as self_attention.py derives,

    dz = f rotate_back(g - n mean_K(g n))     dz_v = r dV

so that g is rounded to bf16 once, as dz, and n is read from where the products read it. What the gradient of r and the
layers before need besides, sum_K(g n) and sum_K(dV v), are a number for each token and head.
Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 2, as two passes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import BLOCK, COMPUTE_WARPGROUPS, DKV, DQ, HALF, MULTIPROCESSORS, HopperConfig
from .attention_hopper_ops import (
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
    ring_barriers,
    rows,
    split_roles,
    tile,
    with_accumulators,
)
from .attention_hopper_producer import Copy, Ring, Tile, for_each_tile, halves, produce, release_last
from .attention_hopper_walk import DOCUMENTS_BIT, ENTRY_BITS, HEADER, POSITIONS_BIT, share_out
from .rotary_hopper import HEAD_WIDTH, ROTATED, rotate

PARTS = BLOCK // HALF
QUARTER = (HALF, HALF)


class Origin(NamedTuple):
    """How q or k came of a product z: rotate(factor * z), with its rotary angles and a factor for each head and token.

    The kernels see the same of references, or None.
    """

    cos_TR: Array  # (T, K / 4) float32
    sin_TR: Array
    factor_HT: Array  # (H, T) float32: r / rms(r z), r the scale of the row


class DqBuffers(NamedTuple):
    """Shared memory of dQ; the first axis is the slot, or (kv, key_documents) the stage."""

    q: Ref
    do: Ref
    lse: Ref
    delta: Ref
    query_documents: Ref
    kv: Ref  # [stage, 0] keys, [stage, 1] values
    key_documents: Ref
    dots: Ref  # of the queries; None without their origin


class DkvBuffers(NamedTuple):
    """Shared memory of dK and dV; the first axis is the slot (k, v, key_documents) or the stage."""

    k: Ref
    v: Ref
    key_documents: Ref
    qdo: Ref  # [stage, 0] queries, [stage, 1] output gradients
    lse: Ref
    delta: Ref
    query_documents: Ref
    sums: Ref  # [slot, warpgroup, 0] dots of the keys, [.., 1] of the values; None without an origin


@functools.partial(jax.jit, static_argnames=("scale", "interpret", "config"))  # lowered once, not once a layer
def backward_dq(
    q_THK: Array, k_THK: Array, v_THK: Array, o_THK: Array, do_THK: Array, lse_HT: Array, documents_T: Array,
    walk: Array, origin: Origin | None = None, *, scale: float, interpret: bool, config: HopperConfig = DQ,
) -> tuple[Array, ...]:  # fmt: skip
    """Gradient of q, (T, H, K) bf16, and delta (H, T) float32. `walk` is `Walks.by_query`.

    With an `origin` the gradient is that of q's product, and the third result (H, T) float32 holds sum_K(dq q).

    Raises:
      ValueError: for an origin with a head width other than 128.
    """
    length, heads, width = q_THK.shape
    _check_origin(origin, width)
    shares = jnp.asarray(share_out(walk.shape[0] * heads, 1 if interpret else MULTIPROCESSORS))

    def body(
        q: Ref, k: Ref, v: Ref, o: Ref, do: Ref, lse: Ref, documents: Ref, walk: Ref, shares: Ref,
        origin: Ref, *out: Ref, smem: DqBuffers, barriers: list[Ref], accumulators: list[Ref],
    ) -> None:  # fmt: skip
        per_query = [
            Copy(lse, lambda slot: smem.lse.at[slot], BLOCK),
            Copy(documents, lambda slot: smem.query_documents.at[slot], BLOCK),
        ]
        per_key = Copy(documents, lambda stage: smem.key_documents.at[stage], HALF)
        keys = Copy(k, lambda stage: smem.kv.at[stage, 0], HALF)
        values = Copy(v, lambda stage: smem.kv.at[stage, 1], HALF)
        hold = Ring([*halves(q, smem.q), *halves(do, smem.do), *per_query], *barriers[:2])
        stream = Ring([keys, values, per_key], *barriers[2:])
        # O is needed once a tile, for delta: it passes through the stream, where it
        # just fills one step, instead of taking resident memory of its own.
        preface = [*halves(o, smem.kv), per_key]

        def consume() -> None:
            one_tile = functools.partial(_dq_tile, walk, origin, out, smem, hold, stream, accumulators, scale)
            count, _ = for_each_tile(walk, shares, heads, one_tile)
            release_last(hold, count)

        split_roles(functools.partial(produce, walk, shares, heads, hold, [stream], HALF, preface), consume, config)

    number = jax.ShapeDtypeStruct((heads, length), jnp.float32)
    results: tuple[Array, ...] = launch(
        body,
        "block_sparse_attention_dq",
        (jax.ShapeDtypeStruct(q_THK.shape, q_THK.dtype), number, *[number] * bool(origin)),
        dict(
            smem=DqBuffers(
                q=tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                do=tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                lse=plgpu.SMEM((config.slots, BLOCK), jnp.float32),
                delta=plgpu.SMEM((config.slots, COMPUTE_WARPGROUPS, HALF), jnp.float32),
                query_documents=plgpu.SMEM((config.slots, BLOCK), jnp.int32),
                kv=tile(config.stages, 2, HALF, width),
                key_documents=plgpu.SMEM((config.stages, HALF), jnp.int32),
                dots=plgpu.SMEM((config.slots, COMPUTE_WARPGROUPS, HALF), jnp.float32) if origin else None,
            ),
            barriers=ring_barriers((2 * COMPUTE_WARPGROUPS + 2, config.slots), (3, config.stages)),
            accumulators=interpreter_buffers((HALF, width), interpret=interpret),
        ),
        programs=shares.shape[0],
        interpret=interpret,
    )(q_THK, k_THK, v_THK, o_THK, do_THK, lse_HT, documents_T, walk, shares, origin)
    return results


@functools.partial(jax.jit, static_argnames=("scale", "interpret", "config"))  # lowered once, not once a layer
def backward_dkv(
    q_THK: Array, k_THK: Array, v_THK: Array, do_THK: Array, lse_HT: Array, delta_HT: Array, documents_T: Array,
    walk: Array, origin: Origin | None = None, scale_T: Array | None = None,
    *, scale: float, interpret: bool, config: HopperConfig = DKV,
) -> tuple[Array, ...]:  # fmt: skip
    """Gradients of k and v, each (T, H, K) bf16. `walk` is `Walks.by_key`.

    With k's `origin` and `scale_T`, (T,) float32, the gradients are those of the products: k's, and v's = scale_T v.
    The third and fourth result, (H, T) float32, then hold sum_K(dk k) and sum_K(dv v).

    Raises:
      ValueError: for an origin with a head width other than 128.
    """
    length, heads, width = q_THK.shape
    _check_origin(origin, width)
    shares = jnp.asarray(share_out(walk.shape[0] * heads, 1 if interpret else MULTIPROCESSORS))

    def body(
        q: Ref, k: Ref, v: Ref, do: Ref, lse: Ref, delta: Ref, documents: Ref, walk: Ref, shares: Ref,
        origin: Ref, v_scale: Ref, *out: Ref,
        smem: DkvBuffers, barriers: list[Ref], accumulators: list[Ref],
    ) -> None:  # fmt: skip
        per_key = Copy(documents, lambda slot: smem.key_documents.at[slot], BLOCK)
        hold = Ring([*halves(k, smem.k), *halves(v, smem.v), per_key], *barriers[:2])
        stream = Ring(
            [
                Copy(q, lambda stage: smem.qdo.at[stage, 0], HALF),
                Copy(do, lambda stage: smem.qdo.at[stage, 1], HALF),
                Copy(lse, lambda stage: smem.lse.at[stage], HALF),
                Copy(delta, lambda stage: smem.delta.at[stage], HALF),
                Copy(documents, lambda stage: smem.query_documents.at[stage], HALF),
            ],
            *barriers[2:],
        )

        def consume() -> None:
            one_tile = functools.partial(_dkv_tile, walk, origin, v_scale, out, smem, hold, stream, accumulators, scale)
            count, _ = for_each_tile(walk, shares, heads, one_tile)
            release_last(hold, count)

        split_roles(functools.partial(produce, walk, shares, heads, hold, [stream], HALF), consume, config)

    gradient, number = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in ((k_THK.shape, k_THK.dtype), ((heads, length), jnp.float32))
    )
    results: tuple[Array, ...] = launch(
        body,
        "block_sparse_attention_dkv",
        (gradient, gradient, *[number, number] * bool(origin)),
        dict(
            smem=DkvBuffers(
                k=tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                v=tile(config.slots, COMPUTE_WARPGROUPS, HALF, width),
                key_documents=plgpu.SMEM((config.slots, BLOCK), jnp.int32),
                qdo=tile(config.stages, 2, HALF, width),
                lse=plgpu.SMEM((config.stages, HALF), jnp.float32),
                delta=plgpu.SMEM((config.stages, HALF), jnp.float32),
                query_documents=plgpu.SMEM((config.stages, HALF), jnp.int32),
                sums=plgpu.SMEM((config.slots, COMPUTE_WARPGROUPS, 2, HALF), jnp.float32) if origin else None,
            ),
            barriers=ring_barriers((2 * COMPUTE_WARPGROUPS + 1, config.slots), (5, config.stages)),
            accumulators=interpreter_buffers((HALF, width), (HALF, width), interpret=interpret),
        ),
        programs=shares.shape[0],
        interpret=interpret,
    )(q_THK, k_THK, v_THK, do_THK, lse_HT, delta_HT, documents_T, walk, shares, origin, scale_T)
    return results


def _dq_tile(
    walk: Ref, origin: Ref, out: Sequence[Ref], smem: DqBuffers, hold: Ring, stream: Ring,
    accumulators: list[Ref], scale: float, at: Tile,
) -> None:  # fmt: skip
    """dQ and delta of this warpgroup's 64 queries; score tiles have queries as rows."""
    warpgroup = lax.axis_index("warpgroup")
    interpret = bool(accumulators)
    c = scale * math.log2(math.e)
    slot, own = hold.slot(at.number), pl.ds(warpgroup * HALF, HALF)
    first_query = at.block * BLOCK + warpgroup * HALF
    queries = pl.ds(first_query, HALF)
    q_tile, do_tile = smem.q.at[slot, warpgroup], smem.do.at[slot, warpgroup]
    first_step = at.entries_before * PARTS + at.number  # each tile before had one step for O
    plgpu.barrier_wait(hold.ready.at[slot])
    lse = plgpu.load(smem.lse.at[slot, own], layout=ROW)

    stage = stream.slot(first_step)
    plgpu.barrier_wait(stream.ready.at[stage])
    o_value = plgpu.load(smem.kv.at[stage, warpgroup], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    do_value = plgpu.load(do_tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    delta = (o_value * do_value).sum(axis=1)
    smem.delta[slot, warpgroup] = delta
    plgpu.barrier_arrive(stream.free.at[stage])

    def over_the_row(dq_acc: Ref) -> None:
        def quarter(stage: Array, first_key: Array, *, masked: bool) -> None:
            k_tile, v_tile = smem.kv.at[stage, 0], smem.kv.at[stage, 1]
            s_start, dp_start = rows(-lse / c, QUARTER), rows(-delta, QUARTER)

            def score_gradient(s_acc: Ref, dp_acc: Ref) -> Array:
                preload(s_acc, s_start, interpret=interpret)
                preload(dp_acc, dp_start, interpret=interpret)
                plgpu.wgmma(s_acc, q_tile, k_tile.transpose((1, 0)))
                plgpu.wgmma(dp_acc, do_tile, v_tile.transpose((1, 0)))
                p = jnp.exp2(read_preloaded(s_acc, s_start, in_flight=1, interpret=interpret) * c)
                if masked:
                    documents_q = plgpu.load(smem.query_documents.at[slot, own], layout=ROW)
                    documents_k = plgpu.load(smem.key_documents.at[stage], layout=COLUMN)
                    same = rows(documents_q, QUARTER) == columns(documents_k, QUARTER)
                    position_k = columns(positions(first_key, HALF, COLUMN), QUARTER)
                    p = jnp.where(same & (position_k <= rows(positions(first_query, HALF, ROW), QUARTER)), p, 0.0)
                return p * read_preloaded(dp_acc, dp_start, in_flight=0, interpret=interpret)

            ds = pl.run_scoped(score_gradient, plgpu.ACC(QUARTER, jnp.float32), plgpu.ACC(QUARTER, jnp.float32))
            multiply_add(dq_acc, ds.astype(jnp.bfloat16), k_tile, interpret=interpret)
            plgpu.wgmma_wait(0)

        _for_each_quarter(walk, at, hold, stream, first_step + 1, lambda half: 2 * warpgroup + half, quarter)
        gradient = dq_acc[...] * scale
        if origin is not None:
            of_rows = _load_origin(origin, at.head, queries)
            gradient, smem.dots[slot, warpgroup] = _undo(gradient, q_tile, *of_rows)
        q_tile[...] = gradient.astype(jnp.bfloat16)

    with_accumulators(over_the_row, q_tile.shape, buffers=accumulators)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, out[0].at[queries, at.head])
    plgpu.copy_smem_to_gmem(smem.delta.at[slot, warpgroup], out[1].at[at.head, queries])
    if origin is not None:
        plgpu.copy_smem_to_gmem(smem.dots.at[slot, warpgroup], out[2].at[at.head, queries])


def _dkv_tile(
    walk: Ref, origin: Ref, v_scale: Ref, out: Sequence[Ref], smem: DkvBuffers, hold: Ring,
    stream: Ring, accumulators: list[Ref], scale: float, at: Tile,
) -> None:  # fmt: skip
    """dK and dV of this warpgroup's 64 keys; score tiles are transposed, with keys as rows."""
    warpgroup = lax.axis_index("warpgroup")
    interpret = bool(accumulators)
    c = scale * math.log2(math.e)
    slot, own = hold.slot(at.number), pl.ds(warpgroup * HALF, HALF)
    first_key = at.block * BLOCK + warpgroup * HALF
    keys = pl.ds(first_key, HALF)
    k_tile, v_tile = smem.k.at[slot, warpgroup], smem.v.at[slot, warpgroup]
    plgpu.barrier_wait(hold.ready.at[slot])

    def over_the_column(dk_acc: Ref, dv_acc: Ref) -> None:
        def quarter(stage: Array, first_query: Array, *, masked: bool) -> None:
            q_tile, do_tile = smem.qdo.at[stage, 0], smem.qdo.at[stage, 1]

            def score_gradient(s_acc: Ref, dp_acc: Ref) -> Array:
                s_start = columns(plgpu.load(smem.lse.at[stage], layout=COLUMN) * (-1 / c), QUARTER)
                dp_start = columns(-plgpu.load(smem.delta.at[stage], layout=COLUMN), QUARTER)
                preload(s_acc, s_start, interpret=interpret)
                preload(dp_acc, dp_start, interpret=interpret)
                plgpu.wgmma(s_acc, k_tile, q_tile.transpose((1, 0)))
                plgpu.wgmma(dp_acc, v_tile, do_tile.transpose((1, 0)))
                p = jnp.exp2(read_preloaded(s_acc, s_start, in_flight=1, interpret=interpret) * c)
                if masked:
                    documents_k = plgpu.load(smem.key_documents.at[slot, own], layout=ROW)
                    documents_q = plgpu.load(smem.query_documents.at[stage], layout=COLUMN)
                    same = rows(documents_k, QUARTER) == columns(documents_q, QUARTER)
                    position_q = columns(positions(first_query, HALF, COLUMN), QUARTER)
                    p = jnp.where(same & (rows(positions(first_key, HALF, ROW), QUARTER) <= position_q), p, 0.0)
                multiply_add(dv_acc, p.astype(jnp.bfloat16), do_tile, interpret=interpret)
                return p * read_preloaded(dp_acc, dp_start, in_flight=1, interpret=interpret)  # dV may still run

            ds = pl.run_scoped(score_gradient, plgpu.ACC(QUARTER, jnp.float32), plgpu.ACC(QUARTER, jnp.float32))
            multiply_add(dk_acc, ds.astype(jnp.bfloat16), q_tile, interpret=interpret)
            plgpu.wgmma_wait(0)

        first_step = at.entries_before * PARTS
        _for_each_quarter(walk, at, hold, stream, first_step, lambda half: 2 * half + warpgroup, quarter)
        if origin is None:
            k_tile[...] = (dk_acc[...] * scale).astype(jnp.bfloat16)
            v_tile[...] = dv_acc[...].astype(jnp.bfloat16)
            return
        of_rows = _load_origin(origin, at.head, keys)
        v_factor = plgpu.load(v_scale.at[keys], layout=ROW, optimized=False)
        # v first, while what k needs is on its way.
        d_v = plgpu.layout_cast(dv_acc[...], plgpu.Layout.WGMMA)
        smem.sums[slot, warpgroup, 1] = (d_v * _tile_values(v_tile)).sum(axis=1)
        v_tile[...] = (d_v * rows(v_factor, v_tile.shape)).astype(jnp.bfloat16)
        d_k, smem.sums[slot, warpgroup, 0] = _undo(dk_acc[...] * scale, k_tile, *of_rows)
        k_tile[...] = d_k.astype(jnp.bfloat16)

    with_accumulators(over_the_column, k_tile.shape, v_tile.shape, buffers=accumulators)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_tile, out[0].at[keys, at.head])
    plgpu.copy_smem_to_gmem(v_tile, out[1].at[keys, at.head])
    if origin is not None:
        for i, sums in enumerate(out[2:]):
            plgpu.copy_smem_to_gmem(smem.sums.at[slot, warpgroup, i], sums.at[at.head, keys])


def _check_origin(origin: Origin | None, width: int) -> None:
    if origin is not None and width != HEAD_WIDTH:
        raise ValueError(f"an origin needs head width {HEAD_WIDTH}, got {width}: undo norm and rotation outside")


def _load_origin(origin: Ref, head: Array, own: pl.Slice) -> tuple[Array, Array, Array]:
    """Cosines and sines, (64, K / 4), and factors of the rows `own`."""
    cos, sin = (plgpu.load(ref.at[own], layout=plgpu.Layout.WGMMA, optimized=False) for ref in origin[:2])
    return cos, sin, plgpu.load(origin.factor_HT.at[head, own], layout=ROW, optimized=False)


def _tile_values(tile: Ref) -> Array:
    return plgpu.load(tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _undo(g: Array, n_tile: Ref, cos: Array, sin: Array, factor: Array) -> tuple[Array, Array]:
    """Gradient of z, where rotate(factor z) = n has gradient g, and the rows' inner products of g and n; float32."""
    g, n = plgpu.layout_cast(g, plgpu.Layout.WGMMA), _tile_values(n_tile)
    dots = (g * n).sum(axis=1)
    across = (g - n * rows(dots * (1 / HEAD_WIDTH), n_tile.shape)) * rows(factor, n_tile.shape)
    half = HEAD_WIDTH // 2
    first, second = rotate([across[:, :ROTATED], across[:, half : half + ROTATED]], cos, -sin)
    turned = [first, across[:, ROTATED:half], second, across[:, half + ROTATED :]]
    return jnp.concatenate(turned, axis=1), dots


def _for_each_quarter(
    walk: Ref, at: Tile, hold: Ring, stream: Ring, first_step: Array, seen_bit: Callable[[Array], Array],
    quarter: Callable[..., None],
) -> None:  # fmt: skip
    """Run quarter(stage, first row, masked=...) on each streamed half block in which this warpgroup's rows see any."""

    def one_half(i: Array, entry: Array) -> Array:
        following = walk[at.rank, HEADER + lax.div(i + 1, PARTS)]
        half = lax.rem(i, PARTS)
        stage = stream.slot(first_step + i)
        first_row = (entry >> ENTRY_BITS) * BLOCK + half * HALF
        masked = entry & (1 << DOCUMENTS_BIT | 1 << POSITIONS_BIT) != 0
        seen = (entry >> seen_bit(half)) & 1 == 1
        plgpu.barrier_wait(stream.ready.at[stage])
        pl.when(~masked)(functools.partial(quarter, stage, first_row, masked=False))
        pl.when(masked & seen)(functools.partial(quarter, stage, first_row, masked=True))
        plgpu.barrier_arrive(stream.free.at[stage])
        pl.when(i == 0)(lambda: release_last(hold, at.number))
        return following

    lax.fori_loop(0, at.entries * PARTS, one_half, at.first_entry)
    pl.when(at.entries == 0)(lambda: release_last(hold, at.number))
