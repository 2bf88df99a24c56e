"""Train the recipe in PyTorch, on one GPU or on all that torchrun starts a process for.

    python scripts/reference_torch.py --data DIR --out DIR
    torchrun --nproc-per-node 8 scripts/reference_torch.py --sequences 8 --data DIR --out DIR

The recipe itself is in jax_speedrun/tools/comparison/reference_torch.py. Needs PyTorch: pip install -e '.[torch]'.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..command import make_parser, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from .reference_torch import Training

SEQUENCE_LENGTH = 65536
VALIDATION_TOKENS = 10_485_760
VALIDATION_EVERY = 125


def parser() -> argparse.ArgumentParser:
    p = make_parser("reference_torch.py", __doc__)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of token shards")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    p.add_argument("--steps", type=int, default=1385, metavar="N", help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the initial weights (default: %(default)s)")
    p.add_argument(
        "--sequences", type=int, default=1, metavar="N", help="a step, over all processes (default: %(default)s)"
    )
    p.add_argument("--epochs", type=int, default=1, metavar="N", help="through the data (default: %(default)s)")
    p.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile (default), or eagerly"
    )
    return p


def run(options: argparse.Namespace) -> int:
    if options.steps < 1:
        raise UsageError(f"--steps must be at least 1, got {options.steps}")
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UsageError("PyTorch is not installed; run: pip install -e '.[torch]'") from error
    from torch import distributed

    from . import reference_torch as reference

    if not torch.cuda.is_available():
        raise UsageError("no NVIDIA GPU that PyTorch can use; compare.py --preset tiny runs on a CPU")
    if "WORLD_SIZE" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl")
    try:
        processes = reference.processes()
        if options.sequences < 1 or options.sequences % processes:
            raise UsageError(f"--sequences {options.sequences}: must be a multiple of the {processes} process(es)")
        device = torch.device("cuda", torch.cuda.current_device())
        model = reference.ModelConfig()
        if not reference.fp8_supported(device):
            print(f"{torch.cuda.get_device_name(device)} has no FP8: the head's matmuls run in bfloat16", flush=True)
            model = dataclasses.replace(model, head_precision="bfloat16")
        training = reference.Training(
            model, reference.OptimizerConfig(), options.steps, seed=options.seed, device=device, compile=options.compile
        )
        train(training, options)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


class PendingLoss:
    """A loss on its way to the host: reading it waits for its own step, not for those dispatched since."""

    def __init__(self, step: int, loss: "Tensor"):
        self.step = step
        self._loss = loss.to("cpu", non_blocking=True)
        self._arrived = None
        if loss.is_cuda:
            import torch

            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._loss.item()


def train(training: "Training", options: argparse.Namespace) -> None:
    """Train and write the run's folder, with validation every 125 steps and at the end."""
    # RunLog records JAX's devices as well; on the CPU it leaves the GPU's memory to PyTorch.
    import jax
    import torch
    from torch import distributed

    jax.config.update("jax_platforms", "cpu")
    from ...data.batches import TokenBatches, find_shards, prefetch, validation_sequences
    from ...data.fingerprint import fingerprint
    from ...run.log import RunLog

    on_gpu = training.device.type == "cuda"
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    shards = find_shards(options.data, "train")
    rows = _own_rows(rank, options.sequences)
    batches = TokenBatches(shards, options.sequences, SEQUENCE_LENGTH, epochs=options.epochs, rows=rows)
    batches.require_steps(training.steps)
    held_out = validation_sequences(find_shards(options.data, "val"), SEQUENCE_LENGTH, VALIDATION_TOKENS)
    validation = tuple(torch.from_numpy(x).to(training.device) for x in held_out)

    def place(batch: tuple) -> list["Tensor"]:
        arrays = [torch.from_numpy(x) for x in batch]
        return [(x.pin_memory() if on_gpu else x).to(training.device, non_blocking=True) for x in arrays]

    placed = prefetch(batches, place)
    with contextlib.ExitStack() as stack:
        stack.callback(placed.close)
        log = None
        if rank == 0:
            config, tokens = _describe(training, options), options.sequences * SEQUENCE_LENGTH
            log = stack.enter_context(
                RunLog(
                    options.out,
                    steps=training.steps,
                    tokens_per_step=tokens,
                    config=config,
                    data=fingerprint(options.data),
                )
            )
        _loop(training, (batch for _, batch in placed), validation, Report(training, log))
    if on_gpu and rank == 0:
        print(f"peak memory: {torch.cuda.max_memory_allocated(training.device) / 2**30:.1f} GiB", flush=True)


def _own_rows(rank: int, sequences: int) -> range:
    """Return the sequences of a step that are this process's."""
    from .reference_torch import processes

    share = sequences // processes()
    return range(rank * share, (rank + 1) * share)


def _describe(training: "Training", options: argparse.Namespace) -> dict[str, object]:
    """Return what config.json says of the run."""
    import torch

    from .reference_torch import processes

    name = torch.cuda.get_device_name(training.device) if training.device.type == "cuda" else "CPU"
    return {
        "framework": f"torch {torch.__version__} on {processes()} x {name}",
        "model": dataclasses.asdict(training.config),
        "optimizer": dataclasses.asdict(training.rates),
        "steps": training.steps,
        "sequences": options.sequences,
        "sequence_length": SEQUENCE_LENGTH,
        "seed": options.seed,
    }


class Report:
    """The log's lines, by the record's clock; `log` is None in all processes but the first."""

    def __init__(self, training: "Training", log: Any):
        from ...run.log import StepClock

        self.training, self.log, self.clock = training, log, StepClock()

    def step(self, pending: PendingLoss) -> None:
        """Wait for a step and write its line; a loss that is not finite ends the process."""
        training, step, loss = self.training, pending.step, pending.wait()
        if not math.isfinite(loss):
            sys.exit(f"reference_torch.py: error: the loss of step {step + 1}/{training.steps} is {loss}; stopped")
        ms = self.clock.tick()
        if self.log is not None:
            self.log.train_step(
                step + 1,
                loss=loss,
                lr=training.muon_rate(step),
                window=training.window_tokens(step),
                ms=ms,
                **self._times(),
            )

    def validation(self, step: int, val_loss: float) -> None:
        if self.log is not None:
            self.log.validation(step, val_loss=val_loss, **self._times())

    def _times(self) -> dict[str, float]:
        return {"train_time_ms": self.clock.elapsed_ms, "step_avg_ms": self.clock.step_avg_ms}


def _loop(
    training: "Training", batches: Iterator[list["Tensor"]], validation: tuple["Tensor", ...], report: Report
) -> None:
    """Make all steps; while one runs, the loss of the one before is reported."""
    pending: PendingLoss | None = None
    for step in range(training.steps + 1):
        if step == training.steps or step % VALIDATION_EVERY == 0:
            _synchronize(training)  # a loss is known before its step has ended
            if pending is not None:
                report.step(pending)
                pending = None
            report.clock.pause()
            report.validation(step, training.evaluate(*validation, step))
        if step == training.steps:
            break
        report.clock.resume()
        tokens_NT, targets_NT = next(batches)
        loss = training.step(tokens_NT, targets_NT, step)
        if pending is not None:
            report.step(pending)
        pending = PendingLoss(step, loss)


def _synchronize(training: "Training") -> None:
    if training.device.type == "cuda":
        import torch

        torch.cuda.synchronize(training.device)


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), run, arguments)
