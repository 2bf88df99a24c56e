"""Matmuls on Hopper whose pointwise surroundings are done in the kernel that multiplies.

x W^T, x (T, D), W (N, D), is what cuBLAS does as well. What it leaves to passes of their own, over arrays that are
written only to be read once more, happens here while a tile of the result is in registers: an `Epilogue` says what.

One program a multiprocessor walks over tiles of 128 x 256, all columns of a few rows before the next rows, so that W
stays in L2 and x comes from memory once. Two warpgroups, of which the first also fills the ring of steps (pipeline.py):

    warpgroup 0    0 1 2 .. 11 | 0 1 2 .. 11 |          rows  0- 63 of a tile, steps of 64 channels
    warpgroup 1    0 1 2 .. 11 | 0 1 2 .. 11 |          rows 64-127

A warpgroup's accumulator fills half of its registers, so it cannot hold two. But a finished tile as bf16 takes a
quarter. So between two tiles it only rounds, and the result leaves while the next tile is multiplied, a part of 64
columns at a time. Likewise what an epilogue reads of a (T, N) array arrives during the matmul, and what it makes of it
waits in registers as bf16:

    step     0      1        2        3        4        5              7         8         9         10        11
    stores          part 0   part 1   part 2   part 3
    loads                                               fetch 0, 1     keep 0,   keep 1,   keep 2    keep 3    finish
                                                                       fetch 2   fetch 3
    waits    last tile's parts, ever fewer .........    this tile's kept parts, ever more .................    result

All through the same two buffers per warpgroup. There is room for one array's parts. A second array comes before it, and
once all of it has come, the warpgroup waits for the matmul so far and adds it to the accumulator, in float32.

Barriers: those of the ring (two copies fill a slot), and one for each buffer, on which a warpgroup waits for what it
has fetched itself. A step is let go when the next one has been issued, which takes 2 stages: while the filler waits for
the other warpgroup to let it go as well, its next step keeps the tensor cores busy.
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

from ..implementation import interpreting
from .config import MULTIPROCESSORS, WARPGROUP_ROWS, WARPGROUPS
from .pipeline import Ring, Steps, ring_barriers
from .primitives import ROW, Ref, launch, rows, tile

ROWS = WARPGROUPS * WARPGROUP_ROWS
PART = 64  # columns that come and leave at a time: one row of swizzled shared memory
SLOTS = 2  # parts on their way, a warpgroup

type Values = list[Array]


class Config(NamedTuple):
    """How a matmul is cut up.

    `columns` of a tile: a multiple of 64, at most 256. `channels` of a step: 32 or 64. `stages`: steps in shared
    memory, at least 2; 64 channels of 256 columns and the rows take 48 KiB, and the parts on their way 32, of 227 in
    all. Programs that share W in clusters of two were no faster, and most were slower.
    """

    columns: int = 256
    channels: int = 64
    stages: int = 4


CONFIG = Config()


class Epilogue(NamedTuple):
    """What becomes of a matmul, in registers. A warpgroup sees 64 rows, in parts of 64 columns.

    finish: (parts of the matmul, row values, narrow tiles, what was kept) -> (parts of the result, row results), all
      lists; the matmul is float32, the result is rounded to bf16. Called for `unit` parts at a time.
    rows: float32 (T,), of which both functions get a value for each row.
    narrow: float32 (T, R), of which `finish` gets all R columns.
    tile: bf16 (T, N), of which `keep` gets a part of 64 columns.
    keep: (row values, bf16 part of the tile) -> a part, rounded to bf16.
    addend: bf16 (T, N), float32 (T,): the one times the other, row by row, is added to the matmul in float32.
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
    ring: list[Ref]
    part_ready: Ref  # (warpgroup x slot)


def unsupported(tokens: int, width: int, columns: int) -> str | None:
    """Return what the kernel needs of a matmul of (tokens, width) and (columns, width), None where it has it."""
    for what, size, multiple in (
        ("T", tokens, ROWS),
        ("channels into each matmul", width, 64),
        ("channels out of each matmul", columns, CONFIG.columns),
    ):
        if size % multiple or not size:
            return f"{what} a multiple of {multiple}, got {size}"
    return None


