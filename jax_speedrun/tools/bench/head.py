"""Time the head with its loss and both gradients in FP8: the whole, and each of its parts alone, for all tokens.

First errors, on fewer tokens: of every implementation against float32, and against the same roundings multiplied in
bfloat16, which none in FP8 may miss by more than its last rounding: sums in the 14 bits of FP8's fast accumulation do,
at 8192 tokens (at fewer, cuBLASLt has kernels that split them up).
A prediction adds up passes. A pass takes the longest of: its bytes at 3.0 TB/s, its matmuls at the rate cuBLASLt
reached for them, its special functions (exponentials, roots, reciprocals) and its instructions, counted in the
compiled code, at an H100's rates. The whole is predicted as the sum of its parts, so without small passes.
Without a GPU the kernels run in Pallas' interpreter: for tests of this script, at small sizes.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...errors import UsageError
from ...kernels.head import HeadPrecision, head_loss, numerics, op
from ...kernels.head.hopper import unsupported
from ...kernels.head.hopper_gradient import logit_gradient
from ...kernels.head.hopper_logits import logits_and_totals
from ...kernels.implementation import Implementation
from ...sharding import compiler_options, make_mesh
from ..command import run_command
from .common import Table, add_size, bench_parser, describe, kernels_run_here, on_gpu, write_record
from .timing import milliseconds

CALLS, ROUNDS = 5, 7
LARGEST_ERROR = 4e-3  # bfloat16 rounds to 2e-3 on average; sums of 14 bits are off by 8e-3
BYTES, SPECIALS, INSTRUCTIONS = 3.0e12, 132 * 16 * 1.755e9, 132 * 128 * 1.755e9  # a second
LOGITS_FLOPS, GRADIENT_FLOPS = 1190e12, 1530e12  # dx and dW together 6.6 ms at the record's sizes
WHOLE: dict[Implementation, tuple[str, ...]] = {  # implementation: its parts
    "xla": ("logits, cuBLASLt", "middle, XLA", "dx, cuBLASLt", "dW, cuBLASLt"),
    "hopper": ("logits and totals, kernel", "gradient, kernel", "dx, cuBLASLt", "dW, cuBLASLt"),
}

type Timed = dict[str, tuple[Callable[[], Any], float]]  # name: (call, predicted seconds a token)


@dataclasses.dataclass(frozen=True)
class Row:
    """A part of the head, or all of it, over all tokens in chunks of `chunk`."""

    name: str
    chunk: int
    predicted_ms: float
    ms: float


def step_jit(function: Callable[..., Any], **options: Any) -> Any:
    """Return the function jitted as a step is."""
    return jax.jit(function, compiler_options=compiler_options(make_mesh(1, 1)), **options)


def inputs(tokens: int, vocab_size: int, width: int) -> tuple[Array, Array, Array]:
    """Return normalised x, weights that spread z by about a half, ids: others weigh little beside a token's own."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width))
    x = (x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))).astype(jnp.bfloat16)
    w = jax.random.normal(keys[1], (vocab_size, width)) * (0.5 / width**0.5)
    return x, w, jax.random.randint(keys[2], (tokens,), 0, vocab_size)


@functools.cache
def whole(precision: HeadPrecision, implementation: Implementation, chunk: int) -> Callable[..., Any]:
    def loss(x: Array, w: Array, targets: Array) -> Array:
        return head_loss(x, w, targets, precision, implementation, chunk_tokens=chunk)

    return step_jit(jax.value_and_grad(loss, argnums=(0, 1)))


