"""Matrix products on Hopper whose pointwise surroundings are done in the kernel that multiplies.

x W^T, x (T, D), W (N, D), is what cuBLAS does as well. What it leaves to passes of their own, over arrays that are
written only to be read once more, happens here while a tile of the result is in registers: an `Epilogue` says what.

One program a multiprocessor walks over tiles of 128 x 256, all columns of a few rows before the next rows, so that W
stays in L2 and x comes from memory once. Three warpgroups:

    producer       x0 W0  x1 W1  x2 W2 ...      a ring of `stages` steps of 64 channels
    warpgroup 0    0 1 2 .. 11 | 0 1 2 .. 11 |          rows  0- 63 of a tile
    warpgroup 1    0 1 2 .. 11 | 0 1 2 .. 11 |          rows 64-127

A warpgroup's accumulator fills half of its registers, so it cannot hold two. But a finished tile as bf16 takes a
quarter. So between two tiles it only rounds, and the result leaves while the next tile is multiplied, a part of 64
columns at a time. Likewise what an epilogue reads of a (T, N) array arrives during the product, and what it makes of it
waits in registers as bf16:

    step     0      1        2        3        4        5              7         8         9         10        11
    leaves          part 0   part 1   part 2   part 3
    comes                                               fetch 0, 1     keep 0,   keep 1,   keep 2    keep 3    finish
                                                                       fetch 2   fetch 3
    waits    last tile's parts, ever fewer .........    this tile's kept parts, ever more .................    result

All through the same two buffers per warpgroup. There is room for one array's parts. A second array comes before it, and
once all of it has come, the warpgroup waits for the product so far and adds it to the accumulator, in float32.

Barriers (s a slot of the ring; every count is per use, and no use begins before all have seen the last):

    ready[s]     2 copies         producer: fills s              both warpgroups, before they multiply
    free[s]      2 warpgroups     warpgroups: s is multiplied    producer, before it fills s again
    part_ready   1                a warpgroup: fetches           itself, before it keeps

    producer     fill 0 1 2 3 | free[0] fill 0 | free[1] fill 1 | ..                               | free[0] .. free[3]
    a warpgroup  ready[0] mul | ready[1] mul, free[0]! | ready[2] mul, free[1]! | ..               (! signals)

Nobody waits in a circle: warpgroups wait for the producer alone, and a slot is freed when the next step has been
issued, which takes 2 stages.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import MULTIPROCESSORS, HopperConfig
from .attention_hopper_ops import ROW, Ref, launch, rows, split_roles, tile

WARPGROUPS = 2
HALF = 64
ROWS = WARPGROUPS * HALF
PART = 64  # columns that come and leave at a time: one row of swizzled shared memory
SLOTS = 2  # parts on their way, a warpgroup

type Values = list[Array]


class Config(NamedTuple):
    """How a product is cut up.

    `columns` of a tile: a multiple of 64, at most 256. `channels` of a step: 32 or 64. `stages`: steps in shared
    memory, at least 2; 64 channels of 256 columns and the rows take 48 KiB, and the parts on their way 32, of 227 in
    all. Programs that share W in clusters of two were no faster, and most were slower.
    """

    columns: int = 256
    channels: int = 64
    stages: int = 4


CONFIG = Config()


class Epilogue(NamedTuple):
    """What becomes of a product, in registers. A warpgroup sees 64 rows, in parts of 64 columns.

    finish: (parts of the product, row values, narrow tiles, what was kept) -> (parts of the result, row results), all
      lists; the product is float32, the result is rounded to bf16. Called for `unit` parts at a time.
    rows: float32 (T,), of which both functions get a value for each row.
    narrow: float32 (T, R), of which `finish` gets all R columns.
    tile: bf16 (T, N), of which `keep` gets a part of 64 columns.
    keep: (row values, bf16 part of the tile) -> a part, rounded to bf16.
    addend: bf16 (T, N), float32 (T,): the one times the other, row by row, is added to the product in float32.
    unit: parts of a tile that `finish` gets together.
    row_results: float32 values for each row that `finish` returns with a unit.
    """

    finish: Callable[[Values, Values, Values, Values], tuple[Values, Values]]
    rows: Sequence[Array] = ()
    narrow: Sequence[Array] = ()
    tile: Array | None = None
    keep: Callable[[Values, Array], Array] = lambda _, part: part
    addend: tuple[Array, Array] | None = None
    unit: int = 1
    row_results: int = 0


class Buffers(NamedTuple):
    x: Ref  # (stage, rows, channels)
    w: Ref  # (stage, columns, channels)
    part: Ref  # (warpgroup, slot, rows, columns)
    row: Ref  # (warpgroup, row result of a tile, rows)


class Barriers(NamedTuple):
    ready: Ref
    free: Ref
    part_ready: Ref  # (warpgroup x slot)


def unsupported_shape(tokens: int, width: int, columns: int) -> str | None:
    """What keeps a product of (tokens, width) and (columns, width) from the kernel, if anything does."""
    for what, size, multiple in (
        ("T", tokens, ROWS),
        ("channels into each product", width, 64),
        ("channels out of each product", columns, CONFIG.columns),
    ):
        if size % multiple or not size:
            return f"{what} a multiple of {multiple}, got {size}"
    return None


def product(
    name: str,
    x_TD: Array | Sequence[Array],
    w_ND: Array,
    epilogue: Epilogue,
    *,
    config: Config = CONFIG,
    interpret: bool,
) -> list[Array]:
    """`epilogue` of x W^T: the result, (T, N) bf16, and if there are any the row results, (of a row, T) float32.

    Args:
      name: of the kernel, as profiles show it.
      x_TD, w_ND: bf16; T, D and N as `unsupported_shape` says. x may be in several arrays of equal shape, side by side.
    """
    xs = [x_TD] if isinstance(x_TD, Array) else list(x_TD)
    if config.stages < 2:
        raise ValueError(
            f"a slot is freed while the next one is in use: stages must be at least 2, got {config.stages}"
        )
    cut = Cut.of(xs, w_ND, config, interpret)
    row_results = cut.parts // epilogue.unit * epilogue.row_results
    addend, factor = epilogue.addend or (None, None)
    tiles = [array for array in (addend, epilogue.tile) if array is not None]
    inputs = (xs, [w_ND], epilogue.rows, epilogue.narrow, tiles, [factor] if factor is not None else [])

    def body(*refs: Ref, smem: Buffers, barriers: Barriers) -> None:
        x_refs, (w,), row_refs, narrow_refs, tile_refs, factor_refs, (out, *row_out) = _split(refs, *map(len, inputs))
        share, sides = Share.of(cut), Sides(row_refs, narrow_refs, tile_refs, factor_refs, out, row_out)

        def consume() -> None:
            warpgroup = lax.axis_index("warpgroup")
            Consumer(share, epilogue, row_results, sides, smem, barriers, warpgroup, interpret).all_tiles()

        split_roles(lambda: _produce(share, x_refs, w, smem, barriers), consume, HopperConfig(stages=cut.stages))

    length, outputs = xs[0].shape[0], w_ND.shape[0]
    out_types = [jax.ShapeDtypeStruct((length, outputs), jnp.bfloat16)]
    if row_results:
        out_types.append(jax.ShapeDtypeStruct((cut.column_tiles * row_results, length), jnp.float32))
    run = launch(
        body,
        name,
        out_types,
        dict(
            smem=Buffers(
                x=tile(cut.stages, ROWS, config.channels),
                w=tile(cut.stages, config.columns, config.channels),
                part=tile(WARPGROUPS, SLOTS, HALF, PART),
                row=plgpu.SMEM((WARPGROUPS, max(1, row_results), HALF), jnp.float32),
            ),
            barriers=Barriers(
                ready=plgpu.Barrier(num_arrivals=2, num_barriers=cut.stages),
                free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=cut.stages),
                part_ready=plgpu.Barrier(num_barriers=WARPGROUPS * SLOTS),
            ),
        ),
        programs=cut.programs,
        interpret=interpret,
    )
    with jax.named_scope("product"):  # by which profiling.py knows it
        result: list[Array] = run(*(array for group in inputs for array in group))
    return result


class Cut(NamedTuple):
    """The tiles of a product and who makes them: program p those of numbers p, p + `programs`, ...

    `steps`: of a tile, `steps_of_one` of them over the channels of one array of x.
    """

    config: Config
    row_tiles: int
    column_tiles: int
    steps: int
    steps_of_one: int
    stages: int
    programs: int

    @classmethod
    def of(cls, xs: list[Array], w_ND: Array, config: Config, interpret: bool) -> "Cut":
        row_tiles, column_tiles = xs[0].shape[0] // ROWS, w_ND.shape[0] // config.columns
        steps_of_one = xs[0].shape[1] // config.channels
        steps = steps_of_one * len(xs)
        # The interpreter runs one program after the other: several tiles for each are what needs a test.
        programs = min(row_tiles * column_tiles, 2 if interpret else MULTIPROCESSORS)
        return cls(config, row_tiles, column_tiles, steps, steps_of_one, min(config.stages, steps), programs)

    @property
    def parts(self) -> int:
        return self.config.columns // PART


class Share(NamedTuple):
    """One program's: its number, how many tiles it has, and the slot of its first step."""

    cut: Cut
    program: Array
    tiles: Array
    first_slot: Array

    @classmethod
    def of(cls, cut: Cut) -> "Share":
        program = lax.axis_index("program")
        tiles = pl.cdiv(cut.row_tiles * cut.column_tiles - program, cut.programs)
        # Not 0: the compiler would know each step's slot, and keep all their addresses in registers.
        return cls(cut, program, tiles, lax.rem(program, cut.stages))

    def corner(self, i: Array) -> tuple[Array, Array]:
        """First row of this program's i-th tile, and its number among the tiles of these rows."""
        number = self.program + i * self.cut.programs
        return lax.div(number, self.cut.column_tiles) * ROWS, lax.rem(number, self.cut.column_tiles)


