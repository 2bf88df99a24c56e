"""Time what lies between a layer's matrix products: norms, rotary angles, value mixing, residual sums, relu squared.

For each pass forward and backward: the textbook form (norm, then product) beside the one that applies the norm's scale
after the product, and plain JAX beside the Pallas kernels. `MB` counts every operand and result once, which is the
least that a pass can move; `of copy` is the rate this makes as a share of a large copy's 3.0 TB/s on an H100. Errors
are against the same pass in float32, as a share of what rounding to bfloat16 may change; above 1 the exit status is 1.
Without a GPU the kernels run in Pallas' interpreter: for tests of this script, at small sizes.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_speedrun.errors import UsageError
from jax_speedrun.kernels.mlp import relu_squared
from jax_speedrun.kernels.paths import KernelPath
from jax_speedrun.kernels.qkv import qkv_to_heads
from jax_speedrun.kernels.qkv_hopper import unsupported_shape
from jax_speedrun.kernels.residual import inverse_rms

INTERPRET = jax.default_backend() != "gpu"
CALLS, LOOPS = (1, 1) if INTERPRET else (20, 7)  # a time is the median of LOOPS loops of CALLS calls
COPY_RATE = 3.0e12  # bytes a second, reads and writes together
EPSILON = float(jnp.finfo(jnp.float32).eps)
ROUNDING = 2 * 2.0**-8  # sums of gradients are rounded more than once

type Function = Callable[..., Any]
type Inputs = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    ms: float
    megabytes: float
    of_copy: float
    error_of_bound: float


def norm(x_TD: Array) -> Array:
    return (x_TD.astype(jnp.float32) * inverse_rms(x_TD, EPSILON)[:, None]).astype(x_TD.dtype)


def mix(weights: Array, *values: Array) -> Array:
    total = sum(weight * value.astype(jnp.float32) for weight, value in zip(weights, values, strict=True))
    return jnp.asarray(total).astype(values[0].dtype)


def backward(function: Function, count: int, constants: int = 0) -> Function:
    """Of `count` arguments, constants, and the results' gradients: the gradients of the arguments."""

    def run(*values: Any) -> Any:
        arguments, fixed, gradients = values[:count], values[count : count + constants], values[count + constants :]
        results, pull = jax.vjp(lambda *a: function(*a, *fixed), *arguments)
        return pull(gradients if isinstance(results, tuple) else gradients[0])

    return run


def passes(tokens: int, width: int, head_width: int) -> dict[str, tuple[Function, Function, Inputs]]:
    """Name: the pass, what it should equal, and its inputs."""
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> Array:
        return jax.random.normal(next(keys), shape, dtype)

    found: dict[str, tuple[Function, Function, Inputs]] = {}

    def add(name: str, function: Function, *inputs: Any, reference: Function | None = None) -> None:
        found[name] = function, reference or function, inputs

    def sum_and_norm(a: Array, b: Array) -> tuple[Array, Array]:
        return a + b, norm(a + b)

    def sum_and_scale(a: Array, b: Array) -> tuple[Array, Array]:
        return a + b, inverse_rms(a + b, EPSILON)

    def square(a: Array) -> Array:
        return jax.nn.relu(a) * jax.nn.relu(a)

    x, y, dx, dy = (normal(tokens, width) for _ in range(4))
    scale, d_scale, weights = (normal(n, dtype=jnp.float32) for n in (tokens, tokens, 3))
    scale = jnp.abs(scale) + 0.5
    add("sum and norm: textbook", sum_and_norm, x, y)
    add("sum and norm: scale only", sum_and_scale, x, y)
    add("  sum and norm backward: textbook", backward(lambda a: (a, norm(a)), 1), x, dx, dy)
    add(
        "  sum and norm backward: scale only",
        backward(lambda a: (a, a, inverse_rms(a, EPSILON)), 1),
        x,
        dx,
        dy,
        d_scale,
    )
    add("mix", mix, weights, x, y, dy)
    add("  mix backward", backward(mix, 4), weights, x, y, dy, dx)
    z, dz = normal(tokens, 4 * width), normal(tokens, 4 * width)
    add("relu squared: textbook", square, z)
    add("relu squared: scale", relu_squared, z, scale)
    add("  relu squared backward: textbook", backward(square, 1), z, dz)
    add("  relu squared backward: scale", backward(relu_squared, 2), z, scale, dz)

    def heads_by(implementation: KernelPath) -> Function:
        sizes = functools.partial(qkv_to_heads, heads=width // head_width, epsilon=EPSILON)
        return functools.partial(sizes, implementation=implementation, interpret=INTERPRET)

    qkv, embedding = normal(tokens, 3 * width), normal(tokens, width)
    angle = 100 * normal(tokens, head_width // 2, dtype=jnp.float32)
    cos_sin = jnp.cos(angle), jnp.sin(angle)
    gradients = [normal(tokens, width // head_width, head_width) for _ in range(3)]
    plain = heads_by("plain")
    for mixed, values in (("heads", None), ("heads, mixed values", embedding)):
        inputs = (qkv, scale, values, weights[:2], *cos_sin)
        for name in get_args(KernelPath):
            run = heads_by(name)
            add(f"{mixed}: {name}", run, *inputs, reference=plain)
            add(
                f"  {mixed} backward: {name}", backward(run, 4, 2), *inputs, *gradients, reference=backward(plain, 4, 2)
            )
    return found


def milliseconds(run: Callable[[], Any]) -> float:
    for _ in range(2):
        jax.block_until_ready(run())
    times = []
    for _ in range(LOOPS):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / CALLS)
    return 1e3 * float(np.median(times))


@jax.jit
def error_of_bound(got: Any, want: Any) -> Array:
    """Largest error as a share of what two roundings change, of the value and of the array's largest."""

    def share(a: Array, b: Array) -> Array:
        size = jnp.abs(b) + jnp.max(jnp.abs(b))
        return jnp.max(jnp.abs(a.astype(jnp.float32) - b) / (ROUNDING * size + 1e-30))

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(share, got, want))))


