"""What one framework's process of compare.py does: the same for JAX and PyTorch, in NumPy alone.

    python -m jax_speedrun.tools.comparison.worker jax|torch JOB.json

A job comes in as JSON, arrays as .npz, and the answer goes out as one line of JSON. Whatever depends on the
framework stands behind `Side`: jax_side.py and torch_side.py. Each is imported where its framework is installed, and
nothing else here needs more than NumPy.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

WARM_UP_CALLS = 2
MAX_CALLS = 50
"""In a sample, which are dispatched without waiting in between."""

PARTS = {
    "step": ("step",),
    "micro": ("micro",),
    "attention": ("attention_forward", "attention"),
    "head": ("head",),
    "optimizer": ("optimizer",),
}
"""Names for --parts -> what is measured for them. The full step comes first: a process's peak memory only grows."""
WINDOWS = {"eighth": (128, 512, 896, 1280, 1792), "tiny": (128, 640)}
"""Presets to compare -> the long windows to measure, in tokens."""
SAMPLES = {"eighth": 5, "tiny": 3}
"""Presets -> samples a turn and part: with these `tiny` takes under five minutes on two CPU cores, both frameworks."""
WINDOWED = {"step", "micro", "attention_forward", "attention"}


class Side(Protocol):
    """One framework with a model, its optimiser state, and one device."""

    def describe(self) -> dict[str, Any]:
        """Return what a reader of the numbers has to know.

        `device`, `platform`, `versions`, `attention`, `kernels`, `fallbacks` (lines of text), `peak_flops` (or None),
        `matmul_size`, and `reduced`: what is left out of the recipe's work here, None where nothing is.
        """

    def dispatcher(
        self, part: str, tokens_T: np.ndarray, targets_T: np.ndarray, window: int, step: int
    ) -> Callable[[], object]:
        """Return a call that starts `part` once and returns something to `wait` for. "matmul" is a part as well.

        `window` is in blocks.
        """

    def wait(self, result: object) -> None: ...

    def peak_bytes(self) -> int | None: ...

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Take over weights, named `blocks.0.mlp.fc_FD`, and start the optimisers afresh."""

    def parameters(self) -> dict[str, np.ndarray]: ...

    def gradients(
        self, tokens_T: np.ndarray, targets_T: np.ndarray, window: int
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Return the loss and the gradient of every parameter, float32."""

    def step(self, tokens_T: np.ndarray, targets_T: np.ndarray, step: int) -> float:
        """Make one training step; return the loss before it."""

    def evaluate(self, tokens_NT: np.ndarray, targets_NT: np.ndarray, step: int) -> float: ...


def run_job(side: Side, job: Mapping[str, Any]) -> dict[str, Any]:
    """Do what the job's `task` says: "measure", "initial" or "parity"."""
    if job["task"] == "initial":
        save_arrays(Path(job["arrays_out"]), side.parameters())
        return side.describe()
    with np.load(job["inputs"]) as file:
        inputs = dict(file)
    return {"measure": measure, "parity": parity}[job["task"]](side, job, inputs)


def measure(side: Side, job: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Measure each part, in milliseconds a call: `job["samples"]` times, each over several calls.

    `job["windows"]` is a list of windows, each with its `tokens`, its `blocks` and a `step` at which a run has it.
    """
    tokens_T, targets_T = inputs["tokens"][0], inputs["targets"][0]
    result: dict[str, Any] = {"first_step_s": None, "peak_bytes": None, "times": []}
    for part in (*(p for name in PARTS if name in job["parts"] for p in PARTS[name]), "matmul"):
        for window in job["windows"] if part in WINDOWED else job["windows"][-1:]:
            dispatch = side.dispatcher(part, tokens_T, targets_T, window["blocks"], window["step"])
            if part == "step" and result["first_step_s"] is None:
                side.wait(dispatch())
                result["first_step_s"] = time.time() - job["began"]
            samples = sample_ms(dispatch, side.wait, job["samples"], job["sample_seconds"])
            tokens = window["tokens"] if part in WINDOWED else None
            result["times"].append({"part": part, "window": tokens, "ms": samples})
        if part == "step":
            result["peak_bytes"] = side.peak_bytes()
    return {**side.describe(), **result}


def sample_ms(
    dispatch: Callable[[], object], wait: Callable[[object], None], samples: int, sample_seconds: float
) -> list[float]:
    """Return milliseconds a call, `samples` times, each the mean over as many calls as fill `sample_seconds`."""

    def timed(calls: int) -> float:
        began = time.perf_counter()
        result = None
        for _ in range(calls):
            result = dispatch()
        wait(result)
        return (time.perf_counter() - began) / calls

    for _ in range(WARM_UP_CALLS):
        timed(1)
    calls = min(max(math.ceil(sample_seconds / timed(1)), 1), MAX_CALLS)
    return [1000 * timed(calls) for _ in range(samples)]


def parity(side: Side, job: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return loss and gradients of given weights, the parameters after some steps from them, and a run's losses.

    Writes `gradient:NAME` and `after5:NAME` (of large arrays, a sample of rows: `thin`) to `job["arrays_out"]`.
    """
    tokens, targets = inputs["tokens"], inputs["targets"]
    arrays: dict[str, np.ndarray] = {}

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        return tokens[step % len(tokens)], targets[step % len(tokens)]

    side.load(load_arrays(Path(job["filled"])))
    loss, gradients = side.gradients(*batch(0), job["window"])
    arrays |= {f"gradient:{name}": value for name, value in gradients.items()}
    del gradients
    for step in range(max(job["snapshots"])):
        side.step(*batch(step), step)
        if step + 1 in job["snapshots"]:
            arrays |= {f"after{step + 1}:{name}": thin(value) for name, value in side.parameters().items()}
    save_arrays(Path(job["arrays_out"]), arrays)
    del arrays

    side.load(load_arrays(Path(job["initial"])))
    losses, validation = [], {}
    for step in range(job["curve_steps"] + 1):
        last = step == job["curve_steps"]
        if last or step % job["validate_every"] == 0:
            validation[str(step)] = side.evaluate(inputs["val_tokens"], inputs["val_targets"], step)
        if not last:
            losses.append(side.step(*batch(step), step))
    return {**side.describe(), "loss": loss, "losses": losses, "validation": validation}


def thin(array: np.ndarray) -> np.ndarray:
    """Return every 16th row of what has millions of them times width: tables and head, else gigabytes a snapshot."""
    return array[::16] if array.size > 1 << 24 else array


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # its other keywords are no arrays


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def main(framework: str, job_file: str) -> None:
    """Do one job. The last line on standard output is the result."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    side: Side
    if framework == "jax":
        from .jax_side import JaxSide

        side = JaxSide(job)
    else:
        from . import reference_torch
        from .torch_side import TorchSide

        side = TorchSide(job, reference_torch)
    print(json.dumps(run_job(side, job)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
