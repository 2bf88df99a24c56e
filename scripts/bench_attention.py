"""Time block-sparse attention, forward and backward apart, beside its peers on the same tokens of real text.

For every window the long mask (all of it) and the short one (half of it). Rates count 2 products of visible
pairs forward and 5 backward, whatever a peer really computes. Errors are the largest against float32.

Peers: hopper (ours), xla (ours, plain JAX), cudnn (through jax.nn; its window is in tokens and it knows no documents:
another, larger mask, hence no errors), flex (PyTorch FlexAttention, compiled, with our block lists).
"""

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array

from jax_speedrun.data.batches import TINY_DATA, first_tokens
from jax_speedrun.errors import UsageError
from jax_speedrun.kernels.attention import hopper as attention_hopper
from jax_speedrun.kernels.attention.op import Implementation, block_sparse_attention, resolve_implementation
from jax_speedrun.kernels.attention.schedule import Schedule, build_schedule
from jax_speedrun.kernels.block_mask import BLOCK_SIZE, BlockMask, long_short_masks, visible_pairs
from jax_speedrun.tools.timing import milliseconds

PEERS = ("hopper", "xla", "cudnn", "flex")
SCALE = 0.12
LONG_LAYERS, SHORT_LAYERS = 3, 8  # of the record's twelve layers, one has no attention
CALLS, ROUNDS = 10, 7


@dataclasses.dataclass(frozen=True)
class Case:
    """One mask to run: `kind` of the window `window`, `blocks` blocks wide, with so many visible `pairs`."""

    window: int
    kind: str
    blocks: int
    pairs: int
    mask: BlockMask
    inputs: tuple[Array, Array, Array, Array]  # q, k, v and the output's gradient, (T, H, K)


@dataclasses.dataclass(frozen=True)
class Row:
    window: int
    kind: str
    peer: str
    direction: str
    ms: float
    tflops: float
    share_of_ceiling: float
    largest_errors: tuple[float, ...] | None  # of o, or of dq, dk, dv
    relative_errors: tuple[float, ...] | None  # the same, Frobenius norms


type Runs = tuple[Callable[[], Any], Callable[[], Any]]
type Peer = Callable[[Case], Runs]


def jax_peer(attend: Callable[..., Array]) -> Peer:
    """`attend(q, k, v, mask, blocks)`, its forward and its backward; `blocks` is static, for peers that must know."""
    forward = jax.jit(attend, static_argnums=4)

    @jax.jit
    def backward(pull: Callable[[Array], Any], d_output: Array) -> Any:
        return pull(d_output)

    def save(q: Array, k: Array, v: Array, mask: Any, blocks: int) -> Any:
        return jax.vjp(lambda q, k, v: attend(q, k, v, mask, blocks), q, k, v)[1]

    saved = jax.jit(save, static_argnums=4)

    def runs(case: Case) -> Runs:
        q, k, v, d_output = case.inputs
        # Peers that read lists get one number for all windows, and so compile once.
        blocks = case.blocks if attend is cudnn else 0
        # A step builds its masks once for all layers, so nobody's time includes that.
        mask = (case.mask.documents, build_schedule(case.mask)) if attend is hopper else case.mask
        pull = saved(q, k, v, mask, blocks)
        return lambda: forward(q, k, v, mask, blocks), lambda: backward(pull, d_output)

    return runs


def hopper(q: Array, k: Array, v: Array, mask: tuple[Array, Schedule], blocks: int) -> Array:
    del blocks
    return attention_hopper.attend(SCALE, False, q, k, v, *mask)


def ours(implementation: Implementation) -> Callable[..., Array]:
    def attend(q: Array, k: Array, v: Array, mask: BlockMask, blocks: int) -> Array:
        del blocks
        return block_sparse_attention(q, k, v, mask, scale=SCALE, implementation=implementation)

    return attend


def cudnn(q: Array, k: Array, v: Array, mask: BlockMask, blocks: int) -> Array:
    del mask
    window = (blocks * BLOCK_SIZE - 1, 0)
    return jax.nn.dot_product_attention(
        q[None], k[None], v[None], scale=SCALE, is_causal=True, local_window_size=window, implementation="cudnn"
    )[0]


def flex_peer(torch: ModuleType, documents_T: Array) -> Peer:
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    attend = torch.compile(flex.flex_attention, dynamic=False)
    documents = torch.from_dlpack(documents_T)

    # One rule for all masks: a new function would be compiled anew.
    def element_rule(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (documents[query] == documents[key])

    def runs(case: Case) -> Runs:
        m = case.mask
        lists = [
            torch.from_dlpack(x)[None, None]
            for x in (m.partial_counts, m.partial_indices, m.full_counts, m.full_indices)
        ]
        mask = flex.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK_SIZE, mask_mod=element_rule)
        # (T, H, K) in memory, as the record's model has it, seen as (1, H, T, K).
        q, k, v, d_output = (torch.from_dlpack(x).transpose(0, 1)[None] for x in case.inputs)
        needs = [x.detach().requires_grad_() for x in (q, k, v)]
        output = attend(*needs, block_mask=mask, scale=SCALE)

        def forward() -> Any:
            with torch.no_grad():
                return attend(q, k, v, block_mask=mask, scale=SCALE)

        return forward, lambda: torch.autograd.grad(output, needs, d_output, retain_graph=True)

    return runs


