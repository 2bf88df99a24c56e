"""Time the matmuls of a layer with what stands around them: by our kernels, and by cuBLAS and XLA.

Matmuls and the passes around them at the sizes of the record's model, all interleaved, since a GPU under load lowers
its clock. Every kernel's result is checked against XLA's in float32: the norm of the error relative to the norm, and
above 2^-7 the exit status is 1. A prediction takes 720 TFLOP/s for a matmul and 3.0 TB/s for what is read and written,
whichever takes longer, since one should hide the other.
Without a GPU the kernels run in Pallas' interpreter: for tests of this script, at small sizes.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ...errors import UsageError
from ...kernels.hopper.matmul import unsupported
from ...kernels.hopper.rotary import HEAD_WIDTH, ROTATED
from ...kernels.implementation import Implementation
from ...kernels.layer.mlp import mlp, relu_squared
from ...kernels.layer.mlp_hopper import matmul_relu_squared, matmul_slope
from ...kernels.layer.residual import linear, rstd
from ...kernels.layer.residual_hopper import matmul_add
from ...kernels.layer.self_attention_hopper import matmul_norm_rotary
from ...model import mix
from ..command import run_command
from .common import Table, add_size, bench_parser, describe, kernels_run_here, on_gpu, write_record
from .timing import milliseconds

CALLS, ROUNDS = 20, 5
BYTES, FLOPS = 3.0e12, 720e12  # a second
LARGEST_ERROR = 2.0**-7  # a few roundings to bfloat16


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation by XLA or by our kernel."""

    name: str
    by: str
    predicted_ms: float
    ms: float
    tflops: float
    error: float | None


class Case(NamedTuple):
    """One operation on `arrays`; `xla` and `kernel` return the same, whose first array is checked.

    multiplied: x and W, for the count of operations.
    """

    name: str
    arrays: tuple[Array, ...]
    xla: Callable[..., Any]
    kernel: Callable[..., Any] | None
    multiplied: tuple[Array, Array] | None


class Arrays(NamedTuple):
    """What the operations read: activations of T tokens, weights stored (out, in), turned ones for backward."""

    x_TD: Array
    y_TD: Array
    dz_TF: Array
    d_qkv_TE: Array
    r2_TF: Array
    fc_FD: Array
    fc_DF: Array
    proj_DF: Array
    proj_FD: Array
    square_DD: Array
    qkv_DE: Array
    rstd_T: Array
    cos_TR: Array
    sin_TR: Array


def random_arrays(tokens: int, width: int, hidden: int) -> Arrays:
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int, size: float = 1.0) -> Array:
        return (size * jax.random.normal(next(keys), shape)).astype(jnp.bfloat16)

    def weight(*shape: int) -> Array:
        return normal(*shape, size=0.5 / shape[1] ** 0.5)

    x, y, dz, d_qkv = (normal(tokens, n) for n in (width, width, hidden, 3 * width))
    fc, fc_turned, proj, square, qkv_turned = (
        weight(*shape)
        for shape in ((hidden, width), (width, hidden), (width, hidden), (width, width), (width, 3 * width))
    )
    scale = rstd(x, 1e-6)
    angle = jax.random.normal(next(keys), (tokens, ROTATED))
    r2 = relu_squared(linear(x, fc), scale)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return Arrays(x, y, dz, d_qkv, r2, fc, fc_turned, proj, proj.T, square, qkv_turned, scale, cos, sin)


def wide(a: Array) -> Array:
    return a.astype(jnp.float32)


def xla_sum_and_rstd(x: Array, y: Array, w: Array) -> tuple[Array, Array]:
    total = x + linear(y, w)
    return total, rstd(total, 1e-6)


def xla_slope(dy: Array, p: Array, s: Array, r2: Array) -> Array:
    return (wide(linear(dy, p)) * 2 * s[:, None] * jnp.sqrt(wide(r2))).astype(dy.dtype)


def xla_with_terms(z: Array, w: Array, dy: Array, along: Array, x: Array) -> Array:
    return (wide(linear(z, w)) + wide(dy) + along[:, None] * wide(x)).astype(z.dtype)


def kernel_with_terms(z: Array, w: Array, dy: Array, along: Array, x: Array) -> Any:
    return matmul_add(z, w, (None, dy), addend=(x, along))


def xla_value(x: Array, w: Array, s: Array, half: Array, e: Array) -> Array:
    return (wide(linear(x, w)) * s[:, None] + half[:, None] * wide(e)).astype(x.dtype)


def xla_rotated(x: Array, w: Array, s: Array, cos: Array, sin: Array) -> Array:
    y = (wide(linear(x, w)) * s[:, None]).reshape(len(x), -1, HEAD_WIDTH)
    n = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    (a, first), (b, second) = (jnp.split(half, [ROTATED], axis=-1) for half in jnp.split(n, 2, axis=-1))
    cos, sin = cos[:, None], sin[:, None]
    turned = jnp.concatenate([a * cos + b * sin, first, b * cos - a * sin, second], axis=-1)
    return turned.reshape(len(x), -1).astype(x.dtype)


