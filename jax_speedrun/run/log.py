"""A run's folder (log.txt, metrics.jsonl, config.json, loss.png), and the clock as the record's rules have it."""

import contextlib
import gc
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self, TypedDict

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..atomic_write import atomic_write
from ..errors import UsageError, system_reason
from .environment import environment

UNTIMED_STEPS = 10
LOG, METRICS, DESCRIPTION, PLOT = "log.txt", "metrics.jsonl", "config.json", "loss.png"
METRIC_NAMES = ("loss", "val_loss", "lr", "window", "ms", "tokens_per_s", "mfu")
_LOG_LINE = re.compile(
    r"(resumed|step):(?P<step>\d+)/(?P<steps>\d+)"
    r"(?:(?P<val> val_loss:\S+)? train_time:\d+ms step_avg:(?:\d+\.\d+|nan)ms)?"
)

type Record = dict[str, Any]
"""A line of metrics.jsonl: `step`, and the `METRIC_NAMES`, null where there is no (finite) value."""


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

    * `log.txt`: the record's lines, for its own evidence command and scripts/significance.py.
    * `metrics.jsonl`: one object a step with step, loss, val_loss, lr, window, ms,
      tokens_per_s and mfu; null where there is no (finite) value.
    * `config.json`: configuration, data, versions, devices and git commit at the start.
    * `loss.png`: drawn again at each validation after the first step.

    Every line is flushed at once. A step's number is how many are done: 1 after the first.
    What cannot be written any more, such as on a full disk, raises UsageError; but not for
    loss.png, without which a run goes on.

    Args:
      directory: the folder, made if missing.
      steps: of the whole run.
      tokens_per_step: over all devices.
      config: the resolved configuration, as JSON values.
      data: the data's fingerprint.
      resume_step: the step of the checkpoint from which a run goes on. What the
        folder says of later steps, which a killed run did after it, goes; so do
        lines that cannot be read, of which stderr then has a line.
      replace: let what an unfinished run without a checkpoint has left in the folder go.
      console: where progress is shown; unless it is a terminal, as a plain line at each validation.

    Raises:
      UsageError: the folder cannot be written, or holds a run and neither resume_step nor replace allows for it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        steps: int,
        tokens_per_step: int,
        config: Mapping[str, object],
        data: Mapping[str, object],
        resume_step: int | None = None,
        replace: bool = False,
        console: Console | None = None,
    ) -> None:
        self._directory, self._steps, self._tokens_per_step = directory, steps, tokens_per_step
        log, metrics, description = (directory / name for name in (LOG, METRICS, DESCRIPTION))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                _make_room(directory, replace)
            if not description.exists():
                text = json.dumps({"config": config, "data": data, **environment()}, indent=2) + "\n"
                atomic_write(description, lambda path: path.write_text(text, encoding="utf-8"))
            lines = _log_lines_until(log, resume_step or 0)
            self._log = _reopen(log, [f"{line}\n".encode() for line in lines])
            self._validations_logged = {
                int(m["step"]) for line in lines if (m := _LOG_LINE.fullmatch(line)) and m["val"]
            }
            history = _records_until(metrics, resume_step or 0)
            encoded = [_encode(record) for record in history]
            self._metrics = _reopen(metrics, encoded)
        except OSError as error:
            raise UsageError(
                f"--out {directory}: cannot write there ({system_reason(error)}); name another folder"
            ) from error
        self._record_start = self._metrics.tell() - len(encoded[-1]) if encoded else 0
        self._record = history[-1] if history else {}
        self._losses, self._val_losses = (
            {int(record["step"]): value for record in history if (value := record[name]) is not None}
            for name in ("loss", "val_loss")
        )
        if resume_step is not None:
            self._write_log(f"resumed:{resume_step}/{steps}")
        self._drawable = True
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
        time_spent = f"train_time:{train_time_ms:.0f}ms step_avg:{step_avg_ms:.2f}ms"
        line = f"step:{step}/{self._steps} val_loss:{val_loss:.4f} {time_spent}"
        if step not in self._validations_logged:
            self._write_log(line)
        if step in self._val_losses:
            return
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
        if not self._drawable:
            return
        path = self._directory / PLOT
        try:
            draw_losses(path, self._losses, self._val_losses)
        except Exception as error:  # a picture is worth no run, whatever Matplotlib finds missing
            self._drawable = False
            reason = system_reason(error) if isinstance(error, OSError) else str(error)
            print(f"{path}: cannot be drawn ({reason}); the run goes on without it", file=sys.stderr)
        # A figure is a web of cycles: left alone, those of some thirty validations wait for Python's collector.
        gc.collect()

    def _write_log(self, line: str) -> None:
        with self._writing(LOG):
            self._log.write(line.encode() + b"\n")
            self._log.flush()

    def _write_metrics(self, step: int, **values: float | None) -> None:
        if self._record.get("step") == step:
            # A step's validation joins its training values, so that each step has one object.
            self._metrics.seek(self._record_start)
        else:
            self._record_start = self._metrics.tell()
            self._record = {"step": step, **dict.fromkeys(METRIC_NAMES)}
        # JSON has no nan.
        self._record |= {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        with self._writing(METRICS):
            self._metrics.write(_encode(self._record))
            self._metrics.truncate()
            self._metrics.flush()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        path = self._directory / name
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written ({error.strerror or error}); make room and --resume {self._directory}"
            ) from error