def matmul(
    name: str,
    x_TD: Array | Sequence[Array],
    w_ND: Array,
    epilogue: Epilogue,
    *,
    config: Config = CONFIG,
) -> list[Array]:
    """Return `epilogue` of x W^T: the result, (T, N) bf16, and if there are any the row results, (of a row, T) float32.

    Args:
      name: of the kernel, as profiles show it.
      x_TD, w_ND: bf16; T, D and N as `unsupported` says. x may be in several arrays of equal shape, side by side.

    Raises:
      ValueError: for a ring of fewer than 2 stages.
    """
    xs = [x_TD] if isinstance(x_TD, Array) else list(x_TD)
    if config.stages < 2:
        raise ValueError(
            f"a slot is freed while the next one is in use: stages must be at least 2, got {config.stages}"
        )
    tiling = Tiling.of(xs, w_ND, config)
    row_results = tiling.parts // epilogue.unit * epilogue.row_results
    addend, factor = epilogue.addend or (None, None)
    tiles = [array for array in (addend, epilogue.tile) if array is not None]
    inputs = (xs, [w_ND], epilogue.rows, epilogue.narrow, tiles, [factor] if factor is not None else [])

    def body(*refs: Ref, smem: Buffers, barriers: Barriers) -> None:
        x_refs, (w,), row_refs, narrow_refs, tile_refs, factor_refs, (out, *row_out) = _split(refs, *map(len, inputs))
        tiles, sides = ProgramTiles.of(tiling), Sides(row_refs, narrow_refs, tile_refs, factor_refs, out, row_out)
        copy = functools.partial(_copy_step, tiles, x_refs, w, smem)
        ready, free = barriers.ring
        steps = Steps(Ring(ready, free, tiles.first_slot), tiles.total * tiling.steps, copy)
        warpgroup = lax.axis_index("warpgroup")
        steps.start()
        Consumer(tiles, epilogue, row_results, sides, smem, steps, barriers.part_ready, warpgroup).all_tiles()
        steps.ring.drain(steps.total)

    length, outputs = xs[0].shape[0], w_ND.shape[0]
    out_types = [jax.ShapeDtypeStruct((length, outputs), jnp.bfloat16)]
    if row_results:
        out_types.append(jax.ShapeDtypeStruct((tiling.column_tiles * row_results, length), jnp.float32))
    run = launch(
        body,
        name,
        out_types,
        dict(
            smem=Buffers(
                x=tile(tiling.stages, ROWS, config.channels),
                w=tile(tiling.stages, config.columns, config.channels),
                part=tile(WARPGROUPS, SLOTS, WARPGROUP_ROWS, PART),
                row=plgpu.SMEM((WARPGROUPS, max(1, row_results), WARPGROUP_ROWS), jnp.float32),
            ),
            barriers=Barriers(
                ring=ring_barriers(2, tiling.stages),
                part_ready=plgpu.Barrier(num_barriers=WARPGROUPS * SLOTS),
            ),
        ),
        programs=tiling.programs,
    )
    with jax.named_scope("matmul"):  # by which tools/profiling.py knows it
        result: list[Array] = run(*(array for group in inputs for array in group))
    return result


class Tiling(NamedTuple):
    """The tiles of a matmul and who makes them: program p those of numbers p, p + `programs`, ...

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
    def of(cls, xs: list[Array], w_ND: Array, config: Config) -> "Tiling":
        row_tiles, column_tiles = xs[0].shape[0] // ROWS, w_ND.shape[0] // config.columns
        steps_of_one = xs[0].shape[1] // config.channels
        steps = steps_of_one * len(xs)
        # The interpreter runs one program after the other: several tiles for each are what needs a test.
        programs = min(row_tiles * column_tiles, 2 if interpreting() else MULTIPROCESSORS)
        return cls(config, row_tiles, column_tiles, steps, steps_of_one, min(config.stages, steps), programs)

    @property
    def parts(self) -> int:
        return self.config.columns // PART


class ProgramTiles(NamedTuple):
    """Which tiles a program makes: its number, how many tiles it has, and the slot of its first step."""

    tiling: Tiling
    program: Array
    total: Array
    first_slot: Array

    @classmethod
    def of(cls, tiling: Tiling) -> "ProgramTiles":
        program = lax.axis_index("program")
        total = pl.cdiv(tiling.row_tiles * tiling.column_tiles - program, tiling.programs)
        return cls(tiling, program, total, lax.rem(program, tiling.stages))

    def corner(self, i: Array) -> tuple[Array, Array]:
        """First row of this program's i-th tile, and its number among the tiles of these rows."""
        number = self.program + i * self.tiling.programs
        return lax.div(number, self.tiling.column_tiles) * ROWS, lax.rem(number, self.tiling.column_tiles)


