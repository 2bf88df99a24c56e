"""The copying warpgroup, shared by the three Hopper attention kernels, and the loop over tiles all warpgroups run.

A kernel holds one *resident* tile (128 rows of this side) and *streams* tiles
of the other side past it. Both live in rings of buffers:

    producer     wait free[s] -> copy into s, which completes ready[s]
    consumers    wait ready[s] -> compute -> arrive free[s]

A tile's result replaces it in its slot, and is still on its way to global
memory while the consumers compute the first step of the next tile, which came
into the other slot meanwhile. Only then is the slot free:

    producer   hold 0, stream 0 | hold 1, stream 1 | hold 2, stream 2 | ...
    consumers        tile 0, send | tile 1: first step, free slot 0, the rest, send | ...
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import BLOCK, COMPUTE_WARPGROUPS, HALF
from .attention_hopper_ops import Ref
from .attention_hopper_walk import ENTRY_BITS, HEADER


class Copy(NamedTuple):
    """`rows` rows of `source`, `offset` after the first of a step, go to `buffer(slot)`."""

    source: Ref
    buffer: Callable[[Array], Ref]
    rows: int
    offset: int = 0


class Ring(NamedTuple):
    """Buffers in shared memory that the same copies fill again and again."""

    copies: Sequence[Copy]
    ready: Ref
    free: Ref

    def slot(self, step: Array) -> Array:
        return lax.rem(step, self.ready.shape[0])


class Tile(NamedTuple):
    """One tile of a program: which of the program it is, and what the walk says of it."""

    number: Array
    rank: Array
    head: Array
    block: Array
    entries: Array
    first_entry: Array  # the first of its entries' values
    entries_before: Array  # in the program's earlier tiles


def halves(source: Ref, buffer: Ref) -> list[Copy]:
    """Copies of a block of 128 rows, a half for each compute warpgroup, to `buffer[slot, half]`."""

    def half(i: int) -> Copy:
        return Copy(source, lambda slot: buffer.at[slot, i], HALF, i * HALF)

    return [half(i) for i in range(COMPUTE_WARPGROUPS)]


def for_each_tile(walk: Ref, shares: Ref, heads: int, body: Callable[[Tile], None]) -> tuple[Array, Array]:
    """Run `body` on each tile of this program, alike in every warpgroup; returns their number and their entries."""
    program = lax.axis_index("program")
    first, stride, count = (shares[program, i] for i in range(3))

    def read(index: Array) -> tuple[Array, Array, Array, Array, Array]:
        number = lax.min(first + index * stride, walk.shape[0] * heads - 1)
        rank, head = lax.div(number, heads), lax.rem(number, heads)
        return rank, head, walk[rank, 0], walk[rank, 1], walk[rank, HEADER]

    def one(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        entries_before, rank, head, block, entries, first_entry = carry
        following = read(index + 1)  # early: the answer takes as long as a step
        body(Tile(index, rank, head, block, entries, first_entry, entries_before))
        return entries_before + entries, *following

    zero = jnp.int32(0)
    entries, *_ = lax.fori_loop(0, count, one, (zero, *read(zero)))
    return count, entries


def release_last(hold: Ring, index: Array) -> None:
    """Free the slot of the tile before number `index`, whose result this warpgroup has sent."""

    @pl.when(index > 0)
    def _release() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(hold.free.at[hold.slot(index - 1)])


def produce(
    walk: Ref,
    shares: Ref,
    heads: int,
    hold: Ring,
    streams: Sequence[Ring],
    rows: int,
    preface: Sequence[Copy] = (),
) -> None:
    """Keep all rings full.

    Args:
      hold: the ring of resident tiles.
      streams: rings that advance together, `rows` rows a step.
      preface: copies that take the first step of each tile in the one stream, before its entries.
    """
    parts = BLOCK // rows
    extra = 1 if preface else 0

    def one_tile(tile: Tile) -> None:
        _fill(hold, hold.copies, tile.number, tile.block * BLOCK, tile.head)
        first_step = tile.entries_before * parts + tile.number * extra
        if preface:
            _fill(streams[0], preface, first_step, tile.block * BLOCK, tile.head)

        def one_step(i: Array, entry: Array) -> Array:
            following = walk[tile.rank, HEADER + lax.div(i + 1, parts)]
            first_row = (entry >> ENTRY_BITS) * BLOCK + lax.rem(i, parts) * rows
            for ring in streams:
                _fill(ring, ring.copies, first_step + extra + i, first_row, tile.head)
            return following

        lax.fori_loop(0, tile.entries * parts, one_step, tile.first_entry)

    count, entries = for_each_tile(walk, shares, heads, one_tile)
    _drain(hold, count)
    for ring in streams:
        _drain(ring, entries * parts + count * extra)


def _fill(ring: Ring, copies: Sequence[Copy], step: Array, first_row: Array, head: Array) -> None:
    slot = ring.slot(step)
    pl.when(step >= ring.ready.shape[0])(lambda: plgpu.barrier_wait(ring.free.at[slot]))
    for copy in copies:
        source = _rows(copy.source, pl.ds(first_row + copy.offset, copy.rows), head)
        plgpu.copy_gmem_to_smem(source, copy.buffer(slot), ring.ready.at[slot])


def _rows(source: Ref, rows: pl.Slice, head: Array) -> Ref:
    """Rows of (T, H, K), of (H, T), or of (T,), which all heads share."""
    match source.ndim:
        case 3:
            return source.at[rows, head]
        case 2:
            return source.at[head, rows]
        case _:
            return source.at[rows]


def _drain(ring: Ring, steps: Array) -> None:
    # Every completion of a barrier must be awaited, the last one too.
    for slot in range(ring.free.shape[0]):
        pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, ring.free.at[slot]))
