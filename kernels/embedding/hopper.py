"""The embedding gradient in one pass over memory, on Hopper GPUs.

Every program takes as many of the sorted tokens as every other, however skewed
the ids are, fetches their rows from where they stand and adds them up in
registers. Where an id ends, its sum goes to a target:

    ids       3 3 7 7 | 7 7 7 7 | 7 9 9 9     three programs of four tokens
    targets   . 3 . > | . . . < | < . . 9     the table's row, or the program's part `<` or `>`

An id that crosses from one program to the next leaves a part in each: `>` where
it begins and `<` where it goes on. A second, small kernel adds them in their
order. So a sum does not depend on which program comes first, and no two programs
write to one place. The first kernel also clears the rows of absent ids, every
program its share of the vocab.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from ..hopper.primitives import Ref
from ..implementation import vary_together
from .order import TokenOrder

TOKENS = 64  # of a program: at T = 65,536 all 1024 programs run at once, eight on each multiprocessor
IN_FLIGHT = 8  # rows requested before the first is added: up to 96 KiB a multiprocessor at D = 768 in bfloat16
THREADS = 128
NOTHING = -1


def hopper_gradient(d_rows_TD: Array, order: TokenOrder, dtype: DTypeLike) -> Array:
    """Return for each id the sum of the rows of `d_rows_TD` that stand at it: (V, D) in `dtype`, 0 for absent ids.

    Accumulates in float32, in an order that the ids alone determine.

    Args:
      d_rows_TD: shapes as `unsupported` says.
      order: `sort_tokens` of the ids.
      dtype: of the result.
    """
    plan = make_plan(order)
    table_VD, parts_QD = _sum_rows(d_rows_TD, order, plan.target_T, jnp.dtype(dtype))
    crossing_PD = _sum_parts(parts_QD, plan.later_P, jnp.dtype(dtype))
    gradient_VD = table_VD.at[plan.place_P].set(crossing_PD, mode="drop", unique_indices=True)
    return vary_together(d_rows_TD, gradient_VD)[1]  # which Pallas' results do not


def unsupported(tokens: int, width: int) -> str | None:
    """Return what the kernels need of a shape, None where they have it."""
    for what, size, multiple in (("T", tokens, TOKENS), ("D", width, THREADS)):
        if size % multiple or not size:
            return f"{what} a multiple of {multiple}, got {size}"
    return None


class Plan(NamedTuple):
    """What both kernels do; P programs of 64 sorted tokens.

    target_T: where the running sum goes after each token: a row of the table, V
      for `<`, V + 1 for `>`, or `NOTHING`.
    later_P: how many programs after this one hold parts of the id that begins in
      it and goes on; 0 if there is none.
    place_P: that id; if there is none a place beyond the table, each its own.
    """

    target_T: Array
    later_P: Array
    place_P: Array


def make_plan(order: TokenOrder) -> Plan:
    vocab_size = order.first_V.shape[0]
    borders = borders_of(order)
    later_P = jnp.zeros(borders.start.shape, jnp.int32).at[borders.start].add(borders.continues.astype(jnp.int32))
    place_P = jnp.where(later_P > 0, borders.last, vocab_size + lax.iota(jnp.int32, later_P.shape[0]))
    ids_PC = order.sorted_T.reshape(-1, TOKENS)
    goes_on_PC = borders.continues[:, None] & (ids_PC == ids_PC[:, :1])
    begins_PC = ids_PC == place_P[:, None]
    target_PC = jnp.where(goes_on_PC, vocab_size, jnp.where(begins_PC, vocab_size + 1, ids_PC))
    ends_PC = jnp.pad(ids_PC[:, 1:] != ids_PC[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    return Plan(jnp.where(ends_PC, target_PC, NOTHING).reshape(-1), later_P, place_P)


class Borders(NamedTuple):
    """How ids run from one program's tokens to the next one's; P programs.

    continues: whether a program begins with the id that the one before ends with.
    start: the program in which the id that it begins with has begun.
    last: the id that it ends with.
    """

    continues: Array
    start: Array
    last: Array


def borders_of(order: TokenOrder) -> Borders:
    sorted_PC = order.sorted_T.reshape(-1, TOKENS)
    first_P, last_P = sorted_PC[:, 0], sorted_PC[:, -1]
    continues_P = jnp.concatenate([jnp.zeros(1, bool), first_P[1:] == last_P[:-1]])
    return Borders(continues_P, lax.div(order.first_V[first_P], TOKENS), last_P)


def _layout(width: int) -> Any:
    """Lay a row over the warpgroup's threads, up to four neighbouring elements a load."""
    elements = next(size for size in (4, 2, 1) if width % (size * THREADS) == 0)
    return plgpu.Layout.WG_STRIDED((width,), vec_size=elements)