def errors(tokens: int, vocab_size: int, width: int) -> dict[str, list[float]]:
    """Return the relative errors of loss, dx and dW, by implementation and truth."""
    arguments = inputs(tokens, vocab_size, width)

    def results(precision: HeadPrecision, implementation: Implementation = "xla") -> list[np.ndarray]:
        loss, (dx, dw) = whole(precision, implementation, tokens)(*arguments)
        return [np.asarray(part, np.float64) for part in (loss, dx, dw)]

    exact, emulated = results("float32"), results("fp8_emulated")
    in_fp8: dict[str, list[np.ndarray]] = {name: results("fp8", name) for name in WHOLE}
    pairs = {f"{name} to float32": (got, exact) for name, got in {"fp8_emulated": emulated, **in_fp8}.items()}
    pairs |= {f"{name} to fp8_emulated": (got, emulated) for name, got in in_fp8.items()}
    return {
        name: [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(got, want, strict=True)]
        for name, (got, want) in pairs.items()
    }


def xla_middle(z: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Do what plain JAX does between the matmuls."""
    loss, d_z = op._cross_entropy(z, targets)
    d_z = op._gradient_operand(d_z, "fp8")
    return loss, d_z, d_z.T


def xla_total(z: Array) -> Array:
    """Return the logarithm of the softmax's sum, as `logit_gradient` takes it."""
    weights = jnp.exp(numerics.CAP * jax.nn.sigmoid(z.astype(jnp.float32) / numerics.TEMPERATURE) - numerics.CAP)
    return jnp.log2(weights.sum(axis=1))


def xla_recomputed_middle(z: Array, targets: Array) -> tuple[Array, Array]:
    """Do the same, but read z again where XLA would store a float32 gate, and make the turned copy apart."""
    z, log2_total = lax.optimization_barrier((z, xla_total(z)))
    gate = jax.nn.sigmoid(z.astype(jnp.float32) / numerics.TEMPERATURE)
    p = jnp.exp(numerics.CAP * gate - (numerics.CAP + jnp.log(2.0) * log2_total)[:, None])
    d_logits = p - (jnp.arange(z.shape[1]) == targets[:, None])
    d_z = op._gradient_operand(d_logits * (numerics.CAP / numerics.TEMPERATURE) * gate * (1 - gate), "fp8")
    return d_z, lax.optimization_barrier(d_z).T


def parts(chunk: int, vocab_size: int, width: int) -> Timed:
    """Return what the head is made of, on one chunk, and what each part should take."""
    x, w, targets = inputs(chunk, vocab_size, width)
    x8, w8 = op._operand(x, "fp8", numerics.X_SCALE), op._operand(w, "fp8", numerics.W_SCALE)
    logits = step_jit(functools.partial(op._logits, precision="fp8"))
    unscale = 1 / (numerics.X_SCALE * numerics.W_SCALE)
    kernel = step_jit(functools.partial(logits_and_totals, unscale=unscale))
    step = step_jit(logit_gradient)
    gradient = step_jit(functools.partial(op._gradient_dot, precision="fp8", dtype=jnp.bfloat16))
    add = step_jit(lambda total, a, b: total + op._gradient_dot(a, b, "fp8", jnp.float32), donate_argnums=0)
    total, today, recomputed = step_jit(xla_total), step_jit(xla_middle), step_jit(xla_recomputed_middle)
    z = logits(x8, w8)
    log2_total, (_, d_z, d_z_turned) = total(z), today(z, targets)
    d_head = [jnp.zeros((vocab_size, width))]

    def accumulate() -> Array:
        d_head[0] = add(d_head[0], d_z_turned, x8)
        return d_head[0]

    def limit(items: float, specials: float = 0, instructions: float = 0, flops: float = 0) -> float:
        """Return seconds a token of a pass: bytes, special functions, instructions a logit, and its matmul's rate."""
        matmul_seconds = 2 * width / flops if flops else 0
        return vocab_size * max(items / BYTES, specials / SPECIALS, instructions / INSTRUCTIONS, matmul_seconds)

    return {
        "logits, cuBLASLt": (lambda: logits(x8, w8), limit(2, flops=LOGITS_FLOPS)),
        "logits and totals, kernel": (lambda: kernel(x8, w8), limit(2, 2, 10, LOGITS_FLOPS)),
        "totals, XLA": (lambda: total(z), limit(2, 3, 31)),
        "middle, XLA": (lambda: today(z, targets), limit(6, 3, 35) + limit(6, 2, 78)),
        "middle, XLA, recomputed": (lambda: recomputed(z, targets), limit(2, 3, 31) + limit(3, 3, 55) + limit(2)),
        "dx, cuBLASLt": (lambda: gradient(d_z, w8), limit(1, flops=GRADIENT_FLOPS)),
        "dW, cuBLASLt": (accumulate, limit(1 + 8 * width / chunk, flops=GRADIENT_FLOPS)),
        "gradient, kernel": (lambda: step(z, log2_total, targets), limit(4, 2, 18)),
    }


def parser() -> argparse.ArgumentParser:
    p = bench_parser("head", __doc__)
    add_size(p, "--tokens", 65536, "T")
    add_size(p, "--vocab-size", 50304, "V")
    add_size(p, "--width", 768, "D")
    add_size(p, "--error-tokens", 8192, "T", "tokens to compare with float32")
    p.add_argument(
        "--chunks", type=int, nargs="+", default=[4096, 8192, 16384, 32768], metavar="C", help="tokens at a time"
    )
    return p


def check(options: argparse.Namespace) -> None:
    """Raise UsageError for sizes that the kernels do not support."""
    for name in ("tokens", "error_tokens", "chunks"):
        for tokens in np.atleast_1d(getattr(options, name)):
            option = f"--{name.replace('_', '-')} {tokens}"
            if tokens <= 0 or (reason := unsupported(int(tokens), options.vocab_size, options.width)):
                raise UsageError(f"{option}: the kernels need {reason if tokens > 0 else 'at least one token'}")
            if name == "chunks" and options.tokens % tokens:
                raise UsageError(f"{option}: must divide --tokens {options.tokens}")


def measure(tokens: int, vocab_size: int, width: int, chunk: int) -> list[Row]:
    """Time all parts and both wholes over `tokens` tokens in chunks of `chunk`."""
    calls, rounds = (CALLS, ROUNDS) if on_gpu() else (1, 1)
    timed = parts(chunk, vocab_size, width)
    times = milliseconds({name: call for name, (call, _) in timed.items()}, calls=calls, rounds=rounds)
    results = {name: (seconds, times[name] * tokens / chunk) for name, (_, seconds) in timed.items()}
    del timed  # and with it the buffers
    arguments = inputs(tokens, vocab_size, width)
    wholes = {f"whole, {name}": functools.partial(whole("fp8", name, chunk), *arguments) for name in WHOLE}
    times = milliseconds(wholes, calls=calls, rounds=rounds)
    for name, of_parts in zip(wholes, WHOLE.values(), strict=True):
        results[name] = sum(results[part][0] for part in of_parts), times[name]
    return [Row(name, chunk, 1e3 * seconds * tokens, ms) for name, (seconds, ms) in results.items()]


def run(options: argparse.Namespace) -> int:
    """Return 0 if every implementation is right, else 1."""
    check(options)
    sizes = options.vocab_size, options.width
    with kernels_run_here():
        print(describe(T=options.tokens, V=sizes[0], D=sizes[1]))
        table = Table(
            {f"relative error, T = {options.error_tokens}": "<32", "loss": "9.2e", "dx": "9.2e", "dW": "9.2e"}
        )
        measured_errors, rows = errors(options.error_tokens, *sizes), list[Row]()
        for name, values in measured_errors.items():
            table.add(name, *values)
        table = Table({"part": "<32", "chunk": "6d", "predicted ms": "12.2f", "ms": "10.3f"})
        for chunk in options.chunks:
            for row in measure(options.tokens, *sizes, chunk):
                rows.append(row)
                table.add(row.name, row.chunk, row.predicted_ms, row.ms)
    facts = {"tokens": options.tokens, "vocab_size": sizes[0], "width": sizes[1]}
    write_record(options.out, "head", rows, **facts, errors=measured_errors)
    to_emulated = [values for name, values in measured_errors.items() if name.endswith("to fp8_emulated")]
    return 0 if all(error <= LARGEST_ERROR for values in to_emulated for error in values) else 1


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), run, arguments)
