"""Time the head with its loss and both gradients in FP8: the whole, and each of its parts alone, for all tokens.

First errors, on fewer tokens: of every path against float32, and against the same roundings multiplied in bfloat16,
which no FP8 path may miss by more than its last rounding: sums in the 14 bits of FP8's fast accumulation do, at
8192 tokens (at fewer, cuBLASLt has kernels that split them up).
A prediction adds up passes. A pass takes the longest of: its bytes at 3.0 TB/s, its products at the rate cuBLASLt
reached for them, its special functions (exponentials, roots, reciprocals) and its instructions, counted in the
compiled code, at an H100's rates. The whole is predicted as the sum of its parts, so without small passes.
Without a GPU the kernels run in Pallas' interpreter: for tests of this script, at small sizes.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_speedrun.errors import UsageError
from jax_speedrun.kernels.head import op as head
from jax_speedrun.kernels.head.hopper import unsupported
from jax_speedrun.kernels.head.hopper_gradient import logit_gradient
from jax_speedrun.kernels.head.hopper_logits import logits_and_totals
from jax_speedrun.kernels.implementation import Implementation
from jax_speedrun.sharding import compiler_options, make_mesh
from jax_speedrun.tools.timing import milliseconds

INTERPRET = jax.default_backend() != "gpu"
CALLS, ROUNDS = (1, 1) if INTERPRET else (5, 7)
LARGEST_ERROR = 4e-3  # bfloat16 rounds to 2e-3 on average; sums of 14 bits are off by 8e-3
BYTES, SPECIALS, INSTRUCTIONS = 3.0e12, 132 * 16 * 1.755e9, 132 * 128 * 1.755e9  # a second
LOGITS_FLOPS, GRADIENT_FLOPS = 1190e12, 1530e12  # dx and dW together 6.6 ms at the record's sizes
WHOLE: dict[Implementation, tuple[str, ...]] = {  # path: its parts
    "plain": ("logits, cuBLASLt", "middle, XLA", "dx, cuBLASLt", "dW, cuBLASLt"),
    "fast": ("logits and totals, kernel", "gradient, kernel", "dx, cuBLASLt", "dW, cuBLASLt"),
}

jit = functools.partial(jax.jit, compiler_options=compiler_options(make_mesh(1, 1)))  # as in a step

type Timed = dict[str, tuple[Callable[[], Any], float]]  # name: (call, predicted seconds a token)


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    chunk: int
    predicted_ms: float
    ms: float


def inputs(tokens: int, vocab_size: int, width: int) -> tuple[Array, Array, Array]:
    """Normalised x, weights that spread z by about a half, ids: other words weigh little beside a token's own."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width))
    x = (x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))).astype(jnp.bfloat16)
    w = jax.random.normal(keys[1], (vocab_size, width)) * (0.5 / width**0.5)
    return x, w, jax.random.randint(keys[2], (tokens,), 0, vocab_size)


@functools.cache
def whole(precision: head.HeadPrecision, implementation: Implementation, chunk: int) -> Callable[..., Any]:
    interpret = INTERPRET and implementation == "fast"

    def loss(x: Array, w: Array, targets: Array) -> Array:
        return head.head_loss(x, w, targets, precision, implementation, chunk_tokens=chunk, interpret=interpret)

    return jit(jax.value_and_grad(loss, argnums=(0, 1)))


def errors(tokens: int, vocab_size: int, width: int) -> dict[str, list[float]]:
    """Relative error of loss, dx and dW, by path and truth."""
    arguments = inputs(tokens, vocab_size, width)

    def results(precision: head.HeadPrecision, implementation: Implementation = "plain") -> list[np.ndarray]:
        loss, (dx, dw) = whole(precision, implementation, tokens)(*arguments)
        return [np.asarray(part, np.float64) for part in (loss, dx, dw)]

    exact, emulated = results("float32"), results("fp8_emulated")
    paths = {"plain": results("fp8"), "fast": results("fp8", "fast")}
    pairs = {f"{name} to float32": (got, exact) for name, got in {"fp8_emulated": emulated, **paths}.items()}
    pairs |= {f"{name} to fp8_emulated": (got, emulated) for name, got in paths.items()}
    return {
        name: [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(got, want, strict=True)]
        for name, (got, want) in pairs.items()
    }


def xla_middle(z: Array, targets: Array) -> tuple[Array, Array, Array]:
    """What the plain path does between the products."""
    loss, d_z = head._cross_entropy(z, targets)
    d_z = head._gradient_operand(d_z, "fp8")
    return loss, d_z, d_z.T


def xla_total(z: Array) -> Array:
    weights = jnp.exp(head.CAP * jax.nn.sigmoid(z.astype(jnp.float32) / head.TEMPERATURE) - head.CAP)
    return jnp.log2(weights.sum(axis=1))


def xla_recomputed_middle(z: Array, targets: Array) -> tuple[Array, Array]:
    """The same, but z is read again where XLA would store a float32 gate, and the turned copy is made apart."""
    z, log2_total = lax.optimization_barrier((z, xla_total(z)))
    gate = jax.nn.sigmoid(z.astype(jnp.float32) / head.TEMPERATURE)
    p = jnp.exp(head.CAP * gate - (head.CAP + jnp.log(2.0) * log2_total)[:, None])
    d_logits = p - (jnp.arange(z.shape[1]) == targets[:, None])
    d_z = head._gradient_operand(d_logits * (head.CAP / head.TEMPERATURE) * gate * (1 - gate), "fp8")
    return d_z, lax.optimization_barrier(d_z).T