def _produce(share: Share, x_refs: Sequence[Ref], w: Ref, smem: Buffers, barriers: Barriers) -> None:
    """Fill the ring with the steps of all tiles."""
    cut = share.cut
    config = cut.config

    @pl.loop(0, share.tiles)
    def _tile(i: Array) -> None:
        row, column_tile = share.corner(i)

        @pl.loop(0, cut.steps)
        def _step(step: Array) -> None:
            number = i * cut.steps + step
            slot = lax.rem(share.first_slot + number, cut.stages)
            ready = barriers.ready.at[slot]
            pl.when(number >= cut.stages)(lambda: plgpu.barrier_wait(barriers.free.at[slot]))

            def channels(step: Array) -> pl.Slice:
                return pl.ds(step * config.channels, config.channels)

            for which, x in enumerate(x_refs):

                def copy(x: Ref = x, first: int = which * cut.steps_of_one) -> None:
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(row, ROWS), channels(step - first)], smem.x.at[slot], ready)

                pl.when(lax.div(step, cut.steps_of_one) == which)(copy)
            columns = pl.ds(column_tile * config.columns, config.columns)
            plgpu.copy_gmem_to_smem(w.at[columns, channels(step)], smem.w.at[slot], ready)

    for slot in range(cut.stages):  # every completion of a barrier must be awaited, the last one too
        plgpu.barrier_wait(barriers.free.at[slot])


