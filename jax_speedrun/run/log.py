"""A run's folder (log.txt, metrics.jsonl, config.json, loss.png), and the clock as the record's rules have it."""

import contextlib
import gc
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Self, TypedDict

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..atomic_write import atomic_write
from ..errors import UsageError
from .environment import environment

UNTIMED_STEPS = 10
_STEP_OF_LINE = re.compile(rb'(?:step:|resumed:|{"step": )(\d+)')


class ClockState(TypedDict):
    elapsed_ms: float
    steps_counted: int


class StepClock:
    """Training time by the record's rule: neither validation nor the first 10 steps count.

    Those ten pay for compilation. A resumed run, `StepClock(**saved.state())`,
    compiles again and leaves out ten more, from the time and from the number of steps.

    Call `resume()` before the first step and after each pause, `tick()` when a
    step has really finished (its result was waited for), and `pause()` before
    whatever should not count. Starts paused.
    """

    def __init__(
        self, elapsed_ms: float = 0.0, steps_counted: int = 0, *, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.elapsed_ms = elapsed_ms
        self.steps_counted = steps_counted
        self._untimed = UNTIMED_STEPS
        self._now = now
        self._running_since: float | None = None
        self._step_ms = 0.0

    @property
    def step_avg_ms(self) -> float:
        """Return milliseconds a step over all that count; nan before the first of them."""
        return self.elapsed_ms / self.steps_counted if self.steps_counted else math.nan

    def state(self) -> ClockState:
        """Return what a checkpoint has to keep."""
        return {"elapsed_ms": self.elapsed_ms, "steps_counted": self.steps_counted}

    def resume(self) -> None:
        if self._running_since is None:
            self._running_since = self._now()

    def pause(self) -> None:
        if self._running_since is not None:
            self._step_ms += 1000 * (self._now() - self._running_since)
            self._running_since = None

    def tick(self) -> float:
        """End a step. Returns its milliseconds without pauses, whether it counts or not."""
        if self._running_since is None:
            raise RuntimeError("tick() on a paused StepClock; call resume() first")
        now = self._now()
        step_ms = self._step_ms + 1000 * (now - self._running_since)
        self._step_ms, self._running_since = 0.0, now
        if self._untimed:
            self._untimed -= 1
        else:
            self.elapsed_ms += step_ms
            self.steps_counted += 1
        return step_ms


class RunLog:
    """Writes a run's folder and shows its progress. A context manager; one process of a run has one.

    * `log.txt`: the record's lines, for its own evidence command and scripts/evidence.py.
    * `metrics.jsonl`: one object a step with step, loss, val_loss, lr, window, ms,
      tokens_per_s and mfu; null where there is no (finite) value.
    * `config.json`: configuration, versions, devices and git commit at the start.
    * `loss.png`: drawn again at each validation after the first step.

    Every line is flushed at once. A step's number is how many are done: 1 after the first.
    What cannot be written any more, such as on a full disk, raises UsageError.

    Args:
      directory: the folder, made if missing.
      steps: of the whole run.
      tokens_per_step: over all devices.
      config: the resolved configuration, as JSON values.
      resume_step: the step of the checkpoint from which a run goes on. What the
        folder says of later steps, which a killed run did after it, is cut off.
      console: where progress is shown; unless it is a terminal, as a plain line at each validation.

    Raises:
      UsageError: the folder cannot be written, or holds a run and `resume_step` is None.
    """

    def __init__(
        self,
        directory: Path,
        *,
        steps: int,
        tokens_per_step: int,
        config: Mapping[str, object],
        resume_step: int | None = None,
        console: Console | None = None,
    ) -> None:
        self._directory, self._steps, self._tokens_per_step = directory, steps, tokens_per_step
        log, metrics, description = (directory / name for name in ("log.txt", "metrics.jsonl", "config.json"))
        of_a_run = (log, metrics, description, directory / "checkpoints")
        if resume_step is None and any(os.path.lexists(path) for path in of_a_run):
            raise UsageError(f"--out {directory}: holds a run already; name another folder, or --resume {directory}")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not description.exists():
                text = json.dumps({"config": config, **environment()}, indent=2) + "\n"
                atomic_write(description, lambda path: path.write_text(text, encoding="utf-8"))
            self._log, _ = _open_after(log, resume_step or 0)
            self._metrics, records = _open_after(metrics, resume_step or 0)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"--out {directory}: cannot write there ({reason}); name another folder") from error
        self._record_start = self._metrics.tell() - len(records[-1]) if records else 0
        history: list[dict[str, float | None]] = [json.loads(line) for line in records]
        self._record = history[-1] if history else {}
        self._losses, self._val_losses = (
            {int(record["step"] or 0): value for record in history if (value := record[name]) is not None}
            for name in ("loss", "val_loss")
        )
        if resume_step is not None:
            self._write_log(f"resumed:{resume_step}/{steps}")
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[rates]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console or Console(),
        )
        self._task = self._progress.add_task("train", total=steps, completed=resume_step or 0, rates="compiling")
        if self._progress.console.is_interactive:
            self._progress.start()

    def train_step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        window: int,
        ms: float,
        train_time_ms: float,
        step_avg_ms: float,
        mfu: float | None = None,
    ) -> None:
        """Record step number `step`.

        Args:
          loss: of the batch, before the step changed the weights.
          lr: Muon's learning rate; the others move in step with it.
          window: the long attention window, in tokens.
          ms: what the step took, as `StepClock.tick` says.
          train_time_ms, step_avg_ms: the clock's, this step included.
          mfu: model FLOP/s, without attention's, over the peak of all devices, 0 to 1.
        """
        tokens_per_s = 1000 * self._tokens_per_step / ms
        self._write_log(f"step:{step}/{self._steps} train_time:{train_time_ms:.0f}ms step_avg:{step_avg_ms:.2f}ms")
        self._write_metrics(step, loss=loss, lr=lr, window=window, ms=ms, tokens_per_s=tokens_per_s, mfu=mfu)
        if math.isfinite(loss):
            self._losses[step] = loss
        rates = f"loss {loss:.4f}  {ms:,.1f} ms/step  {tokens_per_s:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, rates=rates)

    def validation(self, step: int, *, val_loss: float, train_time_ms: float, step_avg_ms: float) -> None:
        """Record the validation loss after step number `step` (0: before the first), and draws loss.png.

        A resumed run may validate the step it starts from again: the folder keeps the first answer.
        """
        if step in self._val_losses:
            return
        time_spent = f"train_time:{train_time_ms:.0f}ms step_avg:{step_avg_ms:.2f}ms"
        line = f"step:{step}/{self._steps} val_loss:{val_loss:.4f} {time_spent}"
        self._write_log(line)
        self._write_metrics(step, val_loss=val_loss)
        self._val_losses[step] = val_loss
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if step > 0:  # one point is no curve, and the first figure takes a second of the start
            self._draw()

    def close(self) -> None:
        # Stopping what was never started prints an empty line.
        if self._progress.console.is_interactive:
            self._progress.stop()
        for file in (self._log, self._metrics):
            # Every line was flushed, or its failure told; closing would tell it again.
            with contextlib.suppress(OSError):
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self) -> None:
        with self._writing("loss.png") as path:
            draw_losses(path, self._losses, self._val_losses)
        # A figure is a web of cycles: left alone, those of some thirty validations wait for Python's collector.
        gc.collect()

    def _write_log(self, line: str) -> None:
        with self._writing("log.txt"):
            self._log.write(line.encode() + b"\n")
            self._log.flush()

    def _write_metrics(self, step: int, **values: float | None) -> None:
        if self._record.get("step") == step:
            # A step's validation joins its training values, so that each step has one object.
            self._metrics.seek(self._record_start)
        else:
            self._record_start = self._metrics.tell()
            names = ("loss", "val_loss", "lr", "window", "ms", "tokens_per_s", "mfu")
            self._record = {"step": step, **dict.fromkeys(names)}
        # JSON has no nan.
        self._record |= {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        with self._writing("metrics.jsonl"):
            self._metrics.write(json.dumps(self._record, allow_nan=False).encode() + b"\n")
            self._metrics.truncate()
            self._metrics.flush()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        path = self._directory / name
        try:
            yield path
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written ({error.strerror or error}); make room and --resume {self._directory}"
            ) from error


