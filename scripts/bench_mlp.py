"""Time the MLP: its two products with relu squared by kernel in several configurations, by cuBLAS and XLA; the whole.

Every product is checked against float32: the norm of the error, and the largest, relative to the norm and the largest
value; and whether the last call gave the bits of the first. A prediction takes cuBLAS's 754 TFLOP/s for a product and
3.0 TB/s for a pass over memory; a kernel is predicted as its product alone, since its pointwise part should hide.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_speedrun.errors import UsageError
from jax_speedrun.kernels.mlp import mlp, relu_squared
from jax_speedrun.kernels.mlp_hopper import Config, relu_squared_product, slope_product, unsupported_shape
from jax_speedrun.kernels.residual import inverse_rms

if __name__ == "__main__":  # before JAX starts: its interpreter needs a CPU thread for each warpgroup of a cluster
    jax.config.update("jax_num_cpu_devices", 8)
INTERPRET = jax.default_backend() != "gpu"
CALLS, LOOPS = (1, 1) if INTERPRET else (20, 5)  # a time is the median of LOOPS loops of CALLS calls
BYTES, FLOPS = 3.0e12, 754e12  # a second
CONFIGS = (Config(), Config(cluster=1), Config(columns=128, stages=6), Config(channels=32, stages=8))


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    predicted_ms: float
    ms: float
    tflops: float
    errors: tuple[float, float] | None
    repeats: bool


def milliseconds(run: Callable[[], Any]) -> tuple[float, bool]:
    """Time, and whether all results are the same to the bit."""
    first = jax.block_until_ready(run())
    times = []
    for _ in range(LOOPS):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / CALLS)
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), first, result)
    return 1e3 * float(np.median(times)), all(jax.tree.leaves(same))


def inputs(tokens: int, width: int, hidden: int) -> tuple[Array, Array, Array, Array, Array]:
    """x, scale, fc, proj, and the output's gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(key, (tokens, width), jnp.bfloat16) for key in keys[:2])
    fc = jax.random.normal(keys[2], (hidden, width)) * (0.5 / width**0.5)
    proj = jax.random.normal(keys[3], (width, hidden)) * (0.5 / hidden**0.5)
    return x, inverse_rms(x, 1e-6), fc, proj, dy


def product(a: Array, b: Array) -> Array:
    """a b^T."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())))


def times_slope(d_r2: Array, z: Array, scale: Array) -> Array:
    return jax.vjp(lambda z: relu_squared(z, scale), z)[1](d_r2)[0]


def exact(a: Array, b: Array) -> Array:
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32).T, precision="highest")


@jax.jit
def errors(got: Array, want: Array) -> tuple[Array, Array]:
    difference = got.astype(jnp.float32) - want
    return jnp.linalg.norm(difference) / jnp.linalg.norm(want), abs(difference).max() / abs(want).max()


def label(config: Config) -> str:
    return f"{config.stages} x {config.channels}, {config.columns} columns, cluster {config.cluster}"


def rows(tokens: int, width: int, hidden: int) -> list[Row]:
    result: list[Row] = []

    def add(name: str, run: Callable[[], Any], products: int, bytes_per_value: float, want: Array | None) -> None:
        """`bytes_per_value` of a (T, F) array, in passes of their own."""
        flops = 2.0 * products * tokens * width * hidden
        predicted = 1e3 * (flops / FLOPS + bytes_per_value * tokens * hidden / BYTES)
        off = None
        if want is not None:
            whole, largest = errors(run(), want)
            off = float(whole), float(largest)
        ms, repeats = milliseconds(run)
        result.append(Row(name, predicted, ms, flops / ms / 1e9, off, repeats))
        shown = f"{'':20s}" if off is None else f"{off[0]:10.2e}{off[1]:10.2e}"
        print(f"{name:52s}{predicted:8.3f}{ms:9.3f}{flops / ms / 1e9:9.1f}{shown}  {repeats}", flush=True)

    x, scale, fc, proj, dy = inputs(tokens, width, hidden)
    w, p = fc.astype(x.dtype), proj.T.astype(x.dtype)
    z_exact = exact(x, w)

    multiply = jax.jit(product)
    add("x W^T, cuBLAS", lambda: multiply(x, w), 1, 0, z_exact)
    xla_forward = jax.jit(lambda a, b, s: relu_squared(product(a, b), s))
    add("relu(s x W^T)^2, cuBLAS and a pass", lambda: xla_forward(x, w, scale), 1, 4, relu_squared(z_exact, scale))
    for config in CONFIGS:
        run = functools.partial(relu_squared_product, x, w, scale, config=config, interpret=INTERPRET)
        add(f"relu(s x W^T)^2, {label(config)}", run, 1, 0, relu_squared(z_exact, scale))

    z, r2 = multiply(x, w), xla_forward(x, w, scale)
    dz_exact = times_slope(exact(dy, p), z_exact, scale)
    xla_backward = jax.jit(lambda a, b, z, s: times_slope(product(a, b), z, s))
    add("(dy P) 2 s relu(s z), cuBLAS and a pass", lambda: xla_backward(dy, p, z, scale), 1, 6, dz_exact)
    for config in CONFIGS:
        run = functools.partial(slope_product, dy, p, scale, r2, config=config, interpret=INTERPRET)
        add(f"(dy P) 2 s sqrt(r2), {label(config)}", run, 1, 0, dz_exact)
    del z_exact, dz_exact

    for implementation, passes in (("plain", 10), ("fast", 0)):

        def forward_and_backward(implementation: Any, dy: Array, *operands: Array) -> Any:
            y, pull = jax.vjp(lambda x, s, w, p: mlp(x, s, w, p, implementation, interpret=INTERPRET), *operands)
            return y, *pull(dy)

        both = jax.jit(forward_and_backward, static_argnums=0)
        run = functools.partial(both, implementation, dy, x, scale, fc, proj)
        add(f"mlp, forward and backward, {implementation}", run, 6, passes, None)
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="default: %(default)s")
    parser.add_argument("--width", type=int, default=768, metavar="N", help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=3072, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench_mlp"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args()
    if reason := unsupported_shape(options.tokens, options.width, options.hidden):
        raise UsageError(f"--tokens, --width, --hidden: the kernels need {reason}")
    return options


def main() -> None:
    options = parse_arguments()
    sizes = options.tokens, options.width, options.hidden
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, T = {sizes[0]}, D = {sizes[1]}, F = {sizes[2]}")
    print(f"{'':52s}{'predict':>8s}{'ms':>9s}{'TFLOP/s':>9s}{'error':>10s}{'largest':>10s}  repeats")
    record: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    record |= dict(zip(("tokens", "width", "hidden"), sizes, strict=True))
    record["rows"] = [dataclasses.asdict(row) for row in rows(*sizes)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mlp.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UsageError as problem:
        print(f"bench_mlp.py: error: {problem}", file=sys.stderr)
        sys.exit(2)
