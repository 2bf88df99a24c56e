"""The loop over tiles that all three Hopper attention kernels run, and the copies that keep it supplied.

A kernel holds one *resident* tile (128 rows of this side, 64 in each warpgroup)
and *streams* tiles of the other side past it.

The stream is shared: one warpgroup, the filler, copies for both, a step or two ahead
through a ring of stages (hopper/pipeline.py). What comes next it knows from the
schedule: the tile's next entry, or the next tile's first one. Both are read a step
and a tile early, since an answer from memory takes as long as a step.

Its resident rows each warpgroup copies for itself, into two slots of its own. A
tile's result replaces them in their slot, and is still on its way to global memory
while the first step of the next tile is computed. Then the slot takes the rows of
the tile after that:

    resident    tile 0     | tile 1                     | tile 2                     | ...
    slot 0      rows 0     | result 0 leaves, rows 2    | rows 2                     | ...
    slot 1      rows 1     | rows 1                     | result 1 leaves, rows 3    | ...
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from ..block_mask import BLOCK_SIZE
from ..hopper.primitives import Ref
from .schedule import HEADER

SLOTS = 2
"""Of the resident tiles: the next one arrives while one is in use."""


class Header(NamedTuple):
    """What the schedule says of a tile: its row of the schedule, head, block, how many entries, and the first two."""

    rank: Array
    head: Array
    block: Array
    entries: Array
    first_entry: Array
    second_entry: Array


class Tile(NamedTuple):
    """One tile of a program.

    number: which of the program it is.
    entries_before: in the program's earlier tiles.
    header, following: this tile's, and the next one's.
    more: whether there is a next one.
    """

    number: Array
    entries_before: Array
    header: Header
    following: Header
    more: Array


class Copy(NamedTuple):
    """`rows` rows of `source`, `offset` after a first one, go to `buffer`."""

    source: Ref
    buffer: Ref
    rows: int
    offset: int = 0

    def start(self, first_row: Array, head: Array, ready: Ref) -> None:
        rows = pl.ds(first_row + self.offset, self.rows)
        match self.source.ndim:
            case 3:  # (T, H, K)
                source = self.source.at[rows, head]
            case 2:  # (H, T)
                source = self.source.at[head, rows]
            case _:  # (T,), which all heads share
                source = self.source.at[rows]
        plgpu.copy_gmem_to_smem(source, self.buffer, ready)


class Resident(NamedTuple):
    """A warpgroup's own rows of the tiles.

    ready: a barrier for each warpgroup and slot.
    copies: those of a slot.
    offset: of the warpgroup's rows in a tile.
    """

    ready: Ref
    copies: Callable[[Array], Sequence[Copy]]
    offset: Array

    def slot(self, number: Array) -> Array:
        """Where tile `number` is."""
        return lax.rem(number, SLOTS)

    def fill(self, number: Array, header: Header) -> None:
        """Start the copies of a tile."""
        slot = self.slot(number)
        first_row = header.block * BLOCK_SIZE + self.offset
        for copy in self.copies(slot):
            copy.start(first_row, header.head, self._ready(slot))

    def wait(self, slot: Array) -> None:
        """Until a slot's copies have arrived."""
        plgpu.barrier_wait(self._ready(slot))

    def fill_next(self, tile: Tile) -> None:
        """Start the copies of the tile after `tile` in the slot of the tile before it, whose result must have left."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(tile.more)(lambda: self.fill(tile.number + 1, tile.following))

    def _ready(self, slot: Array) -> Ref:
        return self.ready.at[lax.axis_index("warpgroup") * SLOTS + slot]


class Logits(NamedTuple):
    """What stands in the exponent of base 2, of a product s = q k: c s; or with a soft cap, cap' (1 - 2 r).

    r is the sigmoid of -2 scale s / cap, so that 1 - 2 r is the tangent hyperbolic of scale s / cap, from an
    exponential and a division: the special-function unit's own tanh has 11 bits. cap' = cap log2(e).
    """

    scale: float
    soft_cap: float | None

    @property
    def c(self) -> float:
        return self.scale * math.log2(math.e)

    def sigmoid(self, s: Array) -> Array:
        """r of a product."""
        assert self.soft_cap is not None
        return 1 / (1 + jnp.exp2(s * (2 * self.c / self.soft_cap)))

    def capped(self, r: Array) -> Array:
        """cap' (1 - 2 r)."""
        assert self.soft_cap is not None
        cap = self.soft_cap * math.log2(math.e)
        return cap - r * (2 * cap)

    def slope(self, r: Array) -> Array:
        """The derivative of cap tanh(x / cap) by x: 1 - tanh^2."""
        return 4 * r * (1 - r)

    @property
    def lse_unit(self) -> float:
        """What log2-sum-exp2 is divided by, to be subtracted from what the exponent is made of: c s, or the capped."""
        return self.c if self.soft_cap is None else 1.0


def shared_head(head: Array, group: int) -> Array:
    """Return the head of the keys and values that `group` query heads in a row share."""
    return head if group == 1 else lax.div(head, group)


def for_each_tile(
    schedule: Ref, assignment: Ref, heads: int, start: Callable[[Header], None], body: Callable[[Tile], None]
) -> tuple[Array, Array]:
    """Call `start` with the first tile's header and `body` with each tile of this program, alike in both warpgroups.

    Returns:
      The number of tiles and of their entries.
    """
    program = lax.axis_index("program")
    first, stride, count = (assignment[program, i] for i in range(3))

    def read(index: Array) -> Header:
        number = lax.min(first + index * stride, schedule.shape[0] * heads - 1)
        rank, head = lax.div(number, heads), lax.rem(number, heads)
        return Header(rank, head, *(schedule[rank, i] for i in range(HEADER + 2)))

    def one(index: Array, carry: tuple[Array, Header]) -> tuple[Array, Header]:
        entries_before, header = carry
        following = read(index + 1)
        body(Tile(index, entries_before, header, following, index + 1 < count))
        return entries_before + header.entries, following

    header = read(jnp.int32(0))
    start(header)
    entries, _ = lax.fori_loop(0, count, one, (jnp.int32(0), header))
    return count, entries
