"""The record's run on the GPUs of this machine, beside PyTorch: `python scripts/rehearse.py --data DIR --out DIR`.

Four parts, for any number of GPUs that divides the record's eight sequences a step:

  speed    train.py and the PyTorch reference under torchrun, in turns; ms a step by attention window
  losses   the first 50 steps on one GPU and on all: the same to 1e-3
  profile  where a step's time goes, and how much communication nothing hides
  run      1385 steps with validation, by the record's clock

Everything is done by the commands that users call; this one starts them and reads their logs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from ..config import PRESETS
from ..data.batches import TokenBatches, find_shards
from ..errors import UsageError
from .command import make_parser, run_command
from .comparison.turns import ROOT, count_gpus

SCRIPTS = ROOT / "scripts"
PARTS = ("speed", "losses", "profile", "run")
WARM_UP_STEPS = 3  # everything is compiled before the first; the smallest window lasts only a few
SAME_LOSS = 1e-3

type Times = dict[int, list[float]]  # window in tokens: ms of steps


def parser() -> argparse.ArgumentParser:
    p = make_parser("rehearse.py", __doc__)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="token shards; repeated where too short")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the folders of all runs")
    p.add_argument("--mesh", type=int, metavar="N", help="GPUs (default: all that divide the batch)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    p.add_argument("--steps", type=int, default=140, metavar="N", help="of each run for `speed` (default %(default)s)")
    p.add_argument("--rounds", type=int, default=2, metavar="N", help="turns of each for `speed` (default %(default)s)")
    return p


class Rehearsal:
    """Starts runs under one folder; what is there already is read, not run again."""

    def __init__(self, data: Path, out: Path, devices: int):
        record = PRESETS["sub3min"]
        batches = TokenBatches(find_shards(data, "train"), record.sequences, record.sequence_length)
        self.data, self.out, self.devices, self.steps_an_epoch = data, out, devices, batches.steps

    def jax(self, name: str, steps: int, devices: int | None = None, *options: str) -> Path:
        mesh = ["--preset", "sub3min", "--mesh", str(devices or self.devices)]
        return self._train(name, steps, [sys.executable, str(SCRIPTS / "train.py"), *mesh, *options])

    def torch(self, name: str, steps: int) -> Path:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [str(SCRIPTS / "reference_torch.py"), "--sequences", str(PRESETS["sub3min"].sequences)]
        return self._train(name, steps, [*launcher, f"--nproc-per-node={self.devices}", *script])

    def _train(self, name: str, steps: int, command: list[str]) -> Path:
        folder = self.out / name
        if not (folder / "log.txt").exists():
            epochs = -(-steps // self.steps_an_epoch)
            command += ["--steps", str(steps), "--data", str(self.data), "--epochs", str(epochs), "--out", str(folder)]
            run(command)
        return folder


def run(command: list[str]) -> None:
    """Raises UsageError if the command fails."""
    print("$", " ".join(command), flush=True)
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}, check=False).returncode
    if code:
        raise UsageError(f"{Path(command[1]).name} ended with code {code}; what it said stands above")


def metrics(folder: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def speed(rehearsal: Rehearsal, steps: int, rounds: int) -> None:
    times: dict[str, Times] = {"JAX": defaultdict(list), "PyTorch": defaultdict(list)}
    for number in range(rounds):
        folders = {
            "JAX": rehearsal.jax(f"speed-jax-{number}", steps),
            "PyTorch": rehearsal.torch(f"speed-torch-{number}", steps),
        }
        for framework, folder in folders.items():
            for record in metrics(folder):
                step, window, ms = record["step"], record["window"], record["ms"]
                if step is not None and window is not None and ms is not None and step > WARM_UP_STEPS:
                    times[framework][int(window)].append(ms)
    print("window   JAX ms  PyTorch ms   ratio")
    for window in sorted(times["JAX"].keys() & times["PyTorch"].keys()):
        ours, theirs = (statistics.median(times[name][window]) for name in ("JAX", "PyTorch"))
        print(f"{window:6d} {ours:8.1f} {theirs:11.1f} {ours / theirs:7.3f}")


def same_losses(rehearsal: Rehearsal) -> bool:
    one, all_ = (
        [record["loss"] for record in metrics(folder) if record["loss"] is not None]
        for folder in (rehearsal.jax("losses-1", 50, 1), rehearsal.jax(f"losses-{rehearsal.devices}", 50))
    )
    differences = [abs(a / b - 1) for a, b in zip(all_, one, strict=True)]
    print(
        f"losses of {len(one)} steps on {rehearsal.devices} GPU(s) and on 1: "
        f"largest relative difference {max(differences):.1e}"
    )
    apart = [step for step, difference in enumerate(differences, 1) if not difference <= SAME_LOSS]  # NaN is apart
    if apart:
        print(f"more than {SAME_LOSS:.0e} at step(s) {', '.join(map(str, apart))}")
    return not apart


def rehearse(options: argparse.Namespace) -> int:
    """Return 1 if the losses of one GPU and of all are too far apart, else 0."""
    good, sequences = True, PRESETS["sub3min"].sequences
    # Found out in a process of its own: one that has used the GPUs holds their memory.
    devices = options.mesh or max(n for n in range(1, count_gpus(sys.executable) + 1) if sequences % n == 0)
    rehearsal = Rehearsal(options.data, options.out, devices)
    for part in options.parts:
        print(f"== {part}", flush=True)
        match part:
            case "speed":
                speed(rehearsal, options.steps, options.rounds)
            case "losses":
                good = same_losses(rehearsal)
            case "profile":
                script, mesh = str(SCRIPTS / "profile_step.py"), ["--preset", "sub3min", "--mesh", str(devices)]
                run([sys.executable, script, *mesh, "--data", str(options.data), "--out", str(options.out / "profile")])
            case "run":
                print((rehearsal.jax("run", PRESETS["sub3min"].steps) / "log.txt").read_text().splitlines()[-1])
    return 0 if good else 1


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), rehearse, arguments)
