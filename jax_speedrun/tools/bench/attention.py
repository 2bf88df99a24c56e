"""Time block-sparse attention, forward and backward apart, beside its peers on the same tokens of real text.

For every window the long mask (all of it) and the short one (half of it). Rates count 2 matmuls of visible pairs
forward and 5 backward, whatever a peer really computes. Errors are against float32, of the worst array.

Peers: hopper (ours), xla (ours, plain JAX), cudnn (through jax.nn; its window is in tokens and it knows no documents:
another, larger mask, hence no errors), flex (PyTorch FlexAttention, compiled, with our block lists).
"""

import argparse
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from ...data.batches import TINY_DATA, first_tokens
from ...errors import UsageError
from ...kernels.attention import block_sparse_attention
from ...kernels.attention import hopper as attention_hopper
from ...kernels.attention.op import unsupported
from ...kernels.attention.schedule import Schedule, build_schedule
from ...kernels.block_mask import BLOCK_SIZE, BlockMask, long_short_masks, visible_pairs
from ...kernels.implementation import choose
from ..command import run_command
from ..layout import wrap
from .common import Table, add_size, bench_parser, describe, on_gpu, write_record
from .timing import milliseconds

PEERS = ("hopper", "xla", "cudnn", "flex")
SCALE = 0.12
LONG_LAYERS, SHORT_LAYERS = 3, 8  # of the record's twelve layers, one has no attention
CALLS, ROUNDS = 10, 7


@dataclasses.dataclass(frozen=True)
class Case:
    """One mask to run: `kind` of a long window of `window` tokens, `blocks` blocks wide, with `pairs` visible pairs."""

    window: int
    kind: str
    blocks: int
    pairs: int
    mask: BlockMask
    inputs: tuple[Array, Array, Array, Array]  # q, k, v and the output's gradient, (T, H, K)


@dataclasses.dataclass(frozen=True)
class Row:
    """Forward or backward of one peer on one mask. Errors are of o, or of dq, dk and dv."""

    window: int
    kind: str
    peer: str
    direction: str
    ms: float
    tflops: float
    share_of_ceiling: float
    largest_errors: tuple[float, ...] | None
    relative_errors: tuple[float, ...] | None  # of Frobenius norms


type Runs = tuple[Callable[[], Any], Callable[[], Any]]
type Peer = Callable[[Case], Runs]


def jax_peer(attend: Callable[..., Array]) -> Peer:
    """Return the runs of `attend(q, k, v, mask, blocks)`; `blocks` is static, for peers that must know."""
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
    output = attention_hopper.attend(SCALE, q, k, v, *mask)
    assert isinstance(output, Array)  # and no log-sum-exp
    return output


def xla(q: Array, k: Array, v: Array, mask: BlockMask, blocks: int) -> Array:
    del blocks
    return block_sparse_attention(q, k, v, mask, scale=SCALE, implementation="xla")


def cudnn(q: Array, k: Array, v: Array, mask: BlockMask, blocks: int) -> Array:
    del mask
    window = (blocks * BLOCK_SIZE - 1, 0)
    return jax.nn.dot_product_attention(
        q[None], k[None], v[None], scale=SCALE, is_causal=True, local_window_size=window, implementation="cudnn"
    )[0]


