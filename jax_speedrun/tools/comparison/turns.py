"""Both frameworks at the same work: each in processes of its own, in turns, on the same tokens.

This is the side that starts them. It never touches the GPU itself, so that a worker has all of it.
"""

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config import Config, to_dict
from ...data.batches import TokenBatches, find_shards, validation_sequences
from ...errors import UsageError
from ...kernels.block_mask import DOCUMENT_START
from .worker import save_arrays

ROOT = Path(__file__).resolve().parents[3]
"""The folder that holds the package; in a checkout also the scripts."""
WORKER = "jax_speedrun.tools.comparison.worker"
FRAMEWORKS = ("jax", "torch")
SIDES = {"jax": "jax", "xla": "jax", "torch": "torch"}
"""What is measured -> its framework: JAX, JAX without our kernels, PyTorch."""
SAMPLE_SECONDS = 0.25
DOCUMENT_MEDIAN, DOCUMENT_SIGMA = 400, 1.06
"""Tokens a document; log-normal, so that the mean is near 700, as in web text."""

type Job = dict[str, Any]
type Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Launcher:
    """How worker processes are started.

    Attributes:
      interpreters: framework -> the Python that has it installed.
      folder: for job files, logs and, in `cache/`, what the frameworks compile.
    """

    interpreters: Mapping[str, str]
    folder: Path

    def require_torch(self) -> None:
        """Raises UsageError if PyTorch's interpreter has no PyTorch."""
        code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
        try:
            found = subprocess.run([self.interpreters["torch"], "-c", code], check=False).returncode == 0
        except OSError as error:
            raise UsageError(f"--torch-python {self.interpreters['torch']}: {error.strerror}; name a Python") from error
        if not found:
            raise UsageError("PyTorch is not installed; run: pip install -e '.[torch]' (or name --torch-python)")

    def __call__(self, framework: str, job: Job, name: str) -> Result:
        """Run one worker to its end. What it prints besides its result goes to `name`.log.

        Raises:
          UsageError: it failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        job_file, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
        job_file.write_text(json.dumps({**job, "began": time.time()}), encoding="utf-8")
        command = [self.interpreters[framework], "-m", WORKER, framework, str(job_file)]
        cache = self.folder / "cache"
        (cache / "jax").mkdir(parents=True, exist_ok=True)  # or JAX makes it with its first program
        environment = {
            **os.environ,
            # The package of this checkout, also for an interpreter that has not installed it.
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        with log.open("w", encoding="utf-8") as errors:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, check=False
            )
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            result: Result = json.loads(lines[-1])
            return result
        said = log.read_text(encoding="utf-8", errors="replace")
        way_out = f"see {log}"
        if "out of memory" in said.lower() or "RESOURCE_EXHAUSTED" in said:
            way_out = f"it ran out of memory: give a smaller --sequence-length (details in {log})"
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
        raise UsageError(f"the {framework} worker failed ({last[:200]}); {way_out}")


def count_gpus(python: str) -> int:
    """Return how many GPUs JAX can use, as a process of its own finds out.

    Raises:
      UsageError: none.
    """
    code = "import jax; print(len(jax.devices('gpu')))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError("no GPU that JAX can use; the README says how to install for one")
    return int(done.stdout)


def measure_in_turns(
    launch: Callable[[str, Job, str], Result], jobs: Mapping[str, Job], rounds: int, say: Callable[[str], None] = print
) -> Iterator[list[Result]]:
    """Measure A B C A B C ...: in each round all sides do everything once, in a fresh process each.

    Caches start out empty, so the first round compiles everything and the later ones find it done. "xla" is left out
    where "jax", which comes first, turns out to run without our kernels.

    Args:
      jobs: a job for each of `SIDES` that is to be measured.

    Yields:
      After every round, the results of all rounds so far.
    """
    results: list[Result] = []
    sides = list(jobs)
    for number in range(rounds):
        for side in list(sides):
            if side == "xla" and "hopper" not in (results[0]["attention"], results[0]["kernels"]):
                say("JAX runs without our kernels here, and is not measured without them again")
                sides.remove(side)
                continue
            say(f"round {number + 1}/{rounds}: {side}")
            result = launch(SIDES[side], jobs[side], f"{side}-{number}")
            results.append({"side": side, "round": number, **result})
        yield list(results)


def make_job(config: Config, task: str, **rest: Any) -> Job:
    return {"task": task, "config": to_dict(config), "compile": True, **rest}


def write_inputs(path: Path, config: Config, data: Path, batches: int, *, cut: bool, validation: int) -> str:
    """Write the first `batches` sequences of training data (from the start again when it ends), and validation ones.

    With `cut`, whole works become documents as long as those of web text: attention's cost depends on them.

    Returns:
      What it is, in words.

    Raises:
      UsageError: for data that will not do.
    """
    length = config.sequence_length
    shards = find_shards(data, "train")
    one_pass = TokenBatches(shards, 1, length)
    stream = TokenBatches(shards, 1, length, epochs=-(-batches // one_pass.steps))
    rows = [next(stream) for _ in range(batches)]
    tokens = np.concatenate([inputs for inputs, _ in rows])
    targets = np.concatenate([targets for _, targets in rows])
    if cut:
        generator = np.random.default_rng(0)
        ends = np.cumsum(np.exp(generator.normal(np.log(DOCUMENT_MEDIAN), DOCUMENT_SIGMA, tokens.size // 100)))
        starts = ends[ends < tokens.size - 1].astype(int) + 1
        tokens.reshape(-1)[starts] = DOCUMENT_START
        targets.reshape(-1)[starts - 1] = DOCUMENT_START
    arrays = {"tokens": tokens, "targets": targets}
    if validation:
        arrays["val_tokens"], arrays["val_targets"] = validation_sequences(
            find_shards(data, "val"), length, validation * length
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, arrays)
    except OSError as error:
        raise UsageError(f"--out: cannot write {path} ({error.strerror}); name another folder") from error
    return f"{data.name}" + (
        f", cut into documents of log-normal length (median {DOCUMENT_MEDIAN} tokens)" if cut else ""
    )


def train_in_turns(
    interpreters: Mapping[str, str], data: Path, out: Path, seeds: Sequence[int], steps: int | None
) -> dict[str, list[Path]]:
    """Train `eighth` whole, into folders `out`/jax-0, `out`/torch-0, ...: finished ones are left as they are.

    Raises:
      UsageError: a run failed.
    """
    runs: dict[str, list[Path]] = {framework: [] for framework in FRAMEWORKS}
    commands = {"jax": ("train", "--preset", "eighth"), "torch": ("comparison.reference_run",)}
    for seed in seeds:
        for framework in FRAMEWORKS:
            folder = out / f"{framework}-{seed}"
            runs[framework].append(folder)
            if (folder / "log.txt").exists():
                print(f"{folder}: there already", flush=True)
                continue
            module, *options = commands[framework]
            # As the scripts do, which are not where the package is installed.
            call = f"import sys; from jax_speedrun.tools.{module} import main; sys.exit(main())"
            command = [interpreters[framework], "-c", call, *options]
            command += ["--seed", str(seed), "--data", str(data.resolve()), "--out", str(folder)]
            command += [] if steps is None else ["--steps", str(steps)]
            print(f"{folder}: starting", flush=True)
            code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode
            if code:
                raise UsageError(f"the run in {folder} ended with code {code}; delete the folder and try again")
    return runs
