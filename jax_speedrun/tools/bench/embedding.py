"""Time the gradients of four embedding tables on real text, checked against float64.

Variants: xla (scatter-add), hopper (the Pallas kernel; without a GPU in the interpreter, small shapes only), scatter
(scatter-add of sorted rows, for comparison: its order of addition varies).
`by bytes` is the time that each one's memory traffic takes at the rate of a large copy on an H100.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...data.batches import TINY_DATA, first_tokens
from ...errors import UsageError
from ...kernels.embedding.hopper import TOKENS, borders_of, hopper_gradient
from ...kernels.embedding.op import plain_gradient
from ...kernels.embedding.order import TokenOrder, sort_tokens
from ..command import run_command
from .common import Table, add_size, bench_parser, describe, kernels_run_here, on_gpu, write_record
from .timing import milliseconds

TABLES = 4
CALLS, ROUNDS = 20, 7
COPY_RATE = 3.0e12  # bytes a second, reads and writes together

type Gradient = Callable[[Array, Array, TokenOrder], Array]


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant's time and faults; `sort` is what `hopper` and `scatter` need once for all tables."""

    variant: str
    ms: float
    ms_by_bytes: float
    temporary_bytes: int
    error_of_bound: float | None  # largest error as a share of what float32 sums and one rounding may be off
    repeats: bool  # whether two runs agree to the bit


def scattered_gradient(d_rows_TD: Array, order: TokenOrder) -> Array:
    zeros_VD = jnp.zeros((order.first_V.shape[0], d_rows_TD.shape[1]), jnp.float32)
    d_rows_TD = d_rows_TD[order.permutation_T].astype(jnp.float32)
    return zeros_VD.at[order.sorted_T].add(d_rows_TD, indices_are_sorted=True).astype(jnp.bfloat16)


GRADIENTS: dict[str, Gradient] = {
    "xla": lambda d, tokens, order: plain_gradient(d, tokens, order.first_V.shape[0], jnp.bfloat16),
    "hopper": lambda d, tokens, order: hopper_gradient(d, order, jnp.bfloat16),
    "scatter": lambda d, tokens, order: scattered_gradient(d, order),
}


def table_bytes(order: TokenOrder, width: int) -> dict[str, float]:
    """Return the memory traffic of one table's gradient, bf16 in and out."""
    length, vocab_size = order.sorted_T.shape[0], order.first_V.shape[0]
    rows, table, present = length * width, vocab_size * width, int(jnp.sum(order.first_V < length)) * width
    crossing = int(jnp.sum(borders_of(order).continues)) * width
    float32_table = 4 * table + 4 * table + 2 * table  # cleared, read, rounded
    return {
        "xla": 2 * rows + 8 * rows + float32_table,
        "hopper": 2 * rows + 2 * table + 2 * 2 * 4 * crossing,
        "scatter": 2 * rows + 8 * present + float32_table,
    }


def error_of_bound(got: Array, d_rows: Array, order: TokenOrder) -> float:
    """Return the largest error as a share of its bound.

    n float32 additions may be off by n 2^-24 of the sum of magnitudes, rounding to bf16 by 2^-8 of the sum.
    """
    ids, starts = np.unique(np.asarray(order.sorted_T), return_index=True)
    rows = np.asarray(d_rows, np.float64)[np.asarray(order.permutation_T)]
    want = np.add.reduceat(rows, starts)
    bound = np.diff(starts, append=len(rows))[:, None] * 2.0**-24 * np.add.reduceat(np.abs(rows), starts)
    result = np.asarray(got, np.float64)
    absent = np.delete(result, ids, axis=0)
    ratio = np.max(np.abs(result[ids] - want) / (1.01 * bound + 2.0**-8 * np.abs(want)))
    return float(ratio) if not absent.any() else float("inf")


def measure(name: str, gradient: Gradient, inputs: tuple[Array, list[Array], TokenOrder], traffic: float) -> Row:
    tokens, d_rows, order = inputs
    together = jax.jit(lambda d_rows, tokens, order: [gradient(d, tokens, order) for d in d_rows])
    compiled = together.lower(d_rows, tokens, order).compile()
    first, second = compiled(d_rows, tokens, order), compiled(d_rows, tokens, order)
    repeats = all(bool(jnp.array_equal(a, b)) for a, b in zip(first, second, strict=True))
    error = max(error_of_bound(got, d, order) for got, d in zip(first, d_rows, strict=True))
    del first, second
    runs = {name: lambda: compiled(d_rows, tokens, order)}
    calls, rounds = (CALLS, ROUNDS) if on_gpu() else (1, 1)
    ms = milliseconds(runs, calls=calls, rounds=rounds)[name]
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory is not None else 0
    return Row(name, ms, TABLES * traffic / COPY_RATE * 1e3, temporary, error, repeats)


def parser() -> argparse.ArgumentParser:
    p = bench_parser("embedding", __doc__)
    p.add_argument("--data", type=Path, default=TINY_DATA, metavar="DIR", help="default: the package's text, repeated")
    add_size(p, "--length", 65536, "T", "tokens")
    add_size(p, "--width", 768, "D")
    add_size(p, "--vocab-size", 50257, "V", "ids modulo V")
    p.add_argument("--variants", nargs="+", choices=list(GRADIENTS), default=list(GRADIENTS))
    return p


def run(options: argparse.Namespace) -> int:
    """Return 0 if every variant is right, and `hopper` repeats to the bit; else 1."""
    length, width, vocab_size = options.length, options.width, options.vocab_size
    if length <= 0 or length % TOKENS:
        raise UsageError(f"--length {length}: must be a positive multiple of {TOKENS}")
    with kernels_run_here():
        tokens = jnp.asarray(first_tokens(options.data, length) % vocab_size)
        keys = jax.random.split(jax.random.key(0), TABLES)
        d_rows = [jax.random.normal(key, (length, width), jnp.bfloat16) for key in keys]
        sort = jax.jit(sort_tokens, static_argnums=1)
        order, counts = sort(tokens, vocab_size), np.bincount(np.asarray(tokens))
        print(f"{describe(T=length, V=vocab_size, D=width)}, {TABLES} tables")
        print(f"{np.count_nonzero(counts)} ids, the most frequent {counts.max()} times")
        traffic = table_bytes(order, width)
        sorting = milliseconds({"sort": lambda: sort(tokens, vocab_size)}, calls=CALLS, rounds=ROUNDS)["sort"]
        rows = [Row("sort", sorting, 64 * length / COPY_RATE * 1e3, 0, None, True)]
        for name in options.variants:
            rows.append(measure(name, GRADIENTS[name], (tokens, d_rows, order), traffic[name]))
    table = Table({"variant": "<9", "ms": "9.3f", "by bytes": "9.3f", "temporary MB": "12.1f", "error/bound": "11.3f",
                   "repeats": "7s"})  # fmt: skip
    for row in rows:
        repeats = "yes" if row.repeats else "no"
        table.add(row.variant, row.ms, row.ms_by_bytes, row.temporary_bytes / 1e6, row.error_of_bound, repeats)
    write_record(options.out, "embedding", rows, shape=[length, vocab_size, width])
    right = all(row.error_of_bound is None or row.error_of_bound <= 1 for row in rows)
    return 0 if right and all(row.repeats for row in rows if row.variant == "hopper") else 1


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), run, arguments)
