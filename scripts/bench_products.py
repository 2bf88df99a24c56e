"""Time the products of a layer with what stands around them: by our kernels, and by cuBLAS and XLA.

Products and the passes around them at the sizes of the record's model, all interleaved, since a GPU under load lowers
its clock. Every kernel's result is checked against XLA's in float32: the norm of the error relative to the norm, and
above 2^-7 the exit status is 1. A prediction takes 720 TFLOP/s for a product and 3.0 TB/s for what is read and written,
whichever takes longer, since one should hide the other.
Without a GPU the kernels run in Pallas' interpreter: for tests of this script, at small sizes.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_speedrun.errors import UsageError
from jax_speedrun.kernels.hopper.matmul import unsupported
from jax_speedrun.kernels.hopper.rotary import HEAD_WIDTH, ROTATED, matmul_norm_rotary
from jax_speedrun.kernels.layer.mlp import mlp, relu_squared
from jax_speedrun.kernels.layer.mlp_hopper import matmul_relu_squared, matmul_slope
from jax_speedrun.kernels.layer.residual import linear, rstd
from jax_speedrun.kernels.layer.residual_hopper import matmul_add
from jax_speedrun.model import mix
from jax_speedrun.tools.timing import milliseconds

if __name__ == "__main__":  # before JAX starts: its interpreter needs a CPU thread for each warpgroup
    jax.config.update("jax_num_cpu_devices", 8)
INTERPRET = jax.default_backend() != "gpu"
CALLS, ROUNDS = (1, 1) if INTERPRET else (20, 5)
BYTES, FLOPS = 3.0e12, 720e12  # a second
LARGEST_ERROR = 2.0**-7  # a few roundings to bfloat16


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    by: str
    predicted_ms: float
    ms: float
    tflops: float
    error: float | None


class Case(NamedTuple):
    """One operation on `arrays`; `plain` and `kernel` return the same, whose first array is checked."""

    name: str
    arrays: tuple[Array, ...]
    plain: Callable[..., Any]
    kernel: Callable[..., Any] | None
    products: tuple[Array, Array] | None  # x and W, for the count of operations


def cases(tokens: int, width: int, hidden: int) -> list[Case]:
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int, size: float = 1.0) -> Array:
        return (size * jax.random.normal(next(keys), shape)).astype(jnp.bfloat16)

    x, y, dz, d_qkv = (normal(tokens, n) for n in (width, width, hidden, 3 * width))
    fc, fc_turned, proj, square, qkv_turned = (
        normal(*shape, size=0.5 / shape[1] ** 0.5)
        for shape in ((hidden, width), (width, hidden), (width, hidden), (width, width), (width, 3 * width))
    )
    proj_turned, scale = proj.T, rstd(x, 1e-6)
    along, half = -0.01 * scale, 0.5 * scale
    angle = jax.random.normal(next(keys), (tokens, ROTATED))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    r2 = relu_squared(linear(x, fc), scale)

    def wide(a: Array) -> Array:
        return a.astype(jnp.float32)

    def sum_and_inverse_rms(x: Array, y: Array, w: Array) -> tuple[Array, Array]:
        total = x + linear(y, w)
        return total, rstd(total, 1e-6)

    def slope(dy: Array, p: Array, s: Array, r2: Array) -> Array:
        return (wide(linear(dy, p)) * 2 * s[:, None] * jnp.sqrt(wide(r2))).astype(dy.dtype)

    def with_terms(z: Array, w: Array, dy: Array, along: Array, x: Array) -> Array:
        return (wide(linear(z, w)) + wide(dy) + along[:, None] * wide(x)).astype(z.dtype)

    def value(x: Array, w: Array, s: Array, half: Array, e: Array) -> Array:
        return (wide(linear(x, w)) * s[:, None] + half[:, None] * wide(e)).astype(x.dtype)

    def rotated(x: Array, w: Array, s: Array, cos: Array, sin: Array) -> Array:
        y = (wide(linear(x, w)) * s[:, None]).reshape(tokens, -1, HEAD_WIDTH)
        n = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
        (a, first), (b, second) = (jnp.split(half, [ROTATED], axis=-1) for half in jnp.split(n, 2, axis=-1))
        cos, sin = cos[:, None], sin[:, None]
        turned = jnp.concatenate([a * cos + b * sin, first, b * cos - a * sin, second], axis=-1)
        return turned.reshape(tokens, -1).astype(x.dtype)

    def kernel_with_terms(z: Array, w: Array, dy: Array, along: Array, x: Array) -> Any:
        return matmul_add(z, w, (None, dy), addend=(x, along), interpret=INTERPRET)

    return [
        Case("relu(s x W^T)^2", (x, fc, scale),
             lambda x, w, s: relu_squared(linear(x, w), s),
             lambda x, w, s: matmul_relu_squared(x, w, s, interpret=INTERPRET), (x, fc)),
        Case("(dy P) 2 s sqrt(r2)", (y, proj_turned, scale, r2), slope,
             lambda dy, p, s, r2: matmul_slope(dy, p, s, r2, interpret=INTERPRET), (y, proj_turned)),
        Case("x + r2 P^T", (x, r2, proj),
             lambda x, r2, p: x + linear(r2, p),
             lambda x, r2, p: matmul_add(r2, p, (None, x), interpret=INTERPRET), (r2, proj)),
        Case("dz W + dy + c x", (dz, fc_turned, y, along, x), with_terms, kernel_with_terms, (dz, fc_turned)),
        Case("d_qkv W + dx + c x", (d_qkv, qkv_turned, y, along, x), with_terms, kernel_with_terms,
             (d_qkv, qkv_turned)),
        Case("x + y W^T and its inverse rms", (x, y, square), sum_and_inverse_rms,
             lambda x, y, w: matmul_add(y, w, (None, x), squares=True, interpret=INTERPRET), (y, square)),
        Case("rotate(norm(s x W^T))", (x, square, scale, cos, sin), rotated,
             lambda *a: matmul_norm_rotary(*a, epsilon=1e-6, interpret=INTERPRET), (x, square)),
        Case("s x W^T + c e", (x, square, scale, half, y), value,
             lambda x, w, s, half, e: matmul_add(x, w, (half, e), s, interpret=INTERPRET), (x, square)),
        Case("mix of x and x0", (jnp.array([0.7, 0.4]), x, y), mix, None, None),
        Case("x W^T, D to F", (x, fc), linear, None, (x, fc)),
        Case("x W^T, F to D", (dz, proj), linear, None, (dz, proj)),
        Case("x W^T, D to D", (x, square), linear, None, (x, square)),
    ]  # fmt: skip


def whole_mlp(implementation: Any) -> Callable[..., Any]:
    def run(x: Array, dy: Array, fc: Array, proj: Array) -> Any:
        def output(x: Array, fc: Array, proj: Array) -> Array:
            return mlp(x, rstd(x, 1e-6), fc, proj, implementation, interpret=INTERPRET)

        y, pull = jax.vjp(output, x, fc, proj)
        return y, *pull(dy)

    return jax.jit(run)


def measure(tokens: int, width: int, hidden: int) -> list[Row]:
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    facts: dict[tuple[str, str], tuple[float, float, float | None]] = {}
    for case in cases(tokens, width, hidden):
        flops = 2.0 * case.products[0].size * case.products[1].shape[0] if case.products else 0.0
        plain = jax.jit(case.plain)
        want = jax.tree.leaves(plain(*case.arrays))[0]
        seconds = max(flops / FLOPS, (sum(a.nbytes for a in case.arrays) + want.nbytes) / BYTES)
        for by, function in (("XLA", plain), ("kernel", case.kernel)):
            if function is None:
                continue
            error = None
            if by == "kernel":
                precise = plain(*(a.astype(jnp.float32) for a in case.arrays))
                got = jax.tree.leaves(function(*case.arrays))[0]
                truth = jax.tree.leaves(precise)[0].astype(jnp.float32)
                error = float(jnp.linalg.norm(got.astype(jnp.float32) - truth) / jnp.linalg.norm(truth))
            runs[case.name, by] = lambda function=function, case=case: function(*case.arrays)  # type: ignore[misc]
            facts[case.name, by] = seconds, flops, error
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = (tokens, width), (tokens, width), (hidden, width), (width, hidden)
    x, dy, fc, proj = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    arrays = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16), 0.02 * fc, 0.01 * proj
    for by, implementation in (("XLA", "plain"), ("kernel", "fast")):
        run = whole_mlp(implementation)
        runs["mlp, forward and backward", by] = lambda run=run: run(*arrays)  # type: ignore[misc]
        flops = 12.0 * tokens * width * hidden
        facts["mlp, forward and backward", by] = flops / FLOPS, flops, None
    times = milliseconds({f"{name}|{by}": run for (name, by), run in runs.items()}, calls=CALLS, rounds=ROUNDS)
    return [
        Row(name, by, 1e3 * seconds, ms, flops / ms / 1e9, error)
        for ((name, by), (seconds, flops, error)), ms in zip(facts.items(), times.values(), strict=True)
    ]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_products.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="default: %(default)s")
    parser.add_argument("--width", type=int, default=768, metavar="N", help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=3072, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench_products"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    for sizes in ((options.width, options.hidden), (options.hidden, options.width)):
        if reason := unsupported(options.tokens, *sizes):
            raise UsageError(f"--tokens, --width, --hidden: the kernels need {reason}")
    return options


def run(options: argparse.Namespace) -> bool:
    """Whether every kernel is right."""
    sizes = options.tokens, options.width, options.hidden
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, T = {sizes[0]}, D = {sizes[1]}, F = {sizes[2]}")
    rows = measure(*sizes)
    print(f"{'':32s}{'by':8s}{'predict':>8s}{'ms':>9s}{'TFLOP/s':>9s}{'error':>10s}")
    for row in rows:
        error = "" if row.error is None else f"{row.error:10.2e}"
        print(f"{row.name:32s}{row.by:8s}{row.predicted_ms:8.3f}{row.ms:9.3f}{row.tflops:9.1f}{error}")
    record: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    record |= dict(zip(("tokens", "width", "hidden"), sizes, strict=True))
    record["rows"] = [dataclasses.asdict(row) for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "products.json").write_text(json.dumps(record, indent=1) + "\n")
    return all(row.error is None or row.error <= LARGEST_ERROR for row in rows)


def main(arguments: list[str] | None = None) -> int:
    try:
        return 0 if run(parse_arguments(arguments)) else 1
    except UsageError as error:
        print(f"bench_products.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