def draw_losses(path: Path, losses: Mapping[int, float], val_losses: Mapping[int, float]) -> None:
    """Draw training losses (each, and smoothed) and validation losses over steps, as PNG; whole or not at all."""
    from matplotlib.figure import Figure  # no run has to wait for it, or to fail with it

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


def _make_room(directory: Path, replace: bool) -> None:
    """Delete what a run without a checkpoint has left, if `replace`; raise UsageError where a run must not begin."""
    left = [directory / name for name in (LOG, METRICS, DESCRIPTION, PLOT)]
    if not any(os.path.lexists(path) for path in (*left, directory / "checkpoints")):
        return
    if not replace:
        raise UsageError(
            f"--out {directory}: holds a run already; name another folder, or go on with it: --out {directory} "
            "--auto-resume"
        )
    if any(map(_is_end, _log_lines_until(directory / LOG, None))):
        raise UsageError(f"--out {directory}: holds a finished run without a checkpoint; name another folder")
    for path in left:
        path.unlink(missing_ok=True)


def _reopen(path: Path, lines: list[bytes]) -> BinaryIO:
    """Open a file that holds these lines and nothing else, to write on behind them."""
    if not path.exists() or path.read_bytes() != b"".join(lines):
        atomic_write(path, lambda partial: partial.write_bytes(b"".join(lines)))
    file = path.open("r+b")
    file.seek(0, os.SEEK_END)
    return file


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _is_end(line: str) -> bool:
    """Return whether a line of log.txt is the last of a whole run."""
    match = _LOG_LINE.fullmatch(line)
    return match is not None and bool(match["val"]) and match["step"] == match["steps"]


def _log_lines_until(path: Path, step: int | None) -> list[str]:
    """Return the lines of log.txt up to `step` (None: all), each step's once, without those that are damaged."""
    kept: list[str] = []
    seen: set[tuple[str, bool]] = set()
    damaged = 0
    for line in _read(path).splitlines():
        match = _LOG_LINE.fullmatch(line)
        if match is None:
            damaged += bool(line.strip())
            continue
        key = match["step"], bool(match["val"])
        repeated = key in seen and match[1] == "step"
        if (step is None or int(match["step"]) <= step) and not repeated:
            seen |= {key} if match[1] == "step" else set()
            kept.append(line)
    _tell(path, damaged)
    return kept


def _records_until(path: Path, step: int) -> list[Record]:
    """Return the records of metrics.jsonl up to `step` in order, one a step, without what is damaged.

    Objects count, not lines: some program may have written the file in another form.
    """
    text, at, damaged = _read(path), 0, 0
    records: dict[int, Record] = {}
    decoder = json.JSONDecoder()
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            found, at = decoder.raw_decode(text, at)
            record = _checked(found)
        except (ValueError, RecursionError):
            record, at = None, text.find("\n", at) + 1 or len(text)
        if record is None:
            damaged += 1
        elif record["step"] <= step:
            earlier = records.setdefault(record["step"], record)
            for name in METRIC_NAMES:
                earlier[name] = record[name] if earlier[name] is None else earlier[name]
    _tell(path, damaged)
    return [records[number] for number in sorted(records)]


def _checked(found: object) -> Record | None:
    """Return a record as `train_step` writes it, None if this is not one."""
    if not isinstance(found, dict) or type(found.get("step")) is not int or found["step"] < 0:
        return None
    values = {name: found.get(name) for name in METRIC_NAMES}
    for value in values.values():
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            return None
    return {"step": found["step"], **values}


def _encode(record: Record) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _tell(path: Path, damaged: int) -> None:
    if damaged:
        print(f"{path}: {damaged} damaged line(s) left out", file=sys.stderr)
