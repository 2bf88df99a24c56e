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
columns at a time. Likewise what an epilogue reads of (T, N) arrays arrives during the product, and what it makes of it
waits in registers as bf16:

    step     0      1        2        3        4        5              7         8         9         10        11
    leaves          part 0   part 1   part 2   part 3
    comes                                               fetch 0, 1     keep 0,   keep 1,   keep 2    keep 3    finish
                                                                       fetch 2   fetch 3
    waits    last tile's parts, ever fewer .........    this tile's kept parts, ever more .................    result

All through the same two buffers per warpgroup.

Barriers (s a slot of the ring; every count is per use, and no use begins before all have seen the last):

    ready[s]     2 copies         producer: fills s              both warpgroups, before they multiply
    free[s]      2 warpgroups     warpgroups: s is multiplied    producer, before it fills s again
    part_ready   1                a warpgroup: fetches           itself, before it keeps

    producer     fill 0 1 2 3 | free[0] fill 0 | free[1] fill 1 | ..                               | free[0] .. free[3]
    a warpgroup  ready[0] mul | ready[1] mul, free[0]! | ready[2] mul, free[1]! | ..               (! signals)

Nobody waits in a circle: warpgroups wait for the producer alone, and a slot is freed when the next step has been
issued, which takes 2 stages.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_config import MULTIPROCESSORS, HopperConfig
from .attention_hopper_ops import ROW, Ref, launch, split_roles, tile

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
    tiles: bf16 (T, N), at most two, of which `keep` gets a part of 64 columns.
    keep: (row values, bf16 parts of the tiles) -> one part, rounded to bf16.
    unit: parts of a tile that `finish` gets together.
    row_results: float32 values for each row that `finish` returns with a unit.
    """

    finish: Callable[[Values, Values, Values, Values], tuple[Values, Values]]
    rows: Sequence[Array] = ()
    narrow: Sequence[Array] = ()
    tiles: Sequence[Array] = ()
    keep: Callable[[Values, Values], Array] | None = None
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
    (length, width), (outputs, _) = (xs[0].shape[0], xs[0].shape[1] * len(xs)), w_ND.shape
    steps_of_one = xs[0].shape[1] // config.channels
    steps, parts = width // config.channels, config.columns // PART
    stages = min(config.stages, steps)
    row_tiles, column_tiles = length // ROWS, outputs // config.columns
    # The interpreter runs one program after the other: several tiles for each are what needs a test.
    programs = min(row_tiles * column_tiles, 2 if interpret else MULTIPROCESSORS)
    units = parts // epilogue.unit
    row_results = units * epilogue.row_results
    inputs = (xs, [w_ND], epilogue.rows, epilogue.narrow, epilogue.tiles)

    def body(*refs: Ref, smem: Buffers, barriers: Barriers) -> None:
        x_refs, (w,), row_refs, narrow_refs, tile_refs, (out, *row_out) = _split(refs, *map(len, inputs))
        program = lax.axis_index("program")
        count = pl.cdiv(row_tiles * column_tiles - program, programs)
        # Not 0: the compiler would know each step's slot, and keep all their addresses in registers.
        first_slot = lax.rem(program, stages)

        def corner(i: Array) -> tuple[Array, Array]:
            """First row of this program's i-th tile, and its number among the tiles of these rows."""
            number = program + i * programs
            return lax.div(number, column_tiles) * ROWS, lax.rem(number, column_tiles)

        def produce() -> None:
            @pl.loop(0, count)
            def _tile(i: Array) -> None:
                row, column_tile = corner(i)

                @pl.loop(0, steps)
                def _step(step: Array) -> None:
                    number = i * steps + step
                    slot = lax.rem(first_slot + number, stages)
                    ready = barriers.ready.at[slot]
                    pl.when(number >= stages)(lambda: plgpu.barrier_wait(barriers.free.at[slot]))

                    def channels(step: Array) -> pl.Slice:
                        return pl.ds(step * config.channels, config.channels)

                    for which, x in enumerate(x_refs):

                        def copy(x: Ref = x, first: int = which * steps_of_one) -> None:
                            source = x.at[pl.ds(row, ROWS), channels(step - first)]
                            plgpu.copy_gmem_to_smem(source, smem.x.at[slot], ready)

                        pl.when(lax.div(step, steps_of_one) == which)(copy)
                    columns = pl.ds(column_tile * config.columns, config.columns)
                    plgpu.copy_gmem_to_smem(w.at[columns, channels(step)], smem.w.at[slot], ready)

            for slot in range(stages):  # every completion of a barrier must be awaited, the last one too
                plgpu.barrier_wait(barriers.free.at[slot])

        def consume() -> None:
            warpgroup = lax.axis_index("warpgroup")
            half = pl.ds(warpgroup * HALF, HALF)

            def place(i: Array) -> tuple[pl.Slice, Array]:
                """This warpgroup's rows of the i-th tile, and the tile's number among those of the same rows."""
                row, column_tile = corner(i)
                return pl.ds(row + warpgroup * HALF, HALF), column_tile

            def columns(column_tile: Array, part: int) -> pl.Slice:
                return pl.ds(column_tile * config.columns + part * PART, PART)

            def leave(i: Array, part: int, result: Array) -> None:
                own, column_tile = place(i)
                if part == 0:
                    for j in range(row_results):
                        target = row_out[0].at[column_tile * row_results + j, own]
                        plgpu.copy_smem_to_gmem(smem.row.at[warpgroup, j], target)
                buffer = smem.part.at[warpgroup, part % SLOTS]
                plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                buffer[...] = result
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(buffer, out.at[own, columns(column_tile, part)])

            def one_tile(i: Array, slot: Array, last: Values, acc: Ref) -> tuple[Array, ...]:
                """Multiply the i-th tile while the `last` one's parts leave; the next slot and this tile's parts."""
                own, column_tile = place(i)
                row_values = [plgpu.load(ref.at[own], layout=ROW, optimized=False) for ref in row_refs]
                kept: Values = []

                def fetch(copy: int) -> None:
                    """Copies go round the slots: all tiles' of part 0, then of part 1, ..."""
                    part, which = divmod(copy, len(tile_refs))
                    if part < parts:
                        plgpu.copy_gmem_to_smem(
                            tile_refs[which].at[own, columns(column_tile, part)],
                            smem.part.at[warpgroup, copy % SLOTS],
                            barriers.part_ready.at[warpgroup * SLOTS + copy % SLOTS],
                        )

                def keep(part: int) -> None:
                    assert epilogue.keep is not None
                    copies = range(part * len(tile_refs), (part + 1) * len(tile_refs))
                    arrived: Values = []
                    for copy in copies:
                        plgpu.barrier_wait(barriers.part_ready.at[warpgroup * SLOTS + copy % SLOTS])
                        buffer = smem.part.at[warpgroup, copy % SLOTS]
                        arrived.append(plgpu.load(buffer, layout=plgpu.Layout.WGMMA))
                    # Made now, while the tensor cores are busy.
                    kept.append(lax.optimization_barrier(epilogue.keep(row_values, arrived).astype(jnp.bfloat16)))
                    plgpu.commit_smem()  # all threads have read the slots
                    for copy in copies:
                        fetch(copy + SLOTS)

                def multiply(slot: Array) -> None:
                    plgpu.barrier_wait(barriers.ready.at[slot])
                    plgpu.wgmma(acc, smem.x.at[slot, half], smem.w.at[slot].transpose((1, 0)))

                def after(slot: Array) -> Array:
                    return jnp.where(slot == stages - 1, 0, slot + 1)

                def next_step(_: Any, previous: Array) -> Array:
                    slot = after(previous)
                    multiply(slot)
                    plgpu.wgmma_wait(1)
                    plgpu.barrier_arrive(barriers.free.at[previous])
                    return slot

                def steps_from(slot: Array, count: int) -> Array:
                    # The quotient is 0. A loop whose length the compiler knows it unrolls, and moves all keeping to the
                    # end of the tile.
                    return lax.fori_loop(0, count + lax.div(slot, stages), next_step, slot)

                multiply(slot)
                done = 1
                for part in range(parts):
                    if done < steps:
                        slot, done = next_step(done, slot), done + 1
                    pl.when(i > 0)(functools.partial(leave, i - 1, part, last[part]))
                if tile_refs:
                    if done < steps:
                        slot, done = next_step(done, slot), done + 1
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for copy in range(SLOTS):
                        fetch(copy)
                    rest = steps - done
                    for part in range(parts):
                        until = steps - rest + rest * (part + 2) // (parts + 2)
                        slot, done = steps_from(slot, until - done), until
                        keep(part)
                # Not earlier: the last tile's parts are in registers until they have left.
                narrow = [plgpu.load(ref.at[own], layout=plgpu.Layout.WGMMA, optimized=False) for ref in narrow_refs]
                slot = steps_from(slot, steps - done)

                # An accumulator's registers are single, but bfloat16 is rounded in pairs.
                value = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)
                plgpu.barrier_arrive(barriers.free.at[slot])
                results: Values = []
                for unit in range(units):
                    members = range(unit * epilogue.unit, (unit + 1) * epilogue.unit)
                    of_parts, of_rows = epilogue.finish(
                        [value[:, part * PART : (part + 1) * PART] for part in members],
                        row_values,
                        narrow,
                        [kept[part] for part in members if kept],
                    )
                    results += [result.astype(jnp.bfloat16) for result in of_parts]
                    for j, of_row in enumerate(of_rows, start=unit * epilogue.row_results):
                        smem.row[warpgroup, j] = of_row
                if row_results:
                    plgpu.commit_smem()
                return after(slot), *results

            def next_tile(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                slot, *last = carry
                acc = plgpu.ACC((HALF, config.columns), jnp.float32)
                result: tuple[Array, ...] = pl.run_scoped(functools.partial(one_tile, i, slot, last), acc)
                return result

            nothing = plgpu.layout_cast(jnp.zeros((HALF, PART), jnp.bfloat16), plgpu.Layout.WGMMA)
            _, *last = lax.fori_loop(0, count, next_tile, (first_slot, *[nothing] * parts))
            for part, result in enumerate(last):
                leave(count - 1, part, result)
            plgpu.wait_smem_to_gmem(0)

        split_roles(produce, consume, HopperConfig(stages=stages))

    out_types = [jax.ShapeDtypeStruct((length, outputs), jnp.bfloat16)]
    if row_results:
        out_types.append(jax.ShapeDtypeStruct((column_tiles * row_results, length), jnp.float32))
    run = launch(
        body,
        name,
        out_types,
        dict(
            smem=Buffers(
                x=tile(stages, ROWS, config.channels),
                w=tile(stages, config.columns, config.channels),
                part=tile(WARPGROUPS, SLOTS, HALF, PART),
                row=plgpu.SMEM((WARPGROUPS, max(1, row_results), HALF), jnp.float32),
            ),
            barriers=Barriers(
                ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
                part_ready=plgpu.Barrier(num_barriers=WARPGROUPS * SLOTS),
            ),
        ),
        programs=programs,
        interpret=interpret,
    )
    with jax.named_scope("product"):  # by which profiling.py knows it
        result: list[Array] = run(*(array for group in inputs for array in group))
    return result


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