def _copy_step(
    tiles: ProgramTiles, x_refs: Sequence[Ref], w: Ref, smem: Buffers, number: Array, slot: Array, ready: Ref
) -> None:
    """Start the copies of a program's step `number`, counted through all of its tiles."""
    tiling = tiles.tiling
    config = tiling.config
    step = lax.rem(number, tiling.steps)
    row, column_tile = tiles.corner(lax.div(number, tiling.steps))

    def channels(step: Array) -> pl.Slice:
        return pl.ds(step * config.channels, config.channels)

    for which, x in enumerate(x_refs):

        def copy_x(x: Ref = x, first: int = which * tiling.steps_of_one) -> None:
            plgpu.copy_gmem_to_smem(x.at[pl.ds(row, ROWS), channels(step - first)], smem.x.at[slot], ready)

        pl.when(lax.div(step, tiling.steps_of_one) == which)(copy_x)
    columns = pl.ds(column_tile * config.columns, config.columns)
    plgpu.copy_gmem_to_smem(w.at[columns, channels(step)], smem.w.at[slot], ready)


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

    tiles: ProgramTiles
    epilogue: Epilogue
    row_results: int
    sides: Sides
    smem: Buffers
    steps: Steps
    part_ready: Ref
    warpgroup: Array

    @property
    def tiling(self) -> Tiling:
        return self.tiles.tiling

    def all_tiles(self) -> None:
        tiling, count = self.tiling, self.tiles.total

        def next_tile(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            slot, *last = carry
            acc = plgpu.ACC((WARPGROUP_ROWS, tiling.config.columns), jnp.float32)
            result: tuple[Array, ...] = pl.run_scoped(functools.partial(self.one_tile, i, slot, last), acc)
            return result

        nothing = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, PART), jnp.bfloat16), plgpu.Layout.WGMMA)
        _, *last = lax.fori_loop(0, count, next_tile, (self.tiles.first_slot, *[nothing] * tiling.parts))
        for part, result in enumerate(last):
            self.store(count - 1, part, result)
        plgpu.wait_smem_to_gmem(0)

    def one_tile(self, i: Array, slot: Array, last: Values, acc: Ref) -> tuple[Array, ...]:
        """Multiply the i-th tile while the `last` one's parts leave; return the next slot and this tile's parts."""
        steps, parts = self.tiling.steps, self.tiling.parts
        own, _ = self.place(i)
        row_values = [plgpu.load(ref.at[own], layout=ROW, optimized=False) for ref in self.sides.rows]
        came, late = list[Array](), None
        first = i * steps

        self.multiply(acc, slot)
        done = 1
        for part in range(parts):
            if done < steps:
                slot, done = self.next_step(acc, first + done, slot), done + 1
            pl.when(i > 0)(functools.partial(self.store, i - 1, part, last[part]))
        if self.sides.tiles:
            if done < steps:
                slot, done = self.next_step(acc, first + done, slot), done + 1
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for copy in range(SLOTS):
                self.fetch(i, copy)
            rest, copies = steps - done, parts * len(self.sides.tiles)
            for copy in range(copies):
                until = steps - rest + rest * (copy + 2) // (copies + 2)
                slot, done = self.next_steps(acc, first + done, slot, until - done), until
                came.append(self.take(i, copy, row_values))
                if self.sides.factor and copy == parts - 1:
                    late, came = self.add(acc, own, came), []
        # Not earlier: the last tile's parts are in registers until they have left.
        narrow = [plgpu.load(ref.at[own], layout=plgpu.Layout.WGMMA, optimized=False) for ref in self.sides.narrow]
        slot = self.next_steps(acc, first + done, slot, steps - done)

        # An accumulator's registers are single, but bfloat16 is rounded in pairs.
        value = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)
        if late is not None:
            value += late
        self.steps.release(first + steps - 1, slot)
        results = self.finish(value, row_values, narrow, came)
        return self.steps.ring.after(slot), *results

    def multiply(self, acc: Ref, slot: Array) -> None:
        """Start the matmul of a step, once it has arrived."""
        self.steps.ring.wait(slot)
        own = pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        plgpu.wgmma(acc, self.smem.x.at[slot, own], self.smem.w.at[slot].transpose((1, 0)))

    def next_step(self, acc: Ref, number: Array, previous: Array) -> Array:
        """Start step `number`, wait for the one before to end, let its slot `previous` go; return the new slot."""
        slot = self.steps.ring.after(previous)
        self.multiply(acc, slot)
        plgpu.wgmma_wait(1)
        self.steps.release(number - 1, previous)
        return slot

    def next_steps(self, acc: Ref, number: Array, slot: Array, count: int) -> Array:
        # The quotient is 0. A loop whose length the compiler knows it unrolls, and moves all keeping to the end of the
        # tile.
        length = count + lax.div(slot, self.tiling.stages)
        return lax.fori_loop(0, length, lambda i, previous: self.next_step(acc, number + i, previous), slot)

    def place(self, i: Array) -> tuple[pl.Slice, Array]:
        """Return this warpgroup's rows of the i-th tile, and the tile's number among those of the same rows."""
        row, column_tile = self.tiles.corner(i)
        return pl.ds(row + self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), column_tile

    def columns(self, column_tile: Array, part: int) -> pl.Slice:
        return pl.ds(column_tile * self.tiling.config.columns + part * PART, PART)

    def store(self, i: Array, part: int, result: Array) -> None:
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
        """Start a copy of what the epilogue reads. They go round the slots: all parts of one array, then another's."""
        which, part = divmod(copy, self.tiling.parts)
        if which < len(self.sides.tiles):
            own, column_tile = self.place(i)
            plgpu.copy_gmem_to_smem(
                self.sides.tiles[which].at[own, self.columns(column_tile, part)],
                self.smem.part.at[self.warpgroup, copy % SLOTS],
                self.ready(copy),
            )

    def ready(self, copy: int) -> Ref:
        return self.part_ready.at[self.warpgroup * SLOTS + copy % SLOTS]

    def take(self, i: Array, copy: int, row_values: Values) -> Array:
        """Return a part that has arrived: the addend's as it is, the tile's as `keep` makes it; fetch the next one."""
        plgpu.barrier_wait(self.ready(copy))
        part = plgpu.load(self.smem.part.at[self.warpgroup, copy % SLOTS], layout=plgpu.Layout.WGMMA)
        is_addend = self.sides.factor and copy < self.tiling.parts
        made = part if is_addend else self.epilogue.keep(row_values, part).astype(jnp.bfloat16)
        made = lax.optimization_barrier(made)  # now, while the tensor cores are busy
        plgpu.commit_smem()  # all threads have read the slot
        self.fetch(i, copy + SLOTS)
        return made

    def add(self, acc: Ref, own: pl.Slice, parts: Values) -> Array | None:
        """Add the addend's rows times their factors to acc; return what the interpreter, which cannot, adds last."""
        addend = jnp.concatenate(parts, axis=1).astype(jnp.float32)
        addend *= rows(plgpu.load(self.sides.factor[0].at[own], layout=ROW, optimized=False), addend.shape)
        if interpreting():
            return addend
        plgpu.wgmma_wait(0)
        acc[...] = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA) + addend
        return None

    def finish(self, value: Array, row_values: Values, narrow: Values, kept: Values) -> Values:
        """Return the parts of a tile's result; its row results go to shared memory."""
        unit, results = self.epilogue.unit, list[Array]()
        for first in range(0, self.tiling.parts, unit):
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
    """Sum all columns of all parts, for `Epilogue.finish`: across threads once, not once a part."""
    return functools.reduce(jnp.add, parts).sum(axis=1)


def _split(refs: tuple[Ref, ...], *sizes: int) -> list[tuple[Ref, ...]]:
    """Cut `refs` into groups of the given sizes, and the rest."""
    groups = []
    for size in sizes:
        groups.append(refs[:size])
        refs = refs[size:]
    return [*groups, refs]
