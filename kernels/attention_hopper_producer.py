"""The copying warpgroup, shared by the three Hopper attention kernels, and the loop over tiles all warpgroups run.

A kernel keeps one *resident* tile (128 rows of this side, as two halves of 64)
and *streams* tiles of the other side past it. Both live in rings of buffers:

    producer     wait free[s] -> copy into s (signals ready[s])  -> s+1 ...
    consumers    wait ready[s] -> compute -> arrive free[s]      -> s+1 ...

Each ring position has a `ready` barrier, completed by its copies, and a `free`
barrier, completed when both compute warpgroups have let go.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import COMPUTE_WARPGROUPS, HALF, KEY_BLOCK, HopperConfig
from .attention_hopper_walk import ENTRY_BITS, HEADER


class Ring(NamedTuple):
    """A ring of buffers in shared memory, filled from `sources` in step."""

    sources: Sequence[jax.Ref]
    buffers: Sequence[jax.Ref]
    ready: jax.Ref
    free: jax.Ref


class Tile(NamedTuple):
    """Where a program stands: its tile's number, the walk's row behind it, and the entries walked before."""

    index: Array
    rank: Array
    block: Array
    head: Array
    entries: Array
    first_entry: Array


def for_each_tile(walk: jax.Ref, heads: int, config: HopperConfig, body: Callable[[Tile], None]) -> tuple[Array, Array]:
    """Run `body` on each tile of this program, alike in every warpgroup; returns their number and their entries."""
    total = walk.shape[0] * heads
    stride = -(-total // config.tiles) if config.strided else 1
    first = lax.axis_index("program") * (1 if config.strided else config.tiles)
    count = jnp.minimum(config.tiles, lax.div(total - first + stride - 1, stride))

    def one(index: Array, first_entry: Array) -> Array:
        rank, head = lax.div(first + index * stride, heads), lax.rem(first + index * stride, heads)
        entries = walk[rank, 1]
        body(Tile(index, rank, walk[rank, 0], head, entries, first_entry))
        return first_entry + entries

    return count, lax.fori_loop(0, count, one, jnp.int32(0))


def produce(walk: jax.Ref, heads: int, config: HopperConfig, resident: Ring, streams: Sequence[Ring], rows: int) -> None:
    """Fill `resident` once a tile and each of `streams` with `rows` rows a step, as buffers come free."""
    parts = KEY_BLOCK // rows

    def one_tile(tile: Tile) -> None:
        _fill(resident, tile.index, tile.block * KEY_BLOCK, KEY_BLOCK, tile.head)

        @pl.loop(0, tile.entries * parts)
        def _step(step: Array) -> None:
            block = walk[tile.rank, HEADER + lax.div(step, parts)] >> ENTRY_BITS
            for ring in streams:
                first_row = block * KEY_BLOCK + lax.rem(step, parts) * rows
                _fill(ring, tile.first_entry * parts + step, first_row, rows, tile.head)

    count, entries = for_each_tile(walk, heads, config, one_tile)
    _drain(resident, count)
    for ring in streams:
        _drain(ring, entries * parts)


def _fill(ring: Ring, step: Array, first_row: Array, rows: int, head: Array) -> None:
    depth = ring.ready.shape[0]
    slot = lax.rem(step, depth)
    pl.when(step >= depth)(functools.partial(plgpu.barrier_wait, ring.free.at[slot]))
    for source, buffer in zip(ring.sources, ring.buffers, strict=True):
        if buffer.ndim == 4:  # split in halves, one for each compute warpgroup
            for half in range(COMPUTE_WARPGROUPS):
                own = _rows(source, pl.ds(first_row + half * HALF, HALF), head)
                plgpu.copy_gmem_to_smem(own, buffer.at[slot, half], ring.ready.at[slot])
        else:
            plgpu.copy_gmem_to_smem(
                _rows(source, pl.ds(first_row, rows), head), buffer.at[slot], ring.ready.at[slot]
            )


def _rows(source: jax.Ref, rows: pl.Slice, head: Array) -> jax.Ref:
    """Rows of (T, H, K), of (H, T), or of (T,), which all heads share."""
    match source.ndim:
        case 3:
            return source.at[rows, head]
        case 2:
            return source.at[head, rows]
        case _:
            return source.at[rows]


def _drain(ring: Ring, steps: Array) -> None:
    # Nothing may be left unawaited: the last completion of each `free` barrier is.
    for slot in range(ring.free.shape[0]):
        pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, ring.free.at[slot]))