def flex_peer(torch: ModuleType, documents_T: Array) -> Peer:
    """Return the runs of PyTorch's FlexAttention on our block lists."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    attend = torch.compile(flex.flex_attention, dynamic=False)
    documents = torch.from_dlpack(documents_T)

    # One function for all masks: a new one would be compiled anew.
    def mask_function(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (documents[query] == documents[key])

    def runs(case: Case) -> Runs:
        m = case.mask
        lists = [
            torch.from_dlpack(x)[None, None]
            for x in (m.partial_counts, m.partial_indices, m.full_counts, m.full_indices)
        ]
        mask = flex.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK_SIZE, mask_mod=mask_function)
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
    """Return outputs of either library as float32 (T, H, K)."""
    parts = result if isinstance(result, tuple | list) else (result,)
    if isinstance(parts[0], Array):
        return [np.asarray(x, np.float32) for x in parts]
    return [x[0].transpose(0, 1).float().cpu().numpy() for x in parts]


@jax.jit
def float32_truth(inputs: tuple[Array, ...], documents_T: Array, blocks: Array) -> tuple[Array, ...]:
    """Return o, dq, dk, dv in float32, one block of queries at a time against all keys: no lists, only the rule."""
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
    """Yield the times of the first draw, and the errors of all draws that have a truth."""
    _, heads, width = case.inputs[0].shape
    wait: Callable[[Any], Any] = jax.block_until_ready
    if peer == "flex":
        synchronize = importlib.import_module("torch").cuda.synchronize

        def wait(result: Any) -> Any:
            return synchronize()

    for direction, runs, matmuls, wanted in zip(
        ("forward", "backward"), zip(*draws, strict=True), (2, 5), (slice(0, 1), slice(1, 4)), strict=True
    ):
        ms = milliseconds({direction: runs[0]}, calls=CALLS, rounds=ROUNDS, wait=wait)[direction]
        tflops = matmuls * 2 * width * heads * case.pairs / ms / 1e9
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
    """Return TFLOP/s of a large bf16 matmul on random data, on this device, in this run."""
    size = 8192 if on_gpu() else 512
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    matmul = jax.jit(jnp.matmul)
    ms = milliseconds({"matmul": lambda: matmul(a, b)}, calls=CALLS, rounds=ROUNDS)["matmul"]
    return 2 * size**3 / ms / 1e9


def layer_mix(rows: list[Row], window: int) -> str:
    """Return forward and backward of the record's layers, each peer's, as one line."""
    layers = {"long": LONG_LAYERS, "short": SHORT_LAYERS}
    total = {
        peer: sum(layers[row.kind] * row.ms for row in rows if row.peer == peer and row.window == window)
        for peer in dict.fromkeys(row.peer for row in rows)
    }
    parts = [f"{peer} {ms:.2f} ms" for peer, ms in total.items()]
    if "hopper" in total and "flex" in total:
        parts.append(f"hopper / flex {total['hopper'] / total['flex']:.3f}")
    return f"layer mix at a window of {window} tokens ({LONG_LAYERS} long + {SHORT_LAYERS} short): " + ", ".join(parts)


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Draw each peer's time over the window, long masks, as a PNG."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, direction in zip(figure.subplots(1, 2, sharex=True), ("forward", "backward"), strict=True):
        for peer in dict.fromkeys(row.peer for row in rows):
            line = [r for r in rows if (r.peer, r.direction, r.kind) == (peer, direction, "long")]
            axes.plot([r.window for r in line], [r.ms for r in line], "o-", label=peer)
        axes.set(title=f"{direction}, long mask", xlabel="window (tokens)", ylabel="ms a layer", yscale="log")
        axes.grid(which="both", alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, format="png")


def parser() -> argparse.ArgumentParser:
    p = bench_parser("attention", __doc__)
    p.add_argument(
        "--data", type=Path, default=TINY_DATA, metavar="DIR", help="shards (default: the text in the package)"
    )
    add_size(p, "--length", 65536, "T", "tokens")
    add_size(p, "--heads", 6, "H")
    add_size(p, "--head-width", 128, "K")
    p.add_argument(
        "--windows", type=int, nargs="+", default=[128, 256, 512, 896, 1280, 1792], metavar="W",
        help="in tokens, multiples of 128 (default: those of the record's run)",
    )  # fmt: skip
    p.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    p.add_argument("--no-errors", action="store_true", help="skip the comparison with float32")
    add_size(p, "--draws", 1, "N", "inputs to compare")
    return p


def random_inputs(shape: tuple[int, int, int], seed: int) -> tuple[Array, Array, Array, Array]:
    q, k, v, d_output = (
        jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(seed), 4)
    )
    return q, k, v, d_output


def make_peers(names: list[str], documents_T: Array, head_width: int) -> dict[str, Peer]:
    """Return the peers that are installed.

    Raises:
      UsageError: for one that does not run on this device.
    """
    if set(names) - {"xla"} and not on_gpu():
        raise UsageError("--peers: only xla runs without a GPU")
    if "hopper" in names:
        try:
            choose("--peers", "hopper", lambda: unsupported(jnp.bfloat16, head_width, BLOCK_SIZE, SCALE))
        except ValueError as error:
            raise UsageError(str(error)) from error
    attends: dict[str, Callable[..., Array]] = {"cudnn": cudnn, "hopper": hopper, "xla": xla}
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


def cases(tokens: Array, window: int, draws: list[tuple[Array, Array, Array, Array]]) -> Iterator[list[Case]]:
    """Yield the cases of the long mask at a window of `window` tokens, one a draw, and those of the short one."""
    blocks = window // BLOCK_SIZE
    masks, counts = jax.jit(long_short_masks)(tokens, blocks), visible_pairs(tokens, blocks)
    for kind, mask, pairs in zip(("long", "short"), masks, counts, strict=True):
        wide = blocks if kind == "long" else max(blocks // 2, 1)
        yield [Case(window, kind, wide, pairs, mask, inputs) for inputs in draws]


def truth(case: Case) -> list[np.ndarray]:
    return [np.asarray(x) for x in float32_truth(case.inputs, case.mask.documents, jnp.int32(case.blocks))]


def check(options: argparse.Namespace) -> None:
    """Raise UsageError for sizes that cannot be."""
    for window in options.windows:
        if window < BLOCK_SIZE or window % BLOCK_SIZE:
            raise UsageError(f"--windows {window}: must be a positive multiple of {BLOCK_SIZE} tokens")
    if options.draws < 1:
        raise UsageError("--draws: must be at least 1")
    if options.length <= 0 or options.length % BLOCK_SIZE:
        raise UsageError(f"--length {options.length}: must be a positive multiple of {BLOCK_SIZE}")


def run(options: argparse.Namespace) -> int:
    check(options)
    tokens = jnp.asarray(first_tokens(options.data, options.length))
    shape = (options.length, options.heads, options.head_width)
    draws = [random_inputs(shape, seed) for seed in range(options.draws)]
    peers = make_peers(options.peers, long_short_masks(tokens, 1)[0].documents, options.head_width)
    ceiling, rows = matmul_ceiling(), list[Row]()
    about = f"{describe(T=shape[0], H=shape[1], K=shape[2])}, bf16 matmul {ceiling:.0f} TFLOP/s"
    print(about)
    table = Table({
        "window": "6d", "mask": "<5", "peer": "<6", "direction": "<9", "ms": "9.3f", "TFLOP/s": "7.1f",
        "of ceiling": "10.1%", "largest err": "11.1e", "relative": "8.1e",
    })  # fmt: skip
    for window in sorted(options.windows):
        for of_mask in cases(tokens, window, draws):
            truths = [] if options.no_errors else [truth(case) for case in of_mask]
            for name, peer in peers.items():
                for row in measure(of_mask[0], name, list(map(peer, of_mask)), truths, ceiling):
                    rows.append(row)
                    worst = (errors and max(errors) for errors in (row.largest_errors, row.relative_errors))
                    table.add(
                        row.window, row.kind, row.peer, row.direction, row.ms, row.tflops, row.share_of_ceiling, *worst
                    )
    write_record(options.out, "attention", rows, shape=shape, ceiling_tflops=ceiling)
    draw(rows, options.out / "attention.png", f"{about}\n{time.strftime('%Y-%m-%d')}, median of {ROUNDS}")
    if "cudnn" in peers:
        print("cudnn: window in tokens and no documents, so another mask: not the same\nwork, and not the bar")
    print(wrap(layer_mix(rows, max(options.windows)), "  "))
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), run, arguments)
