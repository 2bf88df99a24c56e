"""Time the gradients of four embedding tables on real text, checked against float64.

Variants: plain (scatter-add), hopper (the Pallas kernel; without a GPU in
the interpreter, small shapes only), scatter (scatter-add of sorted rows, for comparison: its order of addition varies).
`by bytes` is the time that each one's memory traffic takes at the rate of a large copy on an H100.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_speedrun.data.batches import TINY_DATA, first_tokens
from jax_speedrun.errors import UsageError
from jax_speedrun.kernels.embedding.hopper import TOKENS, borders_of, hopper_gradient
from jax_speedrun.kernels.embedding.op import TokenOrder, plain_gradient, sort_tokens
from jax_speedrun.tools.timing import milliseconds

TABLES = 4
CALLS, ROUNDS = 20, 7
COPY_RATE = 3.0e12  # bytes a second, reads and writes together

type Gradient = Callable[[Array, Array, TokenOrder], Array]


@dataclasses.dataclass(frozen=True)
class Row:
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


def gradients() -> dict[str, Gradient]:
    interpret = jax.default_backend() != "gpu"
    return {
        "plain": lambda d, tokens, order: plain_gradient(d, tokens, order.first_V.shape[0], jnp.bfloat16),
        "hopper": lambda d, tokens, order: hopper_gradient(d, order, jnp.bfloat16, interpret=interpret),
        "scatter": lambda d, tokens, order: scattered_gradient(d, order),
    }


def table_bytes(order: TokenOrder, width: int) -> dict[str, float]:
    """Memory traffic of one table's gradient, bf16 in and out."""
    length, vocab_size = order.sorted_T.shape[0], order.first_V.shape[0]
    rows, table, present = length * width, vocab_size * width, int(jnp.sum(order.first_V < length)) * width
    crossing = int(jnp.sum(borders_of(order).continues)) * width
    float32_table = 4 * table + 4 * table + 2 * table  # cleared, read, rounded
    return {
        "plain": 2 * rows + 8 * rows + float32_table,
        "hopper": 2 * rows + 2 * table + 2 * 2 * 4 * crossing,
        "scatter": 2 * rows + 8 * present + float32_table,
    }


def error_of_bound(got: Array, d_rows: Array, order: TokenOrder) -> float:
    """n float32 additions: n 2^-24 of the sum of magnitudes; rounding to bf16: 2^-8 of the sum."""
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
    ms = milliseconds(runs, calls=CALLS if jax.default_backend() == "gpu" else 1, rounds=ROUNDS)[name]
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory is not None else 0
    return Row(name, ms, TABLES * traffic / COPY_RATE * 1e3, temporary, error, repeats)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=TINY_DATA, metavar="DIR", help="default: the package's text, repeated")
    p.add_argument("--length", type=int, default=65536, metavar="T", help="tokens (default %(default)s)")
    p.add_argument("--width", type=int, default=768, metavar="D", help="default %(default)s")
    p.add_argument("--vocabulary", type=int, default=50257, metavar="V", help="ids modulo V (default %(default)s)")
    p.add_argument("--variants", nargs="+", choices=list(gradients()), default=list(gradients()))
    p.add_argument("--out", type=Path, default=Path("bench_embedding"), metavar="DIR", help="default %(default)s")
    return p


def run(args: argparse.Namespace) -> bool:
    """Whether every variant is right, and `hopper` repeats to the bit."""
    if args.length <= 0 or args.length % TOKENS:
        raise UsageError(f"--length {args.length}: must be a positive multiple of {TOKENS}")
    tokens = jnp.asarray(first_tokens(args.data, args.length) % args.vocab_size)
    keys = jax.random.split(jax.random.key(0), TABLES)
    d_rows = [jax.random.normal(key, (args.length, args.width), jnp.bfloat16) for key in keys]
    sort = jax.jit(sort_tokens, static_argnums=1)
    order = sort(tokens, args.vocab_size)
    device, counts = jax.devices()[0].device_kind, np.bincount(np.asarray(tokens))
    print(
        f"{device}, jax {jax.__version__}, T = {args.length}, V = {args.vocab_size}, D = {args.width}, {TABLES} tables"
    )
    print(f"{np.count_nonzero(counts)} ids, the most frequent {counts.max()} times")
    traffic = table_bytes(order, args.width)
    sorting = milliseconds({"sort": lambda: sort(tokens, args.vocab_size)}, calls=CALLS, rounds=ROUNDS)["sort"]
    rows = [Row("sort", sorting, 64 * args.length / COPY_RATE * 1e3, 0, None, True)]
    for name in args.variants:
        rows.append(measure(name, gradients()[name], (tokens, d_rows, order), traffic[name]))
    print("variant         ms  by bytes  temporary MB  error/bound  repeats")
    for row in rows:
        error = "" if row.error_of_bound is None else f"{row.error_of_bound:.3f}"
        print(f"{row.variant:9s} {row.ms:8.3f} {row.ms_by_bytes:9.3f} {row.temporary_bytes / 1e6:13.1f} {error:>12s}"
              f"  {'yes' if row.repeats else 'no'}")  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"device": device, "jax": jax.__version__, "shape": [args.length, args.vocab_size, args.width],
              "rows": [dataclasses.asdict(row) for row in rows]}  # fmt: skip
    (args.out / "embedding.json").write_text(json.dumps(record, indent=1) + "\n")
    right = all(row.error_of_bound is None or row.error_of_bound <= 1 for row in rows)
    return right and all(row.repeats for row in rows if row.variant == "hopper")


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        return 0 if run(args) else 1
    except (UsageError, ValueError) as error:
        print(f"bench_embedding.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
