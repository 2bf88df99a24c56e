"""Where the time of a training step goes: `python scripts/profile_step.py --preset eighth --data DIR`.

Profiles some steps and gives every kernel's time to a part of the step, beside the
floor and the target of that part (for sequences of 65,536 tokens on an H100).
The trace stays in --out: open it with xprof or Perfetto.
"""

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from ..config import KERNELS, PRESETS, Config, resolve
from ..data.batches import TINY_DATA, TokenBatches, find_shards
from ..run.compilation import Call, compile_together
from ..sharding import make_mesh, replicate, split_sequences
from ..step import make_program
from .command import make_parser, run_command
from .layout import make_table, print_table
from .profiling import PARTS, Kernel, Part, attribute, exposed_communication, instruction_parts, kernels
from .windows import step_with_window


def parser() -> argparse.ArgumentParser:
    p = make_parser("profile_step.py", __doc__)
    p.add_argument("--preset", choices=PRESETS, default="eighth", help="default: %(default)s")
    p.add_argument("--data", type=Path, default=TINY_DATA, metavar="DIR", help="default: the text in the package")
    p.add_argument("--window", type=int, metavar="W", help="long attention window, in tokens (default: halfway's)")
    p.add_argument("--steps", type=int, default=10, metavar="N", help="steps to profile (default 10)")
    p.add_argument("--sequence-length", type=int, metavar="T", help="default: the preset's")
    p.add_argument("--mesh", type=int, metavar="N", help="devices")
    p.add_argument("--kernels", choices=KERNELS, default="auto", help="as in train.py (default auto)")
    p.add_argument("--kernels-shown", type=int, default=4, metavar="N", help="the longest kernels of each part")
    p.add_argument("--out", type=Path, metavar="DIR", help="keep the trace, parts.json and the program's HLO there")
    return p


def run(options: argparse.Namespace) -> int:
    # Before JAX starts its devices: inside a CUDA graph kernels lose the name of what they came from.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
    config = dataclasses.replace(PRESETS[options.preset], kernels=options.kernels)
    if options.sequence_length:
        config = dataclasses.replace(config, sequence_length=options.sequence_length)
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        mesh = make_mesh(options.mesh, config.sequences)
        parts = profile(config, mesh, options, out)
        sequences = config.sequences // mesh.size if config.sequence_length == 65536 else None
        show(parts, options.kernels_shown, sequences)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), run, arguments)


def profile(config: Config, mesh: Mesh, options: argparse.Namespace, out: Path) -> dict[Part, list[Kernel]]:
    """Return the kernels of `options.steps` steps by part, their times divided by the number of steps."""
    config = resolve(config, mesh.devices.flat[0])
    batches = TokenBatches(find_shards(options.data, "train"), config.sequences, config.sequence_length, epochs=10**6)
    program = make_program(config, mesh)
    start = _start(options.window, config)
    sequences = jax.device_put(next(batches), split_sequences(mesh))
    seed = jax.device_put(np.uint32(config.seed), replicate(mesh))
    step, init = compile_together(
        Call(program.train_step, (program.state, *sequences)),
        Call(program.init, (seed,)),
    )
    state = init(seed)._replace(step=jax.device_put(np.int32(start), replicate(mesh)))
    hlo = step.as_text() or ""
    (out / "step.hlo").write_text(hlo)
    for _ in range(3):
        state, metrics = step(state, *sequences)
    jax.block_until_ready(metrics)
    with jax.profiler.trace(out):
        for _ in range(options.steps):
            state, metrics = step(state, *sequences)
        jax.block_until_ready(metrics)
    module = hlo.split(maxsplit=2)[1].rstrip(",")
    share = options.steps * mesh.size
    found = [kernel._replace(ms=kernel.ms / share) for kernel in kernels(out, module)]
    parts_of = instruction_parts(hlo)
    if mesh.size > 1:
        print(f"communication that nothing hides: {exposed_communication(out, module, parts_of) / share:.2f} ms a step")
    parts = attribute(found, parts_of)
    text = json.dumps({part.name: [kernel._asdict() for kernel in members] for part, members in parts.items()})
    (out / "parts.json").write_text(text + "\n")
    return parts


def _start(window: int | None, config: Config) -> int:
    """Return the first step of the run that has a window of so many tokens; the one halfway for None."""
    return config.steps // 2 if window is None else step_with_window("--window", window, config)


def show(parts: dict[Part, list[Kernel]], kernels_shown: int, sequences: int | None) -> None:
    """Print a table, with bounds for so many sequences of 65,536 tokens; None: without."""
    table = make_table("", "part", "ms a step", "floor", "target")
    # Shortened where it must be: the whole names are in parts.json.
    table.add_column("ms of the longest kernels", no_wrap=True, overflow="ellipsis", max_width=34)
    for part in PARTS:
        members = parts[part]
        longest = [f"{kernel.ms:.2f} {kernel.instruction or kernel.name}" for kernel in members[:kernels_shown]]
        times = 1 if sequences and part.once_a_step else sequences
        bounds = (part.floor_ms, part.target_ms)
        limits = ("" if bound is None or times is None else f"{bound * times:g}" for bound in bounds)
        table.add_row(part.name, f"{sum(kernel.ms for kernel in members):.2f}", *limits, "\n".join(longest))
    table.add_section()
    table.add_row("kernels in all", f"{sum(kernel.ms for members in parts.values() for kernel in members):.2f}")
    print_table(table)
