"""The copying warpgroup, shared by the three Hopper attention kernels, and the loop over tiles all warpgroups run.

A kernel holds one *resident* tile (128 rows of this side) and *streams* tiles
of the other side past it. Both live in rings of buffers:

    producer     wait free[s] -> copy into s, which completes ready[s]
    consumers    wait ready[s] -> compute -> arrive free[s]

A resident tile's result replaces it in its slot; `free` then means that the
result is there. The producer sends it off just before it refills the slot, so
that the consumers go on to the next tile, already in the other slot, at once:

    producer    hold 0, stream 0 | hold 1, stream 1 | send 0, hold 2, stream 2 | ...
    consumers         tile 0             tile 1              tile 2
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import Array, lax

from .attention_hopper_config import COMPUTE_WARPGROUPS, HALF, KEY_BLOCK
from .attention_hopper_walk import ENTRY_BITS, HEADER


class Copy(NamedTuple):
    """`rows` rows of `source`, `offset` after the first of a step, go to `buffer(slot)`."""

    source: jax.Ref
    buffer: Callable[[Array], jax.Ref]
    rows: int
    offset: int = 0


class Ring(NamedTuple):
    """Buffers in shared memory that the same copies fill again and again."""

    copies: Sequence[Copy]
    ready: jax.Ref
    free: jax.Ref

    def slot(self, step: Array) -> Array:
        return lax.rem(step, self.ready.shape[0])


class Tile(NamedTuple):
    """One tile of a program: its number in the program, and what the walk says of it."""

    index: Array
    rank: Array
    head: Array
    block: Array
    entries: Array
    first_entry: Array  # the first of its entries' values
    entries_before: Array  # in the program's earlier tiles


def halves(source: jax.Ref, buffer: jax.Ref) -> list[Copy]:
    """Copies of a block of 128 rows, a half for each compute warpgroup, to `buffer[slot, half]`."""

    def half(i: int) -> Copy:
        return Copy(source, lambda slot: buffer.at[slot, i], HALF, i * HALF)

    return [half(i) for i in range(COMPUTE_WARPGROUPS)]


def for_each_tile(walk: jax.Ref, portions: jax.Ref, heads: int, body: Callable[[Tile], None]) -> tuple[Array, Array]:
    """Run `body` on each tile of this program, alike in every warpgroup; returns their number and their entries."""
    program = lax.axis_index("program")
    first = portions[program]
    count = portions[program + 1] - first

    def read(index: Array) -> tuple[Array, Array, Array, Array, Array]:
        number = lax.min(first + index, walk.shape[0] * heads - 1)
        rank, head = lax.div(number, heads), lax.rem(number, heads)
        return rank, head, walk[rank, 0], walk[rank, 1], walk[rank, HEADER]

    def one(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        entries_before, *here = carry
        following = read(index + 1)  # early: the answer takes longer than a step
        tile = Tile(index, *here, entries_before)
        body(tile)
        return entries_before + tile.entries, *following

    entries, *_ = lax.fori_loop(0, count, one, (lax.full((), 0, "int32"), *read(lax.full((), 0, "int32"))))
    return count, entries


def produce(
    walk: jax.Ref,
    portions: jax.Ref,
    heads: int,
    hold: Ring,
    streams: Sequence[Ring],
    rows: int,
    send: Callable[[Array, Array, Array], None],
    preface: Sequence[Copy] = (),
) -> None:
    """Keep all rings full.

    Args:
      hold: the ring of resident tiles.
      streams: rings that advance together, `rows` rows a step.
      send: send(slot, block, head) starts the copies of a tile's result to global memory.
      preface: copies that take the first step of each tile in the one stream, before its entries.
    """
    slots, parts = hold.ready.shape[0], KEY_BLOCK // rows
    extra = 1 if preface else 0
    first = portions[lax.axis_index("program")]

    def send_off(index: Array) -> None:
        slot = hold.slot(index)
        rank, head = lax.div(first + index, heads), lax.rem(first + index, heads)
        block = walk[rank, 0]
        plgpu.barrier_wait(hold.free.at[slot])
        send(slot, block, head)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def one_tile(tile: Tile) -> None:
        pl.when(tile.index >= slots)(lambda: send_off(tile.index - slots))
        _fill(hold, hold.copies, hold.slot(tile.index), tile.block * KEY_BLOCK, tile.head)
        first_step = tile.entries_before * parts + tile.index * extra
        if preface:
            _wait_free(streams[0], first_step)
            _fill(streams[0], preface, streams[0].slot(first_step), tile.block * KEY_BLOCK, tile.head)

        @pl.loop(0, tile.entries * parts)
        def _step(i: Array) -> None:
            step = first_step + extra + i
            block = walk[tile.rank, HEADER + lax.div(i, parts)] >> ENTRY_BITS
            for ring in streams:
                _wait_free(ring, step)
                _fill(ring, ring.copies, ring.slot(step), block * KEY_BLOCK + lax.rem(i, parts) * rows, tile.head)

    count, entries = for_each_tile(walk, portions, heads, one_tile)
    for i in range(slots):
        pl.when(count - slots + i >= 0)(functools.partial(send_off, count - slots + i))
    for ring in streams:
        _drain(ring, entries * parts + count * extra)


def _wait_free(ring: Ring, step: Array) -> None:
    pl.when(step >= ring.ready.shape[0])(lambda: plgpu.barrier_wait(ring.free.at[ring.slot(step)]))


def _fill(ring: Ring, copies: Sequence[Copy], slot: Array, first_row: Array, head: Array) -> None:
    for copy in copies:
        source = _rows(copy.source, pl.ds(first_row + copy.offset, copy.rows), head)
        plgpu.copy_gmem_to_smem(source, copy.buffer(slot), ring.ready.at[slot])


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
    # Every completion of a barrier must be awaited, the last one too.
    for slot in range(ring.free.shape[0]):
        pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, ring.free.at[slot]))