def to_numpy(result: Any) -> list[np.ndarray]:
    """Outputs as float32 (T, H, K), of either library."""
    parts = result if isinstance(result, tuple | list) else (result,)
    if isinstance(parts[0], Array):
        return [np.asarray(x, np.float32) for x in parts]
    return [x[0].transpose(0, 1).float().cpu().numpy() for x in parts]


@jax.jit
def float32_truth(inputs: tuple[Array, ...], documents_T: Array, blocks: Array) -> tuple[Array, ...]:
    """o, dq, dk, dv in float32, one block of queries at a time against all keys: no lists, only the rule itself."""
    q, k, v, d_output = (x.astype(jnp.float32) for x in inputs)
    position = jnp.arange(len(documents_T))

    def attention(q: Array, k: Array, v: Array) -> Array:
        @jax.checkpoint
        def block(i: Array) -> Array:
            at = i * BLOCK_SIZE + jnp.arange(BLOCK_SIZE)
            near = i - position // BLOCK_SIZE < jnp.maximum(blocks, 1)
            visible = (at[:, None] >= position) & near & (documents_T[at][:, None] == documents_T)
            scores = SCALE * jnp.einsum("qhk,thk->hqt", q[at], k, precision="highest")
            weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
            return jnp.einsum("hqt,thk->qhk", weights, v, precision="highest")

        return jax.lax.map(block, jnp.arange(len(q) // BLOCK_SIZE)).reshape(q.shape)

    output, pull = jax.vjp(attention, q, k, v)
    return output, *pull(d_output)


def measure(case: Case, peer: str, draws: list[Runs], truths: list[list[np.ndarray]], ceiling: float) -> Iterator[Row]:
    """Times of the first draw, errors of all that have a truth."""
    _, heads, width = case.inputs[0].shape
    wait: Callable[[Any], Any] = jax.block_until_ready
    if peer == "flex":
        synchronize = importlib.import_module("torch").cuda.synchronize

        def wait(result: Any) -> Any:
            return synchronize()

    for direction, runs, products, wanted in zip(
        ("forward", "backward"), zip(*draws, strict=True), (2, 5), (slice(0, 1), slice(1, 4)), strict=True
    ):
        ms = milliseconds({direction: runs[0]}, calls=CALLS, rounds=ROUNDS, wait=wait)[direction]
        tflops = products * 2 * width * heads * case.pairs / ms / 1e9
        largest = relative = None
        if truths and peer != "cudnn":
            errors = [
                [largest_and_relative(got, want) for got, want in zip(to_numpy(run()), truth[wanted], strict=True)]
                for run, truth in zip(runs, truths, strict=True)
            ]
            largest, relative = (tuple(np.max(errors, axis=0)[:, i].tolist()) for i in range(2))
        yield Row(case.window, case.kind, peer, direction, ms, tflops, tflops / ceiling, largest, relative)


def largest_and_relative(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    error = got - want
    return float(np.abs(error).max()), float(np.linalg.norm(error) / np.linalg.norm(want))


def matmul_ceiling() -> float:
    """TFLOP/s of a large bf16 product on random data, this device, this run."""
    size = 8192 if jax.default_backend() == "gpu" else 512
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    ms = milliseconds({"product": lambda: product(a, b)}, calls=CALLS, rounds=ROUNDS)["product"]
    return 2 * size**3 / ms / 1e9


def layer_mix(rows: list[Row], window: int) -> str:
    """Forward and backward of the record's layers, each peer's, as one line."""
    layers = {"long": LONG_LAYERS, "short": SHORT_LAYERS}
    total = {
        peer: sum(layers[row.kind] * row.ms for row in rows if row.peer == peer and row.window == window)
        for peer in dict.fromkeys(row.peer for row in rows)
    }
    parts = [f"{peer} {ms:.2f} ms" for peer, ms in total.items()]
    if "hopper" in total and "flex" in total:
        parts.append(f"hopper / flex {total['hopper'] / total['flex']:.3f}")
    return f"layer mix at window {window} ({LONG_LAYERS} long + {SHORT_LAYERS} short): " + ", ".join(parts)


def draw(rows: list[Row], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharex=True)
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        for peer in dict.fromkeys(row.peer for row in rows):
            line = [r for r in rows if (r.peer, r.direction, r.kind) == (peer, direction, "long")]
            axis.plot([r.window for r in line], [r.ms for r in line], "o-", label=peer)
        axis.set(title=f"{direction}, long mask", xlabel="window (blocks of 128)", ylabel="ms a layer", yscale="log")
        axis.grid(which="both", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_attention.py", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=TINY_DATA, metavar="DIR", help="shards (default: the text in the package)"
    )
    parser.add_argument("--length", type=int, default=65536, metavar="T", help="tokens (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=6, metavar="H", help="default: %(default)s")
    parser.add_argument("--head-width", type=int, default=128, metavar="K", help="default: %(default)s")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 7, 10, 14], metavar="W", help="in blocks")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--no-errors", action="store_true", help="skip the comparison with float32")
    parser.add_argument("--draws", type=int, default=1, metavar="N", help="inputs to compare (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench_attention"), metavar="DIR", help="default: %(default)s")
    return parser.parse_args()


def random_inputs(shape: tuple[int, int, int], seed: int) -> tuple[Array, Array, Array, Array]:
    q, k, v, d_output = (
        jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(seed), 4)
    )
    return q, k, v, d_output