class Sides(NamedTuple):
    """What an epilogue reads, and where its results go, in memory."""

    rows: Sequence[Ref]
    narrow: Sequence[Ref]
    tiles: Sequence[Ref]  # the addend, if there is one, before what is kept
    factor: Sequence[Ref]  # of the addend
    out: Ref
    row_out: Sequence[Ref]


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A warpgroup: multiplies its 64 rows of each of the program's tiles, and applies the epilogue.

    `row_results`: of a tile. All tiles in a row go round the ring of steps; the result of one travels in registers, as
    its parts, into the time of the next.
    """

    share: Share
    epilogue: Epilogue
    row_results: int
    sides: Sides
    smem: Buffers
    barriers: Barriers
    warpgroup: Array
    interpret: bool

    @property
    def cut(self) -> Cut:
        return self.share.cut

    def all_tiles(self) -> None:
        cut, count = self.cut, self.share.tiles

        def next_tile(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            slot, *last = carry
            acc = plgpu.ACC((HALF, cut.config.columns), jnp.float32)
            result: tuple[Array, ...] = pl.run_scoped(functools.partial(self.one_tile, i, slot, last), acc)
            return result

        nothing = plgpu.layout_cast(jnp.zeros((HALF, PART), jnp.bfloat16), plgpu.Layout.WGMMA)
        _, *last = lax.fori_loop(0, count, next_tile, (self.share.first_slot, *[nothing] * cut.parts))
        for part, result in enumerate(last):
            self.leave(count - 1, part, result)
        plgpu.wait_smem_to_gmem(0)

    def one_tile(self, i: Array, slot: Array, last: Values, acc: Ref) -> tuple[Array, ...]:
        """Multiply the i-th tile while the `last` one's parts leave; the next slot and this tile's parts."""
        steps, parts = self.cut.steps, self.cut.parts
        own, _ = self.place(i)
        row_values = [plgpu.load(ref.at[own], layout=ROW, optimized=False) for ref in self.sides.rows]
        came, late = list[Array](), None

        self.multiply(acc, slot)
        done = 1
        for part in range(parts):
            if done < steps:
                slot, done = self.next_step(acc, slot), done + 1
            pl.when(i > 0)(functools.partial(self.leave, i - 1, part, last[part]))
        if self.sides.tiles:
            if done < steps:
                slot, done = self.next_step(acc, slot), done + 1
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for copy in range(SLOTS):
                self.fetch(i, copy)
            rest, copies = steps - done, parts * len(self.sides.tiles)
            for copy in range(copies):
                until = steps - rest + rest * (copy + 2) // (copies + 2)
                slot, done = self.next_steps(acc, slot, until - done), until
                came.append(self.take(i, copy, row_values))
                if self.sides.factor and copy == parts - 1:
                    late, came = self.add(acc, own, came), []
        # Not earlier: the last tile's parts are in registers until they have left.
        narrow = [plgpu.load(ref.at[own], layout=plgpu.Layout.WGMMA, optimized=False) for ref in self.sides.narrow]
        slot = self.next_steps(acc, slot, steps - done)

        # An accumulator's registers are single, but bfloat16 is rounded in pairs.
        value = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)
        if late is not None:
            value += late
        plgpu.barrier_arrive(self.barriers.free.at[slot])
        results = self.finish(value, row_values, narrow, came)
        return self.after(slot), *results

    def multiply(self, acc: Ref, slot: Array) -> None:
        """Start the product of a step, once it has arrived."""
        plgpu.barrier_wait(self.barriers.ready.at[slot])
        half = pl.ds(self.warpgroup * HALF, HALF)
        plgpu.wgmma(acc, self.smem.x.at[slot, half], self.smem.w.at[slot].transpose((1, 0)))

    def next_step(self, acc: Ref, previous: Array) -> Array:
        """Start the step after `previous`, wait for that to end and free its slot; the new one's slot."""
        slot = self.after(previous)
        self.multiply(acc, slot)
        plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(self.barriers.free.at[previous])
        return slot

    def next_steps(self, acc: Ref, slot: Array, count: int) -> Array:
        # The quotient is 0. A loop whose length the compiler knows it unrolls, and moves all keeping to the end of the
        # tile.
        length = count + lax.div(slot, self.cut.stages)
        return lax.fori_loop(0, length, lambda _, previous: self.next_step(acc, previous), slot)

    def after(self, slot: Array) -> Array:
        return jnp.where(slot == self.cut.stages - 1, 0, slot + 1)

    def place(self, i: Array) -> tuple[pl.Slice, Array]:
        """This warpgroup's rows of the i-th tile, and the tile's number among those of the same rows."""
        row, column_tile = self.share.corner(i)
        return pl.ds(row + self.warpgroup * HALF, HALF), column_tile

    def columns(self, column_tile: Array, part: int) -> pl.Slice:
        return pl.ds(column_tile * self.cut.config.columns + part * PART, PART)

    def leave(self, i: Array, part: int, result: Array) -> None:
        """Send a part of the i-th tile's result on its way, and with the first one the row results."""
        own, column_tile = self.place(i)
        if part == 0:
            for j in range(self.row_results):
                target = self.sides.row_out[0].at[column_tile * self.row_results + j, own]
                plgpu.copy_smem_to_gmem(self.smem.row.at[self.warpgroup, j], target)
        buffer = self.smem.part.at[self.warpgroup, part % SLOTS]
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        buffer[...] = result
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, self.sides.out.at[own, self.columns(column_tile, part)])

    def fetch(self, i: Array, copy: int) -> None:
        """Copies of what the epilogue reads go round the slots: all parts of one array, then of the next."""
        which, part = divmod(copy, self.cut.parts)
        if which < len(self.sides.tiles):
            own, column_tile = self.place(i)
            plgpu.copy_gmem_to_smem(
                self.sides.tiles[which].at[own, self.columns(column_tile, part)],
                self.smem.part.at[self.warpgroup, copy % SLOTS],
                self.part_ready(copy),
            )

    def part_ready(self, copy: int) -> Ref:
        return self.barriers.part_ready.at[self.warpgroup * SLOTS + copy % SLOTS]

    def take(self, i: Array, copy: int, row_values: Values) -> Array:
        """A part that has arrived, of the addend as it is, of the tile as `keep` makes it; the next takes its slot."""
        plgpu.barrier_wait(self.part_ready(copy))
        part = plgpu.load(self.smem.part.at[self.warpgroup, copy % SLOTS], layout=plgpu.Layout.WGMMA)
        is_addend = self.sides.factor and copy < self.cut.parts
        made = part if is_addend else self.epilogue.keep(row_values, part).astype(jnp.bfloat16)
        made = lax.optimization_barrier(made)  # now, while the tensor cores are busy
        plgpu.commit_smem()  # all threads have read the slot
        self.fetch(i, copy + SLOTS)
        return made

    def add(self, acc: Ref, own: pl.Slice, parts: Values) -> Array | None:
        """acc += the addend's rows times their factors; or what the interpreter, which cannot, is to add in the end."""
        addend = jnp.concatenate(parts, axis=1).astype(jnp.float32)
        addend *= rows(plgpu.load(self.sides.factor[0].at[own], layout=ROW, optimized=False), addend.shape)
        if self.interpret:
            return addend
        plgpu.wgmma_wait(0)
        acc[...] = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA) + addend
        return None

    def finish(self, value: Array, row_values: Values, narrow: Values, kept: Values) -> Values:
        """The parts of a tile's result; its row results go to shared memory."""
        unit, results = self.epilogue.unit, list[Array]()
        for first in range(0, self.cut.parts, unit):
            members = range(first, first + unit)
            of_parts, of_rows = self.epilogue.finish(
                [value[:, part * PART : (part + 1) * PART] for part in members],
                row_values,
                narrow,
                [kept[part] for part in members if kept],
            )
            results += [result.astype(jnp.bfloat16) for result in of_parts]
            for j, of_row in enumerate(of_rows, start=first // unit * self.epilogue.row_results):
                self.smem.row[self.warpgroup, j] = of_row
        if self.row_results:
            plgpu.commit_smem()
        return results


def row_sums(parts: Iterable[Array]) -> Array:
    """Of all columns of all parts: for `Epilogue.finish`. Across threads once, not once a part."""
    return functools.reduce(jnp.add, parts).sum(axis=1)


def _split(refs: tuple[Ref, ...], *sizes: int) -> list[tuple[Ref, ...]]:
    """Groups of the given sizes, and the rest."""
    groups = []
    for size in sizes:
        groups.append(refs[:size])
        refs = refs[size:]
    return [*groups, refs]
