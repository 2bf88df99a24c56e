"""What compare.py does, given its options: measure speed, compare values, or train both."""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any, get_args

from ...config import KERNELS, PRESETS, Config
from ...data.batches import TINY_DATA
from ...errors import UsageError
from ...kernels.block_mask import BLOCK_SIZE, visible_pairs
from ...kernels.implementation import Implementation
from .. import significance
from ..layout import print_table
from ..windows import step_with_window
from . import parity, report, turns
from .turns import Launcher
from .worker import SAMPLES, WINDOWS, load_arrays

VALIDATION_SEQUENCES = 16


def compare(options: argparse.Namespace) -> int:
    """Do what the options ask for, and return the exit code: 1 if parity fails.

    Raises:
      UsageError: for options, data or an environment that will not do; nothing is written then.
    """
    for option in ("rounds", "samples", "curve_steps"):
        number = getattr(options, option)
        if number is not None and number < 1:
            raise UsageError(f"--{option.replace('_', '-')} must be at least 1, got {number}")
    out: Path = options.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-compare"
    launch = Launcher({"jax": options.jax_python, "torch": options.torch_python}, out / "work")
    launch.require_torch()
    if options.train:
        return train(options, launch, out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out {out}: there already; name another folder")

    preset = options.preset or _preset_of_this_machine(options.jax_python)
    config = _config(options, preset)
    windows = _windows(options.windows or list(WINDOWS[preset]), config)
    source = turns.write_inputs(
        launch.folder / "inputs.npz",
        config,
        options.data or TINY_DATA,
        max(options.curve_steps, *parity.SNAPSHOTS) if options.parity else 1,
        cut=options.data is None,
        validation=VALIDATION_SEQUENCES if options.parity else 0,
    )
    description = f"{preset}, {config.sequence_length:,} tokens a step, text: {source}"
    try:
        if options.parity:
            return compare_values(options, launch, config, windows[-1], out, description)
        return speed(options, launch, config, windows, out, description)
    finally:
        shutil.rmtree(launch.folder / "cache", ignore_errors=True)
        (launch.folder / "inputs.npz").unlink(missing_ok=True)


def _preset_of_this_machine(jax_python: str) -> str:
    """Return `eighth` where JAX finds a GPU, else `tiny`."""
    try:
        turns.count_gpus(jax_python)
    except UsageError:
        print("preset tiny, since JAX finds no GPU here (--preset eighth is for one)", flush=True)
        return "tiny"
    return "eighth"


def _windows(windows: list[int], config: Config) -> list[dict[str, int]]:
    """Return what `worker.measure` wants of windows in tokens, in order of size.

    Raises:
      UsageError: for one that the run never has.
    """
    return [
        {"tokens": tokens, "blocks": tokens // BLOCK_SIZE, "step": step_with_window("--windows", tokens, config)}
        for tokens in sorted(windows)
    ]


def _config(options: argparse.Namespace, name: str) -> Config:
    # Whether it runs here is for the worker to say: asking would start JAX's GPU in this process.
    if options.attention not in get_args(Implementation):
        raise UsageError(f"--attention {options.attention}: choose one of {', '.join(get_args(Implementation))}")
    if options.kernels not in KERNELS:
        raise UsageError(f"--kernels {options.kernels}: choose one of {', '.join(KERNELS)}")
    preset = PRESETS[name]
    return dataclasses.replace(
        preset,
        sequences=1,  # a step of either framework here, whatever the preset's batch
        sequence_length=preset.sequence_length if options.sequence_length is None else options.sequence_length,
        attention=options.attention,
        kernels=options.kernels,
    )


def speed(
    options: argparse.Namespace,
    launch: Launcher,
    config: Config,
    windows: list[dict[str, int]],
    out: Path,
    description: str,
) -> int:
    """Measure in turns; write compare.json and compare.png after every round, print the table at the end."""
    work: dict[str, Any] = {
        "inputs": str(launch.folder / "inputs.npz"),
        "parts": options.parts,
        "windows": windows,
        "samples": options.samples or SAMPLES[config.preset],
        "sample_seconds": turns.SAMPLE_SECONDS,
    }
    jobs = {"jax": config, "xla": dataclasses.replace(config, attention="xla", kernels="xla"), "torch": config}
    if not options.xla:
        del jobs["xla"]
    tokens_T = load_arrays(launch.folder / "inputs.npz")["tokens"][0]
    attention_flops = {
        w["tokens"]: config.model.attention_flops(*visible_pairs(tokens_T, w["blocks"])) for w in windows
    }
    rounds, summary = 0, {}
    try:
        made = {side: turns.make_job(of_side, "measure", **work) for side, of_side in jobs.items()}
        for results in turns.measure_in_turns(launch, made, options.rounds):
            rounds += 1
            summary = report.summarize(results, config.tokens_per_step, config.matmul_flops, attention_flops)
            _write_json(out / "compare.json", {"description": description, **summary, "results": results})
            report.draw(summary, out / "compare.png", description)
    finally:  # also when interrupted, or when a later round fails
        if rounds:
            told = description if rounds == options.rounds else f"{description}; {rounds} of {options.rounds} rounds"
            written = f"written: {out / 'compare.json'}, {out / 'compare.png'}"
            print_table(report.table(summary, told), *report.warnings(summary), *report.notes(summary), written)
    return 0


def compare_values(
    options: argparse.Namespace, launch: Launcher, config: Config, window: dict[str, int], out: Path, description: str
) -> int:
    """Compare values; print the table, write parity.json and parity.png."""
    lines, results = parity.run_parity(
        launch, config, launch.folder, window=window["blocks"], curve_steps=options.curve_steps
    )
    _write_json(out / "parity.json", {"description": description, **parity.to_json(lines, results)})
    parity.draw(results, out / "parity.png", description)
    failed = sum(not line.passed for line in lines)
    fallbacks = [line for side in ("jax", "torch") for line in results[side]["fallbacks"]]
    verdict = f"{len(lines)} quantities, {failed} beyond their tolerance"
    written = f"written: {out / 'parity.json'}, {out / 'parity.png'}"
    title = f"{description}; gradients at a window of {window['tokens']} tokens"
    print_table(parity.table(lines, title), parity.headline(results), *fallbacks, verdict, written)
    return 1 if failed else 0


def train(options: argparse.Namespace, launch: Launcher, out: Path) -> int:
    """Train whole runs in turns; print their statistics, write curves.png."""
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
