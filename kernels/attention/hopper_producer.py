"""The copying warpgroup, shared by the three Hopper attention kernels, and the loop over tiles all warpgroups run.

A kernel holds one *resident* tile (128 rows of this side) and *streams* tiles
of the other side past it. Both live in rings of buffers (hopper/pipeline.py).
A tile's result replaces it in its slot, and is still on its way to global
memory while the consumers compute the first step of the next tile, which came
into the other slot meanwhile. Only then is the slot free:

    producer   resident 0, stream 0 | resident 1, stream 1 | resident 2, stream 2 | ...
    consumers            tile 0, send | tile 1: first step, free slot 0, the rest, send | ...
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from ..block_mask import BLOCK_SIZE
from ..hopper.config import COMPUTE_WARPGROUPS, WARPGROUP_ROWS
from ..hopper.pipeline import Ring
from ..hopper.primitives import Ref
from .schedule import ENTRY_BITS, HEADER


class Copy(NamedTuple):
    """`rows` rows of `source`, `offset` after the first of a step, go to `buffer(slot)`."""

    source: Ref
    buffer: Callable[[Array], Ref]
    rows: int
    offset: int = 0


class Stream(NamedTuple):
    """A ring, and the copies that fill each of its slots."""

    ring: Ring
    copies: Sequence[Copy]


class Tile(NamedTuple):
    """One tile of a program: which of the program it is, and what the schedule says of it."""

    number: Array
    rank: Array
    head: Array
    block: Array
    entries: Array
    first_entry: Array  # the first of its entries' values
    entries_before: Array  # in the program's earlier tiles


def halves(source: Ref, buffer: Ref) -> list[Copy]:
    """Return copies of a block of 128 rows, a half for each compute warpgroup, to `buffer[slot, half]`."""

    def half(i: int) -> Copy:
        return Copy(source, lambda slot: buffer.at[slot, i], WARPGROUP_ROWS, i * WARPGROUP_ROWS)

    return [half(i) for i in range(COMPUTE_WARPGROUPS)]


def for_each_tile(schedule: Ref, assignment: Ref, heads: int, body: Callable[[Tile], None]) -> tuple[Array, Array]:
    """Run `body` on each tile of this program, alike in every warpgroup; return their number and their entries."""
    program = lax.axis_index("program")
    first, stride, count = (assignment[program, i] for i in range(3))

    def read(index: Array) -> tuple[Array, Array, Array, Array, Array]:
        number = lax.min(first + index * stride, schedule.shape[0] * heads - 1)
        rank, head = lax.div(number, heads), lax.rem(number, heads)
        return rank, head, schedule[rank, 0], schedule[rank, 1], schedule[rank, HEADER]

    def one(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        entries_before, rank, head, block, entries, first_entry = carry
        following = read(index + 1)  # early: the answer takes as long as a step
        body(Tile(index, rank, head, block, entries, first_entry, entries_before))
        return entries_before + entries, *following

    zero = jnp.int32(0)
    entries, *_ = lax.fori_loop(0, count, one, (zero, *read(zero)))
    return count, entries


def release_last(resident: Ring, index: Array) -> None:
    """Free the slot of the tile before number `index`, whose result this warpgroup has sent."""

    @pl.when(index > 0)
    def _release() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        resident.release(resident.slot(index - 1))


def produce(
    schedule: Ref,
    assignment: Ref,
    heads: int,
    resident: Stream,
    streams: Sequence[Stream],
    rows: int,
    prologue: Sequence[Copy] = (),
) -> None:
    """Keep all rings full.

    Args:
      schedule, assignment: what to visit, and which tiles are whose: schedule.py.
      heads: H.
      resident: of the resident tiles.
      streams: those that advance together, `rows` rows a step.
      rows: a divisor of a block.
      prologue: copies that take the first step of each tile in the one stream, before its entries.
    """
    parts = BLOCK_SIZE // rows
    extra = 1 if prologue else 0

    def one_tile(tile: Tile) -> None:
        _fill(resident, tile.number, tile.block * BLOCK_SIZE, tile.head)
        first_step = tile.entries_before * parts + tile.number * extra
        if prologue:
            _fill(Stream(streams[0].ring, prologue), first_step, tile.block * BLOCK_SIZE, tile.head)

        def one_step(i: Array, entry: Array) -> Array:
            following = schedule[tile.rank, HEADER + lax.div(i + 1, parts)]
            first_row = (entry >> ENTRY_BITS) * BLOCK_SIZE + lax.rem(i, parts) * rows
            for stream in streams:
                _fill(stream, first_step + extra + i, first_row, tile.head)
            return following

        lax.fori_loop(0, tile.entries * parts, one_step, tile.first_entry)

    count, entries = for_each_tile(schedule, assignment, heads, one_tile)
    resident.ring.drain(count)
    for stream in streams:
        stream.ring.drain(entries * parts + count * extra)


def _fill(stream: Stream, step: Array, first_row: Array, head: Array) -> None:
    def start(slot: Array, ready: Ref) -> None:
        for copy in stream.copies:
            source = _rows(copy.source, pl.ds(first_row + copy.offset, copy.rows), head)
            plgpu.copy_gmem_to_smem(source, copy.buffer(slot), ready)

    stream.ring.fill(step, start)


def _rows(source: Ref, rows: pl.Slice, head: Array) -> Ref:
    """Return rows of (T, H, K), of (H, T), or of (T,), which all heads share."""
    match source.ndim:
        case 3:
            return source.at[rows, head]
        case 2:
            return source.at[head, rows]
        case _:
            return source.at[rows]