def cases(a: Arrays) -> list[Case]:
    x, y, square, scale = a.x_TD, a.y_TD, a.square_DD, a.rstd_T
    along, half = -0.01 * scale, 0.5 * scale
    return [
        Case("relu(s x W^T)^2", (x, a.fc_FD, scale),
             lambda x, w, s: relu_squared(linear(x, w), s), matmul_relu_squared, (x, a.fc_FD)),
        Case("(dy P) 2 s sqrt(r2)", (y, a.proj_FD, scale, a.r2_TF), xla_slope, matmul_slope, (y, a.proj_FD)),
        Case("x + r2 P^T", (x, a.r2_TF, a.proj_DF),
             lambda x, r2, p: x + linear(r2, p), lambda x, r2, p: matmul_add(r2, p, (None, x)), (a.r2_TF, a.proj_DF)),
        Case("dz W + dy + c x", (a.dz_TF, a.fc_DF, y, along, x), xla_with_terms, kernel_with_terms, (a.dz_TF, a.fc_DF)),
        Case("d_qkv W + dx + c x", (a.d_qkv_TE, a.qkv_DE, y, along, x), xla_with_terms, kernel_with_terms,
             (a.d_qkv_TE, a.qkv_DE)),
        Case("x + y W^T and its rstd", (x, y, square), xla_sum_and_rstd,
             lambda x, y, w: matmul_add(y, w, (None, x), squares=True), (y, square)),
        Case("rotate(norm(s x W^T))", (x, square, scale, a.cos_TR, a.sin_TR), xla_rotated,
             lambda *arrays: matmul_norm_rotary(*arrays, epsilon=1e-6), (x, square)),
        Case("s x W^T + c e", (x, square, scale, half, y), xla_value,
             lambda x, w, s, half, e: matmul_add(x, w, (half, e), s), (x, square)),
        Case("mix of x and x0", (jnp.array([0.7, 0.4]), x, y), mix, None, None),
        Case("x W^T, D to F", (x, a.fc_FD), linear, None, (x, a.fc_FD)),
        Case("x W^T, F to D", (a.dz_TF, a.proj_DF), linear, None, (a.dz_TF, a.proj_DF)),
        Case("x W^T, D to D", (x, square), linear, None, (x, square)),
    ]  # fmt: skip


class Run(NamedTuple):
    """What is timed, and what is known of it."""

    name: str
    by: str
    call: Callable[[], Any]
    predicted_s: float
    flops: float
    error: float | None = None


def runs_of(case: Case) -> Iterator[Run]:
    flops = 2.0 * case.multiplied[0].size * case.multiplied[1].shape[0] if case.multiplied else 0.0
    xla = jax.jit(case.xla)
    want = jax.tree.leaves(xla(*case.arrays))[0]
    seconds = max(flops / FLOPS, (sum(a.nbytes for a in case.arrays) + want.nbytes) / BYTES)
    yield Run(case.name, "XLA", lambda: xla(*case.arrays), seconds, flops)
    if (kernel := case.kernel) is not None:
        precise = xla(*(wide(a) for a in case.arrays))
        got, truth = (wide(jax.tree.leaves(result)[0]) for result in (kernel(*case.arrays), precise))
        error = float(jnp.linalg.norm(got - truth) / jnp.linalg.norm(truth))
        yield Run(case.name, "kernel", lambda: kernel(*case.arrays), seconds, flops, error)


def runs_of_whole_mlp(tokens: int, width: int, hidden: int) -> Iterator[Run]:
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = (tokens, width), (tokens, width), (hidden, width), (width, hidden)
    x, dy, fc, proj = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    arrays = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16), 0.02 * fc, 0.01 * proj
    flops = 12.0 * tokens * width * hidden
    names: dict[str, Implementation] = {"XLA": "xla", "kernel": "hopper"}
    for by, implementation in names.items():
        call = functools.partial(whole_mlp(implementation), *arrays)
        yield Run("mlp, forward and backward", by, call, flops / FLOPS, flops)


def whole_mlp(implementation: Implementation) -> Callable[..., Any]:
    @jax.jit
    def both(x: Array, dy: Array, fc: Array, proj: Array) -> Any:
        def output(x: Array, fc: Array, proj: Array) -> Array:
            return mlp(x, rstd(x, 1e-6), fc, proj, implementation)

        y, pull = jax.vjp(output, x, fc, proj)
        return y, *pull(dy)

    return both


def measure(tokens: int, width: int, hidden: int) -> list[Row]:
    runs = [run for case in cases(random_arrays(tokens, width, hidden)) for run in runs_of(case)]
    runs += runs_of_whole_mlp(tokens, width, hidden)
    calls, rounds = (CALLS, ROUNDS) if on_gpu() else (1, 1)
    times = milliseconds({f"{run.name}|{run.by}": run.call for run in runs}, calls=calls, rounds=rounds)
    return [
        Row(run.name, run.by, 1e3 * run.predicted_s, ms, run.flops / ms / 1e9, run.error)
        for run, ms in zip(runs, times.values(), strict=True)
    ]


def parser() -> argparse.ArgumentParser:
    p = bench_parser("matmuls", __doc__)
    add_size(p, "--tokens", 65536, "T")
    add_size(p, "--width", 768, "D")
    add_size(p, "--hidden", 3072, "F")
    return p


def run(options: argparse.Namespace) -> int:
    """Return 0 if every kernel is right, else 1."""
    sizes = options.tokens, options.width, options.hidden
    for channels in (sizes[1:], sizes[:0:-1]):
        if reason := unsupported(options.tokens, *channels):
            raise UsageError(f"--tokens, --width, --hidden: the kernels need {reason}")
    with kernels_run_here():
        print(describe(T=sizes[0], D=sizes[1], F=sizes[2]))
        rows = measure(*sizes)
    table = Table({"": "<28", "by": "<7", "predicted": "9.3f", "ms": "9.3f", "TFLOP/s": "8.1f", "error": "10.2e"})
    for row in rows:
        table.add(row.name, row.by, row.predicted_ms, row.ms, row.tflops, row.error)
    write_record(options.out, "matmuls", rows, **dict(zip(("tokens", "width", "hidden"), sizes, strict=True)))
    return 0 if all(row.error is None or row.error <= LARGEST_ERROR for row in rows) else 1


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), run, arguments)