def parts(chunk: int, vocab_size: int, width: int) -> Timed:
    x, w, targets = inputs(chunk, vocab_size, width)
    x8, w8 = head._operand(x, "fp8", head.X_SCALE), head._operand(w, "fp8", head.W_SCALE)
    product = jit(functools.partial(head._logits, precision="fp8"))
    unscale = 1 / (head.X_SCALE * head.W_SCALE)
    kernel = jit(functools.partial(logits_and_totals, unscale=unscale, interpret=INTERPRET))
    step = jit(functools.partial(logit_gradient, interpret=INTERPRET))
    gradient = jit(functools.partial(head._gradient_dot, precision="fp8", dtype=jnp.bfloat16))
    add = jit(lambda total, a, b: total + head._gradient_dot(a, b, "fp8", jnp.float32), donate_argnums=0)
    total, today, recomputed = jit(xla_total), jit(xla_middle), jit(xla_recomputed_middle)
    z = product(x8, w8)
    log2_total, (_, d_z, d_z_turned) = total(z), today(z, targets)
    d_head = [jnp.zeros((vocab_size, width))]

    def accumulate() -> Array:
        d_head[0] = add(d_head[0], d_z_turned, x8)
        return d_head[0]

    def limit(items: float, specials: float = 0, instructions: float = 0, flops: float = 0) -> float:
        """Of a pass: bytes, special functions and instructions for each logit, and the rate of its product."""
        product_seconds = 2 * width / flops if flops else 0
        return vocab_size * max(items / BYTES, specials / SPECIALS, instructions / INSTRUCTIONS, product_seconds)

    return {
        "logits, cuBLASLt": (lambda: product(x8, w8), limit(2, flops=LOGITS_FLOPS)),
        "logits and totals, kernel": (lambda: kernel(x8, w8), limit(2, 2, 10, LOGITS_FLOPS)),
        "totals, XLA": (lambda: total(z), limit(2, 3, 31)),
        "middle, XLA": (lambda: today(z, targets), limit(6, 3, 35) + limit(6, 2, 78)),
        "middle, XLA, recomputed": (lambda: recomputed(z, targets), limit(2, 3, 31) + limit(3, 3, 55) + limit(2)),
        "dx, cuBLASLt": (lambda: gradient(d_z, w8), limit(1, flops=GRADIENT_FLOPS)),
        "dW, cuBLASLt": (accumulate, limit(1 + 8 * width / chunk, flops=GRADIENT_FLOPS)),
        "gradient, kernel": (lambda: step(z, log2_total, targets), limit(4, 2, 18)),
    }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_head.py", description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536, metavar="T", help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=50304, metavar="V", help="default: %(default)s")
    parser.add_argument("--width", type=int, default=768, metavar="D", help="default: %(default)s")
    parser.add_argument("--error-tokens", type=int, default=8192, metavar="T", help="default: %(default)s")
    parser.add_argument("--chunks", type=int, nargs="+", default=[4096, 8192, 16384, 32768], metavar="C")
    parser.add_argument("--out", type=Path, default=Path("bench_head"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name in ("tokens", "error_tokens", "chunks"):
        for tokens in np.atleast_1d(getattr(options, name)):
            option = f"--{name.replace('_', '-')} {tokens}"
            if tokens <= 0 or (reason := unsupported(int(tokens), options.vocab_size, options.width)):
                raise UsageError(f"{option}: the kernels need {reason if tokens > 0 else 'at least one token'}")
            if name == "chunks" and options.tokens % tokens:
                raise UsageError(f"{option}: must divide --tokens {options.tokens}")
    return options


def main(arguments: list[str] | None = None) -> int:
    try:
        return 0 if run(parse_arguments(arguments)) else 1
    except UsageError as error:
        print(f"bench_head.py: error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> bool:
    """Whether every path is right."""
    sizes = options.vocab_size, options.width
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, T = {options.tokens}, V = {sizes[0]}, D = {sizes[1]}"
    )
    print(f"relative errors at T = {options.error_tokens:6d}            loss        dx        dW")
    measured_errors, rows = errors(options.error_tokens, *sizes), []
    for name, values in measured_errors.items():
        print(f"{name:40s}" + "".join(f"{value:10.2e}" for value in values))
    print(f"{'':32s}  chunk predicted ms     ms")
    arguments = inputs(options.tokens, *sizes)
    for chunk in options.chunks:
        timed = parts(chunk, *sizes)
        times = milliseconds({name: run for name, (run, _) in timed.items()}, calls=CALLS, rounds=ROUNDS)
        results = {name: (seconds, times[name] * options.tokens / chunk) for name, (_, seconds) in timed.items()}
        del timed  # and with it the buffers
        wholes = {f"whole, {path}": functools.partial(whole("fp8", path, chunk), *arguments) for path in WHOLE}
        times = milliseconds(wholes, calls=CALLS, rounds=ROUNDS)
        for name, of_parts in zip(wholes, WHOLE.values(), strict=True):
            results[name] = sum(results[part][0] for part in of_parts), times[name]
        for name, (seconds, ms) in results.items():
            rows.append(Row(name, chunk, 1e3 * seconds * options.tokens, ms))
            print(f"{name:32s} {chunk:6d} {rows[-1].predicted_ms:12.2f} {ms:10.3f}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "tokens": options.tokens}
    record |= {"vocabulary": sizes[0], "width": sizes[1], "errors": measured_errors}
    record["rows"] = [dataclasses.asdict(row) for row in rows]
    (options.out / "head.json").write_text(json.dumps(record, indent=1) + "\n")
    to_emulated = [values for name, values in measured_errors.items() if name.endswith("to fp8_emulated")]
    return all(error <= LARGEST_ERROR for values in to_emulated for error in values)


if __name__ == "__main__":
    sys.exit(main())