def draw_losses(path: Path, losses: Mapping[int, float], val_losses: Mapping[int, float]) -> None:
    """Draw training losses (each, and smoothed) and validation losses over steps, as PNG; whole or not at all."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps, raw = list(losses), list(losses.values())
    axes.plot(steps, raw, color="tab:blue", alpha=0.3, linewidth=0.8, label="training")
    axes.plot(steps, _smoothed(raw), color="tab:blue", linewidth=1.5, label="training, smoothed")
    points = list(val_losses.values())
    label = f"validation, last {points[-1]:.4f}" if points else "validation"
    axes.plot(list(val_losses), points, "o-", color="tab:orange", markersize=4, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(path, lambda partial: figure.savefig(partial, format="png"))


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Return the mean of each value and as many neighbours on either side; unlike one of the past it does not lag."""
    count = len(values)
    index = np.arange(count)
    reach = np.minimum(count // 40, np.minimum(index, count - 1 - index))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _open_after(path: Path, step: int) -> tuple[BinaryIO, list[bytes]]:
    """Open a file of lines to go on after `step`: cut off the first later line and all behind it, return the rest."""
    path.touch()
    file = path.open("r+b")
    kept: list[bytes] = []
    for line in file:
        match = _STEP_OF_LINE.match(line)
        if not line.endswith(b"\n") or (match and int(match[1]) > step):
            break
        kept.append(line)
    file.seek(sum(map(len, kept)))
    file.truncate()
    return file, kept
