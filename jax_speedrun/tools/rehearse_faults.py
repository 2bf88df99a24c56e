"""What goes wrong on GPUs, done for real: `python scripts/rehearse_faults.py --out DIR`, under 3 minutes on two.

  kill-0 kill-1   one of two processes is killed, the first or the second
  hang-0 hang-1   one of two processes is stopped, as a machine that loses its network
  memory          a run has a thousandth of a GPU's memory
  shared          a run is started on a GPU that another process fills
  together        one process with two GPUs: what an NCCL that is too old has to say, if it is; else it ends well

In runs of the tiny preset, all at the same time but for `shared`. For each process: its exit code, the seconds from the
fault to its end, and its last line, which has to say what happened and how to go on.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from ..run.checkpoint import complete_steps
from .command import make_parser, run_command

CASES = ("kill-0", "kill-1", "hang-0", "hang-1", "memory", "shared", "together")
START_SECONDS = 120
"""Until a run has its first checkpoint: ten of them compile at the same time."""
END_SECONDS = 60
"""Within which each process has to end after a fault."""
TRAIN = [sys.executable, "-c", "import sys; from jax_speedrun.tools.train import main; sys.exit(main())"]
TINY = ["--preset", "tiny", "--sequences", "2", "--sequence-length", "128", "--epochs", "1000000"]
FILL = "import jax, time; jax.block_until_ready(jax.numpy.zeros(1)); print('full', flush=True); time.sleep(600)"
"""A process that takes what XLA_PYTHON_CLIENT_MEM_FRACTION says of a GPU."""


class Ended(NamedTuple):
    """How a process ended: None for the code of one that did not, `seconds` after the fault."""

    who: str
    code: int | None
    seconds: float
    last_line: str

    @property
    def good(self) -> bool:
        """Return whether it ended in time, and well or with a last line of ours."""
        return self.code == 0 or (self.code is not None and self.last_line.startswith("train.py: error: "))


class Run:
    """A run of the tiny preset in a process of its own, on one GPU or on all; what it says goes to `out`.txt."""

    def __init__(self, out: Path, *options: object, gpu: int | None = None, memory: float = 0.08, steps: int = 1000000):
        visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        self.said = out.with_name(f"{out.name}-{len(list(out.parent.glob(f'{out.name}-*.txt')))}.txt")
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [
                    *TRAIN,
                    *TINY,
                    "--steps",
                    str(steps),
                    "--checkpoint-every",
                    "20",
                    "--out",
                    str(out),
                    *map(str, options),
                ],
                env={**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": str(memory), **visible},
                stdout=file,
                stderr=file,
            )

    def ended(self, who: str, since: float, within: float = END_SECONDS) -> Ended:
        """Wait for the end, for so many seconds after `since`."""
        try:
            code = self.process.wait(max(0.0, since + within - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        seconds = time.monotonic() - since
        time.sleep(1)  # its last words come from a process that outlives it by a moment
        lines = self.said.read_text(errors="replace").split("\n")
        return Ended(who, code, seconds, next((line for line in reversed(lines) if line.strip()), ""))


def pair(out: Path, case: str) -> list[Ended]:
    """Let two processes run together until there is a checkpoint, then do to one of them what `case` says."""
    fault, victim = case.split("-")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ("--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", 2, "--mesh", 2)
    runs = [Run(out / case, *where, "--process-id", process, gpu=process) for process in range(2)]
    try:
        deadline = time.monotonic() + START_SECONDS
        while not complete_steps(out / case):
            if time.monotonic() > deadline or any(run.process.poll() is not None for run in runs):
                return [
                    run.ended(f"{case}: process {process} does not start", deadline) for process, run in enumerate(runs)
                ]
            time.sleep(0.2)
        runs[int(victim)].process.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        since = time.monotonic()
        other = runs[1 - int(victim)].ended(f"{case}: the other", since)
        if fault == "hang":
            runs[int(victim)].process.send_signal(signal.SIGCONT)
            since = time.monotonic()
        return [other, runs[int(victim)].ended(f"{case}: itself", since)]
    finally:
        stop(*(run.process for run in runs))


def alone(out: Path, case: str) -> list[Ended]:
    """Start one run that cannot go well, or with `together` one that should."""
    holder = None
    if case == "shared":
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.985"}
        holder = subprocess.Popen([sys.executable, "-c", FILL], env=environment, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        holder.stdout.readline()
    try:
        gpu, mesh = (None, 2) if case == "together" else (0, 1)
        memory = {"memory": 0.001, "shared": 0.75}.get(case, 0.08)
        run = Run(out / case, "--mesh", mesh, gpu=gpu, memory=memory, steps=30)
        try:
            return [run.ended(case, time.monotonic(), START_SECONDS)]
        finally:
            stop(run.process)
    finally:
        if holder is not None:
            stop(holder)


def stop(*processes: subprocess.Popen) -> None:
    for process in processes:
        process.kill()
        process.wait()


def rehearse(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    if list(options.out.iterdir()):
        raise UsageError(f"--out {options.out}: not empty; name another folder")
    at_once = [case for case in options.cases if case != "shared"]
    with ThreadPoolExecutor(len(CASES)) as pool:
        jobs = [pool.submit(pair if "-" in case else alone, options.out, case) for case in at_once]
        ended = [end for job in jobs for end in job.result()]
    if "shared" in options.cases:  # which takes what the others would need
        ended += alone(options.out, "shared")
    for end in ended:
        verdict = "good" if end.good else "BAD"
        code = "still there" if end.code is None else f"code {end.code}"
        print(f"{verdict}  {end.who}: {code} after {end.seconds:.0f} s\n      {end.last_line}", flush=True)
    return 0 if all(end.good for end in ended) else 1


def parser() -> argparse.ArgumentParser:
    p = make_parser("rehearse_faults.py", __doc__)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty folder for what all runs say")
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    return p


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), rehearse, arguments)
