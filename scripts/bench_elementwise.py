"""Time what stands around attention in a layer: the mix before it, the way to q, k and v, and the way back.

Forward, and forward and backward, the matrix products included, in plain JAX and by the Pallas kernels; all
interleaved, since a GPU under load lowers its clock. Every result is checked against plain JAX in float32: `error` is
the largest, over the results, of the norm of the error relative to the norm; above 2^-6 the exit status is 1. A
prediction adds up products and passes: 720 TFLOP/s for a product and 3.0 TB/s for what a pass or the kernel around a
product reads and writes, whichever takes longer; of an operation in plain JAX it is the kernels'.
Without a GPU the kernels run in Pallas' interpreter: for tests of this script, at small sizes.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from jax_speedrun.errors import UsageError
from jax_speedrun.kernels.paths import KernelPath
from jax_speedrun.kernels.qkv import project_heads
from jax_speedrun.kernels.qkv_hopper import HEAD_WIDTH, ROTATED, unsupported_shape
from jax_speedrun.kernels.residual import add_linear, inverse_rms
from jax_speedrun.model import mix
from jax_speedrun.timing import milliseconds

if __name__ == "__main__":  # before JAX starts: its interpreter needs a CPU thread for each warpgroup
    jax.config.update("jax_num_cpu_devices", 8)
INTERPRET = jax.default_backend() != "gpu"
CALLS, ROUNDS = (1, 1) if INTERPRET else (20, 5)
BYTES, FLOPS = 3.0e12, 720e12  # a second
EPSILON = float(jnp.finfo(jnp.float32).eps)
LARGEST_ERROR = 2.0**-6  # some roundings to bfloat16 in a row

type Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    by: str
    predicted_ms: float
    ms: float
    error: float


class Case(NamedTuple):
    """An operation on `arrays`, by implementation, and gradients of its results.

    `made`: of the results, what is not an argument handed back, which would be copied. `forward_s`, `backward_s`: what
    the kernels should take.
    """

    name: str
    by: dict[str, Function]
    arrays: tuple[Array, ...]
    gradients: Any
    forward_s: float
    backward_s: float
    made: Function = lambda results: results


def cases(tokens: int, width: int, heads: int) -> list[Case]:
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int, size: float = 1.0) -> Array:
        return (size * jax.random.normal(next(keys), shape)).astype(jnp.bfloat16)

    def wide(a: Array) -> Array:
        return a.astype(jnp.float32)

    channels = heads * HEAD_WIDTH
    x, x0, dx = (normal(tokens, width) for _ in range(3))
    y, embedding = (normal(tokens, channels) for _ in range(2))
    d_heads = tuple(normal(tokens, heads, HEAD_WIDTH) for _ in range(3))
    # The float32 weights hold what bfloat16 can: their rounding is no error of a kernel's.
    qkv, out = (wide(normal(*shape, size=width**-0.5)) for shape in ((3, channels, width), (width, channels)))
    lambdas = jnp.array([0.7, -0.4], jnp.float32)
    angle = 100 * wide(normal(tokens, ROTATED))
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def seconds(moved: int, multiplied: tuple[int, int] = (0, 0)) -> float:
        """Of a pass that moves bytes, and multiplies what has so many channels into what has so many."""
        return max(moved / BYTES, 2 * tokens * multiplied[0] * multiplied[1] / FLOPS)

    stream, head_bytes = x.nbytes, y.nbytes  # the residual stream; all of q, k or v
    angles = cos.nbytes + sin.nbytes
    heads_forward = 2 * seconds(stream + head_bytes + angles, (width, channels))
    heads_forward += seconds(stream + 2 * head_bytes, (width, channels))
    heads_backward = seconds(11 * head_bytes + 2 * angles)  # there with the pairs that stay
    heads_backward += seconds(3 * head_bytes + 3 * stream, (3 * channels, width))
    heads_backward += seconds(3 * head_bytes + stream, (3 * channels, width))

    def by_path(operation: Function, **options: Any) -> dict[str, Function]:
        run = functools.partial(operation, epsilon=EPSILON, interpret=INTERPRET, **options)
        return {name: functools.partial(run, implementation=name) for name in get_args(KernelPath)}

    return [
        Case("mix", {"plain": mix}, (lambdas, x, x0), dx, seconds(3 * stream), seconds(5 * stream)),
        Case("x, q, k, v", by_path(project_heads, heads=heads),
             (x, inverse_rms(x, EPSILON), qkv, embedding, lambdas, cos, sin), (dx, d_heads), heads_forward,
             heads_backward, lambda results: results[1]),
        Case("x + y W^T and its inverse rms", by_path(add_linear), (x, y, out), (dx, jnp.zeros(tokens)),
             seconds(2 * stream + head_bytes, (channels, width)),
             2 * seconds(stream + head_bytes, (channels, width))),
    ]  # fmt: skip


@jax.jit
def relative_error(got: Any, want: Any) -> Array:
    def of(a: Array, b: Array) -> Array:
        return jnp.linalg.norm(a.astype(jnp.float32) - b) / (jnp.linalg.norm(b) + 1e-30)

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(of, got, want))))


def measure(tokens: int, width: int, heads: int) -> list[Row]:
    runs: dict[str, Callable[[], Any]] = {}
    rows: list[tuple[str, str, float, float]] = []
    for case in cases(tokens, width, heads):

        def forward(function: Function, arrays: Any, _: Any, case: Case = case) -> Any:
            return case.made(function(*arrays))

        def both(function: Function, arrays: Any, gradients: Any, case: Case = case) -> Any:
            results, pull = jax.vjp(function, *arrays)
            return case.made(results), pull(gradients)

        inputs = case.arrays, case.gradients
        wide = jax.tree.map(lambda a: a.astype(jnp.float32), inputs)
        total_s = case.forward_s + case.backward_s
        for name, what, predicted_s in (
            (case.name, forward, case.forward_s),
            (f"  {case.name}, and back", both, total_s),
        ):
            want = jax.jit(functools.partial(what, case.by["plain"]))(*wide)
            for by, function in case.by.items():
                run = functools.partial(jax.jit(functools.partial(what, function)), *inputs)
                runs[f"{name}|{by}"] = run
                rows.append((name, by, 1e3 * predicted_s, float(relative_error(run(), want))))
    times = milliseconds(runs, calls=CALLS, rounds=ROUNDS)
    return [
        Row(name, by, predicted_ms, ms, error)
        for (name, by, predicted_ms, error), ms in zip(rows, times.values(), strict=True)
    ]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="bench_elementwise.py", description=__doc__)
    p.add_argument("--tokens", type=int, default=65536, metavar="T", help="default: %(default)s")
    p.add_argument("--width", type=int, default=768, metavar="D", help="default: %(default)s")
    p.add_argument("--heads", type=int, default=6, metavar="H", help=f"of {HEAD_WIDTH}; default: %(default)s")
    p.add_argument("--out", type=Path, default=Path("bench_elementwise"), metavar="DIR", help="default: %(default)s")
    options = p.parse_args(arguments)
    channels = options.heads * HEAD_WIDTH
    if reason := unsupported_shape(options.tokens, options.width, channels, HEAD_WIDTH, ROTATED):
        raise UsageError(f"--tokens, --width, --heads: the kernels need {reason}")
    return options


def run(options: argparse.Namespace) -> bool:
    """Whether every result is right."""
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, T = {options.tokens}, D = {options.width}, H = {options.heads}")
    rows = measure(options.tokens, options.width, options.heads)
    print(f"{'':42s}{'by':8s}{'predict':>8s}{'ms':>9s}{'error':>10s}")
    for row in rows:
        print(f"{row.name:42s}{row.by:8s}{row.predicted_ms:8.3f}{row.ms:9.3f}{row.error:10.2e}")
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"device": device, "jax": jax.__version__}
    record |= {name: getattr(options, name) for name in ("tokens", "width", "heads")}
    record["rows"] = [dataclasses.asdict(row) for row in rows]
    (options.out / "elementwise.json").write_text(json.dumps(record, indent=1) + "\n")
    return all(row.error <= LARGEST_ERROR for row in rows)


def main(arguments: list[str] | None = None) -> int:
    try:
        return 0 if run(parse_arguments(arguments)) else 1
    except UsageError as error:
        print(f"bench_elementwise.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
