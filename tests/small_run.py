"""Real runs in processes of their own, of a model so small that a step takes milliseconds.

`python -m tests.small_run ARGUMENTS` is scripts/train.py with two more presets, `small` and `still`.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_speedrun.config import PRESETS, Config, ModelConfig, OptimizerConfig
from jax_speedrun.data.batches import write_shard
from jax_speedrun.tools import train
from tests.paths import ROOT

VOCABULARY = 512
SMALL = Config(
    "small",
    model=ModelConfig(
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        layers=2,
        width=16,
        heads=1,
        head_width=16,
        mlp_width=32,
        long_layers=(0,),
        attention_free_layers=(1,),
        value_embedding_tables=1,
        table_dtype="float32",
        compute_dtype="float32",
        head_precision="float32",
        evaluation_precision="float32",
    ),
    # Scalars stand still, for the reason given in test_train.py.
    optimizer=OptimizerConfig(
        scalar_learning_rate=0.0, window_tokens=256, newton_schulz_dtype="float32", update_dtype="float32"
    ),
    steps=60,
    sequence_length=128,
    validation_tokens=3 * 128,
    validation_every=1000,
    checkpoint_every=5,
    epochs=100,
    attention="reference",
)
STILL = dataclasses.replace(
    PRESETS["tiny"],
    preset="still",
    optimizer=dataclasses.replace(PRESETS["tiny"].optimizer, scalar_learning_rate=0.0, embedding_learning_rate=0.0),
)
"""`tiny` without what Adam moves by the sign of a gradient that is about as small as its rounding."""
PATIENCE_SECONDS = 240
"""For what takes seconds: the machine may be busy with other tests."""


def write_data(folder: Path) -> Path:
    """Shards of 29 and 19 batches: ids below 500, half of which follow from the one before."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("words_train_000000", 30_000), ("words_train_000001", 20_000), ("words_val_000000", 1_000)):
        tokens = rng.zipf(1.3, size) % 500
        repeated = rng.random(size - 1) < 0.5
        tokens[1:][repeated] = (tokens[:-1] * 7 + 1)[repeated] % 500
        write_shard(folder / f"{name}.bin", tokens.astype(np.uint16))
    return folder


def start(*arguments: object, cache: Path, output: int = subprocess.PIPE, **environment: str) -> subprocess.Popen[str]:
    """The script with `arguments`, its compiled programs in the folder `cache`; what it says goes to `output`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_", "OMPI_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.small_run", *map(str, arguments)],
        cwd=ROOT,
        env={
            **inherited,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environment,
        },
        stdout=output,
        stderr=output,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0, *, patience: float = PATIENCE_SECONDS) -> str:
    """Wait for a process, which has to end with `code`: what it said on stderr, or on stdout if all is well.

    It is for 0, and for 128 and the number of a signal after which the run has a checkpoint.
    """
    try:
        out, error = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, out + error
    return out if code == 0 or code > 128 else error


def start_several(count: int, *arguments: object, cache: Path) -> list[subprocess.Popen[str]]:
    """One run of `count` processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ("--coordinator", f"127.0.0.1:{port}", "--processes", count)
    return [start(*arguments, *where, "--process-id", i, cache=cache) for i in range(count)]


def wait_until(reached: Callable[[], object], *processes: subprocess.Popen[str]) -> None:
    """Look again and again, while `processes` go on."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert all(process.poll() is None for process in processes), "ended too early"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.005)


class Values(NamedTuple):
    """What a run says of a step, as exact as it was computed."""

    loss: float | None
    val_loss: float | None


def values(out: Path) -> dict[int, Values]:
    """By step, as far as the run has come."""
    path = out / "metrics.jsonl"
    # The last line may be half written.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {record["step"]: Values(record["loss"], record["val_loss"]) for record in map(json.loads, lines)}


def losses(out: Path) -> np.ndarray:
    """Of the training steps, which must be there from the first on."""
    steps = {step: value.loss for step, value in values(out).items() if step > 0}
    assert list(steps) == list(range(1, len(steps) + 1))
    return np.array(list(steps.values()), float)


def last_step(out: Path) -> int:
    """The newest step, 0 before the first."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def complete_checkpoints(out: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in (out / "checkpoints").glob("*/manifest.txt"))


if __name__ == "__main__":
    PRESETS |= {"small": SMALL, "still": STILL}
    sys.exit(train.main())