@functools.partial(jax.jit, static_argnames="dtype")  # lowered once, not once a table
def _sum_rows(d_rows_TD: Array, order: TokenOrder, target_T: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Return the gradient but for ids that cross, (V, D), and their parts: all `<`, then all `>`, (2 P, D) float32."""
    length, width = d_rows_TD.shape
    vocab_size, programs = order.first_V.shape[0], length // TOKENS
    share = -(-vocab_size // programs)
    layout = _layout(width)

    def zero() -> Array:
        return plgpu.layout_cast(jnp.zeros(width, jnp.float32), layout)

    def body(d_rows: Ref, source: Ref, target: Ref, first: Ref, table: Ref, parts: Ref) -> None:
        program = lax.axis_index("program")

        def clear(row: Array, _: None) -> None:
            @pl.when(first[row] == length)
            def _absent() -> None:
                table[row] = zero().astype(dtype)

        def store(total: Array, place: Array) -> Array:
            @pl.when(place < vocab_size)
            def _whole() -> None:
                table[place] = total.astype(dtype)

            @pl.when(place >= vocab_size)
            def _part() -> None:
                parts[(place - vocab_size) * programs + program] = total

            return zero()

        def add_some(batch: Array, total: Array) -> Array:
            tokens = [program * TOKENS + batch * IN_FLIGHT + i for i in range(IN_FLIGHT)]
            places = [target[token] for token in tokens]
            rows = [plgpu.load(d_rows.at[source[token]], layout=layout) for token in tokens]
            for row, place in zip(rows, places, strict=True):
                total = total + row.astype(jnp.float32)
                total = lax.cond(place != NOTHING, store, lambda total, _: total, total, place)
            return total

        # First, since nothing waits for a write.
        lax.fori_loop(program * share, lax.min((program + 1) * share, vocab_size), clear, None)
        lax.fori_loop(0, TOKENS // IN_FLIGHT, add_some, zero())

    outputs = (
        jax.ShapeDtypeStruct((vocab_size, width), dtype),
        jax.ShapeDtypeStruct((2 * programs, width), jnp.float32),
    )
    run = _kernel(body, "embedding_gradient_rows", outputs, programs=programs)
    return run(d_rows_TD, order.permutation_T, target_T, order.first_V)


@functools.partial(jax.jit, static_argnames="dtype")
def _sum_parts(parts_QD: Array, later_P: Array, dtype: jnp.dtype) -> Array:
    """Return for each program the sum of the id that begins in it and goes on, (P, D); undefined if there is none."""
    programs, width = later_P.shape[0], parts_QD.shape[1]
    layout = _layout(width)

    def body(parts: Ref, later: Ref, sums: Ref) -> None:
        program = lax.axis_index("program")
        count = later[program]

        def add(number: int) -> Callable[[Array, Array], Array]:
            def step(i: Array, total: Array) -> Array:
                rows = [plgpu.load(parts.at[program + 1 + i * number + j], layout=layout) for j in range(number)]
                return sum(rows, total)

            return step

        @pl.when(count > 0)
        def _crosses() -> None:
            total = plgpu.load(parts.at[programs + program], layout=layout)
            groups = lax.div(count, IN_FLIGHT)
            total = lax.fori_loop(0, groups, add(IN_FLIGHT), total)
            total = lax.fori_loop(groups * IN_FLIGHT, count, add(1), total)
            sums[program] = total.astype(dtype)

    output = jax.ShapeDtypeStruct((programs, width), dtype)
    return _kernel(body, "embedding_gradient_parts", output, programs=programs)(parts_QD, later_P)


def _kernel(body: Callable[..., None], name: str, out_type: Any, *, programs: int) -> Callable[..., Any]:
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(programs,),
        grid_names=("program",),
        kernel_name=name,
        # No thread reads what another has written.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
