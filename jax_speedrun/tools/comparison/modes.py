"""What compare.py does, given its options: measure speed, compare values, or train both."""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from ...config import KERNELS, PRESETS, Config
from ...data.batches import TINY_DATA
from ...errors import UsageError
from ...kernels.block_mask import visible_pairs
from ...kernels.implementation import Implementation
from ...schedules import step_of_window
from .. import significance
from . import parity, report, turns
from .turns import Launcher
from .worker import WINDOWS, load_arrays

VALIDATION_SEQUENCES = 16


def compare(options: argparse.Namespace) -> int:
    """Do what the options ask for, and return the exit code: 1 if parity fails.

    Raises:
      UsageError: for options, data or an environment that will not do; nothing is written then.
    """
    for option in ("rounds", "samples", "curve_steps"):
        if getattr(options, option) < 1:
            raise UsageError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(options, option)}")
    out: Path = options.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-compare"
    launch = Launcher({"jax": options.jax_python, "torch": options.torch_python}, out / "work")
    launch.require_torch()
    if options.train:
        return train(options, launch, out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out {out}: there already; name another folder")

    config = _config(options)
    windows = options.windows or list(WINDOWS[options.preset])
    for window in windows:
        try:
            step_of_window(window, config.steps, config.optimizer.window_tokens)
        except ValueError as error:
            raise UsageError(f"--windows {window}: {error}") from None
    source = turns.write_inputs(
        launch.folder / "inputs.npz",
        config,
        options.data or TINY_DATA,
        max(options.curve_steps, *parity.SNAPSHOTS) if options.parity else 1,
        cut=options.data is None,
        validation=VALIDATION_SEQUENCES if options.parity else 0,
    )
    description = f"{options.preset}, {config.sequence_length:,} tokens a step, text: {source}"
    try:
        if options.parity:
            return compare_values(options, launch, config, max(windows), out, description)
        return speed(options, launch, config, windows, out, description)
    finally:
        shutil.rmtree(launch.folder / "cache", ignore_errors=True)
        (launch.folder / "inputs.npz").unlink(missing_ok=True)


def _config(options: argparse.Namespace) -> Config:
    # Whether it runs here is for the worker to say: asking would start JAX's GPU in this process.
    if options.attention not in get_args(Implementation):
        raise UsageError(f"--attention {options.attention}: choose one of {', '.join(get_args(Implementation))}")
    if options.kernels not in KERNELS:
        raise UsageError(f"--kernels {options.kernels}: choose one of {', '.join(KERNELS)}")
    preset = PRESETS[options.preset]
    return dataclasses.replace(
        preset,
        sequences=1,  # a step of either framework here, whatever the preset's batch
        sequence_length=preset.sequence_length if options.sequence_length is None else options.sequence_length,
        attention=options.attention,
        kernels=options.kernels,
    )


def speed(
    options: argparse.Namespace, launch: Launcher, config: Config, windows: list[int], out: Path, description: str
) -> int:
    """Measure in turns; write compare.json and compare.png after every round, print the table at the end."""
    job = turns.make_job(
        config,
        "measure",
        inputs=str(launch.folder / "inputs.npz"),
        parts=options.parts,
        windows=windows,
        window_steps={w: step_of_window(w, config.steps, config.optimizer.window_tokens) for w in windows},
        samples=options.samples,
        sample_seconds=turns.SAMPLE_SECONDS,
    )
    tokens_T = load_arrays(launch.folder / "inputs.npz")["tokens"][0]
    attention_flops = {w: config.model.attention_flops(*visible_pairs(tokens_T, w)) for w in windows}
    rounds, summary = 0, {}
    try:
        for results in turns.measure_in_turns(launch, job, options.rounds):
            rounds += 1
            summary = report.summarize(results, config.tokens_per_step, config.matmul_flops, attention_flops)
            _write_json(out / "compare.json", {"description": description, **summary, "results": results})
            device = summary["frameworks"]["torch"]["device"]
            report.draw(summary, out / "compare.png", f"JAX and PyTorch on {device}\n{description}")
    finally:  # also when interrupted, or when a later round fails
        if rounds:
            told = description if rounds == options.rounds else f"{description}; {rounds} of {options.rounds} rounds"
            written = f"written: {out / 'compare.json'}, {out / 'compare.png'}"
            _print(report.table(summary, told), *report.notes(summary), written)
    return 0


def compare_values(
    options: argparse.Namespace, launch: Launcher, config: Config, window: int, out: Path, description: str
) -> int:
    """Compare values; print the table, write parity.json and parity.png."""
    lines, results = parity.run_parity(launch, config, launch.folder, window=window, curve_steps=options.curve_steps)
    _write_json(out / "parity.json", {"description": description, **parity.to_json(lines, results)})
    parity.draw(results, out / "parity.png", description)
    failed = sum(not line.passed for line in lines)
    fallbacks = [line for side in ("jax", "torch") for line in results[side]["fallbacks"]]
    verdict = f"{len(lines)} quantities, {failed} beyond their tolerance"
    written = f"written: {out / 'parity.json'}, {out / 'parity.png'}"
    _print(parity.table(lines, f"{description}; gradients at window {window}"), *fallbacks, verdict, written)
    return 1 if failed else 0


def train(options: argparse.Namespace, launch: Launcher, out: Path) -> int:
    """Whole runs in turns; print their statistics, write curves.png."""
    if options.data is None:
        raise UsageError("--train needs --data: 91 M tokens for a whole run; scripts/prepare_data.py makes shards")
    runs = turns.train_in_turns(launch.interpreters, options.data, out, options.seeds, options.steps)
    jax_runs, torch_runs = (significance.read_runs(runs[framework]) for framework in turns.FRAMEWORKS)
    print("runs: JAX; versus: PyTorch")
    print(significance.report(jax_runs, torch_runs))
    significance.draw({"JAX": jax_runs, "PyTorch": torch_runs}, out / "curves.png")
    print(f"written: {out / 'curves.png'}")
    return 0


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _print(table: Table, *lines: str) -> None:
    # A pipe or a file has no width of its own, and 80 columns would break the table.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