def measure(name: str, function: Function, reference: Function, inputs: Inputs) -> Row:
    compiled = jax.jit(function).lower(*inputs).compile()
    results = compiled(*inputs)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), inputs)
    error = float(error_of_bound(results, jax.jit(reference)(*wide)))
    megabytes = sum(a.nbytes for a in jax.tree.leaves((inputs, results))) / 1e6
    del results, wide
    ms = milliseconds(lambda: compiled(*inputs))
    return Row(name, ms, megabytes, megabytes * 1e9 / COPY_RATE / ms, error)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench_elementwise.py", description=__doc__)
    p.add_argument("--tokens", type=int, default=65536, metavar="T", help="default: %(default)s")
    p.add_argument("--width", type=int, default=768, metavar="D", help="default: %(default)s")
    p.add_argument("--head-width", type=int, default=128, metavar="K", help="default: %(default)s")
    p.add_argument("--out", type=Path, default=Path("bench_elementwise"), metavar="DIR", help="default: %(default)s")
    options = p.parse_args(arguments)
    if options.tokens <= 0 or (reason := unsupported_shape(options.tokens, options.head_width)):
        raise UsageError(f"the kernels need {reason if options.tokens > 0 else 'at least one token'}")
    if options.width <= 0 or options.width % options.head_width:
        raise UsageError(f"--width {options.width}: must be a multiple of --head-width {options.head_width}")
    return options


def run(options: argparse.Namespace) -> bool:
    """Whether every pass is right."""
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, T = {options.tokens}, D = {options.width}, K = {options.head_width}")
    print(f"{'':40s}      ms      MB  of copy  error/bound")
    rows = []
    for name, (function, reference, inputs) in passes(options.tokens, options.width, options.head_width).items():
        rows.append(row := measure(name, function, reference, inputs))
        print(
            f"{name:40s}{row.ms:8.3f}{row.megabytes:8.1f}{row.of_copy:9.2f}{row.error_of_bound:13.3f}", flush=True
        )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"device": device, "jax": jax.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
    record |= {"tokens": options.tokens, "width": options.width, "head_width": options.head_width}
    (options.out / "elementwise.json").write_text(json.dumps(record, indent=1) + "\n")
    return all(row.error_of_bound <= 1 for row in rows)


def main(arguments: list[str] | None = None) -> int:
    try:
        return 0 if run(parse_arguments(arguments)) else 1
    except UsageError as error:
        print(f"bench_elementwise.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