def make_peers(names: list[str], documents_T: Array, head_width: int) -> dict[str, Peer]:
    if set(names) - {"xla"} and jax.default_backend() != "gpu":
        raise UsageError("--peers: only xla runs without a GPU")
    if "hopper" in names:
        try:
            resolve_implementation("hopper", head_width=head_width, dtype=jnp.bfloat16)
        except ValueError as error:
            raise UsageError(f"--peers hopper: {error}") from error
    attends: dict[str, Callable[..., Array]] = {"cudnn": cudnn, "hopper": hopper, "xla": ours("xla")}
    peers: dict[str, Peer] = {}
    for name in names:
        if name == "flex":
            try:
                peers[name] = flex_peer(importlib.import_module("torch"), documents_T)
            except ImportError:
                print("flex: PyTorch is not installed, left out (pip install torch)", file=sys.stderr)
        else:
            peers[name] = jax_peer(attends[name])
    return peers


def main() -> None:
    options = parse_arguments()
    for name, smallest in (("--windows", min(options.windows)), ("--draws", options.draws)):
        if smallest < 1:
            raise UsageError(f"{name}: must be at least 1")
    if options.length <= 0 or options.length % BLOCK_SIZE:
        raise UsageError(f"--length {options.length}: must be a positive multiple of {BLOCK_SIZE}")
    tokens = jnp.asarray(first_tokens(options.data, options.length))
    shape = (options.length, options.heads, options.head_width)
    draws = [random_inputs(shape, seed) for seed in range(options.draws)]
    documents_T = long_short_masks(tokens, 1)[0].documents
    peers, ceiling, rows = make_peers(options.peers, documents_T, options.head_width), matmul_ceiling(), []
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, T = {shape[0]}, H = {shape[1]}, K = {shape[2]}, "
          f"bf16 matmul {ceiling:.0f} TFLOP/s")  # fmt: skip
    print("window  mask   peer    direction        ms  TFLOP/s  of ceiling  error, largest/relative")
    for window in sorted(options.windows):
        masks, counts = jax.jit(long_short_masks)(tokens, window), visible_pairs(tokens, window)
        for kind, mask, pairs in zip(("long", "short"), masks, counts, strict=True):
            blocks = window if kind == "long" else max(window // 2, 1)
            cases = [Case(window, kind, blocks, pairs, mask, inputs) for inputs in draws]
            truths: list[list[np.ndarray]] = []
            if not options.no_errors:
                truths = [
                    [np.asarray(x) for x in float32_truth(case.inputs, mask.documents, jnp.int32(blocks))]
                    for case in cases
                ]
            for name, peer in peers.items():
                for row in measure(cases[0], name, list(map(peer, cases)), truths, ceiling):
                    rows.append(row)
                    errors = "  ".join(
                        f"{largest:.1e}/{relative:.2e}"
                        for largest, relative in zip(row.largest_errors or (), row.relative_errors or (), strict=True)
                    )
                    print(f"{row.window:6d}  {row.kind:5s}  {row.peer:6s}  {row.direction:9s} {row.ms:9.3f} "
                          f"{row.tflops:8.1f} {row.share_of_ceiling:11.1%}  {errors}", flush=True)  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "shape": shape,
        "ceiling_tflops": ceiling,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (options.out / "attention.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, options.out / "attention.png")
    if "cudnn" in peers:
        print("cudnn: window in tokens and no documents, so another mask: not the same work, and not the bar")
    print(layer_mix(rows, max(options.windows)))


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"bench_attention.py: error: {error}", file=sys.stderr)
        sys.exit(2)
