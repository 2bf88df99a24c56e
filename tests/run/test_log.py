"""The run's folder and the clock, read back the way a user or the record's own evidence command would."""

import dataclasses
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jax_speedrun.errors import UsageError
from jax_speedrun.run import log as runlog
from jax_speedrun.run.log import RunLog, StepClock
from tests.marks import slow

STEPS = 20
TOKENS = 1024
DATA = {"folder": "/data", "shards": {}}


def open_log(
    directory: Path, resume_step: int | None = None, console: Console | None = None, replace: bool = False
) -> RunLog:
    return RunLog(
        directory,
        steps=STEPS,
        tokens_per_step=TOKENS,
        config={"preset": "tiny", "sizes": [1, 2]},
        data=DATA,
        resume_step=resume_step,
        replace=replace,
        console=console or Console(file=io.StringIO()),
    )


def loss_at(step: int) -> float:
    return 11 - step / 4


def run_steps(log: RunLog, first: int, last: int, validate: tuple[int, ...] = ()) -> None:
    """What the training loop does: validate where due, then train, from `first` steps done to `last`."""
    for step in range(first, last + 1):
        timed = max(step - 10, 0)
        average = 130.0 if timed else math.nan
        if step > first:
            log.train_step(
                step, loss=loss_at(step), lr=0.05, window=128, ms=128.0, train_time_ms=130 * timed, step_avg_ms=average
            )
        if step in validate:
            log.validation(step, val_loss=loss_at(step) + 0.5, train_time_ms=130 * timed, step_avg_ms=average)


def records(directory: Path) -> list[dict[str, float | None]]:
    def no_constant(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant) for line in lines]


def test_log_lines_are_the_records(tmp_path: Path) -> None:
    with RunLog(
        tmp_path / "run", steps=1385, tokens_per_step=524288, config={}, data=DATA, console=Console(file=io.StringIO())
    ) as log:
        log.validation(0, val_loss=10.82582, train_time_ms=0.0, step_avg_ms=math.nan)
        log.train_step(1, loss=10.8, lr=0.05, window=128, ms=900.0, train_time_ms=0.0, step_avg_ms=math.nan)
        log.train_step(1385, loss=3.2, lr=0.005, window=1792, ms=130.0, train_time_ms=178711.6, step_avg_ms=129.9721)
        log.validation(1385, val_loss=3.27852, train_time_ms=178711.6, step_avg_ms=129.9721)
    assert (tmp_path / "run" / "log.txt").read_text().splitlines() == [
        "step:0/1385 val_loss:10.8258 train_time:0ms step_avg:nanms",
        "step:1/1385 train_time:0ms step_avg:nanms",
        "step:1385/1385 train_time:178712ms step_avg:129.97ms",
        "step:1385/1385 val_loss:3.2785 train_time:178712ms step_avg:129.97ms",
    ]


@pytest.mark.slow
def test_the_records_evidence_command_reads_the_logs(tmp_path: Path) -> None:
    for n, val_loss in enumerate((3.2785, 3.2799)):
        with RunLog(
            tmp_path / str(n), steps=1385, tokens_per_step=1, config={}, data=DATA, console=Console(file=io.StringIO())
        ) as log:
            log.validation(1385, val_loss=val_loss, train_time_ms=178712 + n, step_avg_ms=129.97)
        (tmp_path / str(n) / "log.txt").rename(tmp_path / f"{n}.txt")
    parse = (
        "import sys; lines = [line.split() for line in sys.stdin]; "
        "print([float(w.split('val_loss:')[1]) for l in lines for w in l if 'val_loss:' in w], "
        "[int(w.split('train_time:')[1][:-2]) for l in lines for w in l if 'train_time:' in w])"
    )
    command = f'grep "1385/1385 val" *.txt | {sys.executable} -c "{parse}"'
    said = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said == "[3.2785, 3.2799] [178712, 178713]\n"


def test_metrics_hold_one_object_a_step(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        run_steps(log, 0, 6, validate=(0, 3, 6))
    found = records(tmp_path)
    assert [record["step"] for record in found] == list(range(7))
    keys = ["step", "loss", "val_loss", "lr", "window", "ms", "tokens_per_s", "mfu"]
    assert all(list(record) == keys for record in found)
    assert found[0] == {**dict.fromkeys(keys), "step": 0, "val_loss": 11.5}
    assert found[2] == {
        **{"step": 2, "loss": 10.5, "val_loss": None, "lr": 0.05, "window": 128},
        **{"ms": 128.0, "tokens_per_s": 8000.0, "mfu": None},
    }
    assert (found[3]["loss"], found[3]["val_loss"]) == (10.25, 10.75)


def test_a_value_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.train_step(
            1, loss=math.nan, lr=0.1, window=128, ms=1.0, train_time_ms=0, step_avg_ms=math.nan, mfu=math.inf
        )
        log.validation(1, val_loss=5.0, train_time_ms=0, step_avg_ms=math.nan)
    (record,) = records(tmp_path)
    assert (record["loss"], record["mfu"], record["val_loss"]) == (None, None, 5.0)


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    """Whatever happens to the process afterwards: nothing is closed here before reading."""
    log = open_log(tmp_path)
    for step in range(1, 4):
        run_steps(log, step - 1, step, validate=(2,) if step == 2 else ())
        assert [record["step"] for record in records(tmp_path)] == list(range(1, step + 1))
        assert (tmp_path / "log.txt").read_text().count(" train_time") == step + (step >= 2)
    log.close()


def test_config_says_what_ran(tmp_path: Path) -> None:
    with open_log(tmp_path):
        pass
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["config"] == {"preset": "tiny", "sizes": [1, 2]}
    assert description["data"] == DATA
    assert description["versions"]["jax"] == jax.__version__
    assert description["versions"]["numpy"] == np.__version__
    assert description["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert description["devices"] == {
        "platform": "cpu",
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "processes": 1,
    }
    commit = description["git_commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(0, 20), min_size=1, max_size=130))
def test_smoothing_is_a_centred_mean(values: list[float]) -> None:
    smoothed = runlog._smoothed(values)
    for i, found in enumerate(smoothed):
        reach = min(len(values) // 40, i, len(values) - 1 - i)
        assert found == pytest.approx(sum(values[i - reach : i + reach + 1]) / (2 * reach + 1), abs=1e-9)


def test_loss_png_is_drawn_again_at_each_validation(tmp_path: Path) -> None:
    pictures = []
    with open_log(tmp_path) as log:
        log.validation(0, val_loss=10.8, train_time_ms=0, step_avg_ms=math.nan)
        assert not (tmp_path / "loss.png").exists()
        for first in (0, 5):
            run_steps(log, first, first + 5, validate=(first + 5,))
            pictures.append(matplotlib.image.imread(tmp_path / "loss.png"))
    assert pictures[0].shape == pictures[1].shape
    assert pictures[0].shape[0] >= 400
    assert (pictures[0] != pictures[1]).any()
    orange = np.abs(pictures[1][..., :3] - np.array([1.0, 0.498, 0.055])).max(axis=-1) < 0.02
    assert orange.sum() > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "log.txt", "loss.png", "metrics.jsonl"]


@settings(max_examples=15, deadline=None)
@given(killed_at=st.integers(4, STEPS), checkpoint=st.integers(0, 20), torn=st.booleans(), again=st.booleans())
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path_factory: pytest.TempPathFactory, killed_at: int, checkpoint: int, torn: bool, again: bool
) -> None:
    checkpoint = min(checkpoint, killed_at)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(RunLog, "_draw", lambda *_: None)
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    validate = (0, STEPS)
    with open_log(whole) as log:
        run_steps(log, 0, STEPS, validate)
    killed = open_log(cut)
    run_steps(killed, 0, killed_at, validate)
    killed.close()
    if torn:
        for name in ("log.txt", "metrics.jsonl"):
            with (cut / name).open("a") as file:
                file.write('{"step": 2' if name == "metrics.jsonl" else "step:2")
    config_before = (cut / "config.json").read_bytes()
    for _ in range(1 + again):
        with open_log(cut, resume_step=checkpoint) as log:
            run_steps(log, checkpoint, STEPS, validate)
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (cut / "config.json").read_bytes() == config_before
    lines = (cut / "log.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("resumed:")] == (whole / "log.txt").read_text().splitlines()
    assert f"resumed:{checkpoint}/{STEPS}" in lines
    monkeypatch.undo()


def test_a_resumed_run_validates_again_without_a_second_line(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        run_steps(log, 0, 12, validate=(0, 10))
    with open_log(tmp_path, resume_step=10) as log:
        run_steps(log, 10, 12, validate=(10, 12))
    assert [record["step"] for record in records(tmp_path)] == list(range(13))
    assert records(tmp_path)[10]["loss"] == loss_at(10)
    assert (tmp_path / "log.txt").read_text().count(f"step:10/{STEPS} val_loss") == 1


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    with open_log(tmp_path / "run") as log:
        run_steps(log, 0, 3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UsageError, match=r"--out .*run.*--auto-resume") as error:
        open_log(tmp_path / "run")
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("directory", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, directory: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="--out") as error:
        open_log(tmp_path / directory)
    assert str(tmp_path / directory) in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # Permission bits would not stop the superuser, as whom tests often run.
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UsageError, match=r"--out .*Permission denied"):
        open_log(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_off_a_terminal_only_validations_are_shown(tmp_path: Path) -> None:
    shown = io.StringIO()
    with open_log(tmp_path, console=Console(file=shown, width=40)) as log:
        run_steps(log, 0, 12, validate=(0, 12))
    assert shown.getvalue().splitlines() == [
        f"step:0/{STEPS} val_loss:11.5000 train_time:0ms step_avg:nanms",
        f"step:12/{STEPS} val_loss:8.5000 train_time:260ms step_avg:130.00ms",
    ]


def test_on_a_terminal_progress_is_shown(tmp_path: Path) -> None:
    shown = io.StringIO()
    with open_log(tmp_path, console=Console(file=shown, force_terminal=True, force_interactive=True, width=120)) as log:
        run_steps(log, 0, 12, validate=(12,))
    for piece in ("12/20", "loss 8.0000", "128.0 ms/step", "8,000 tokens/s", "ETA", "val_loss:8.5000"):
        assert piece in shown.getvalue()


@dataclasses.dataclass
class FakeTime:
    seconds: float = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_clock_leaves_out_ten_steps_and_every_pause() -> None:
    time = FakeTime()
    clock = StepClock(now=time)
    time.seconds += 50
    clock.resume()
    for step in range(1, 14):
        time.seconds += 60 if step == 1 else 0.25
        assert clock.tick() == (60_000 if step == 1 else 250)
        if step in (5, 11):
            clock.pause()
            time.seconds += 7
            clock.pause()
            time.seconds += 7
            clock.resume()
        assert clock.elapsed_ms == 250 * max(step - 10, 0)
        assert clock.step_avg_ms == 250 if step > 10 else math.isnan(clock.step_avg_ms)
        assert clock.steps_counted == max(step - 10, 0)


def test_clock_counts_a_step_that_was_interrupted_once() -> None:
    time = FakeTime()
    clock = StepClock(elapsed_ms=1000.0, steps_counted=4, now=time)
    clock.resume()
    time.seconds += 0.125
    clock.pause()
    time.seconds += 30
    clock.resume()
    time.seconds += 0.125
    assert clock.tick() == 250


def test_clock_goes_on_from_its_state() -> None:
    time = FakeTime()
    first = StepClock(now=time)
    first.resume()
    for _ in range(14):
        time.seconds += 0.5
        first.tick()
    saved = json.loads(json.dumps(first.state()))
    second = StepClock(**saved, now=time)
    time.seconds += 1000
    second.resume()
    assert (second.elapsed_ms, second.step_avg_ms) == (2000, 500)
    for step in range(1, 13):
        time.seconds += 1.5
        second.tick()
        counted = max(step - 10, 0)
        assert second.elapsed_ms == 2000 + 1500 * counted
        assert second.steps_counted == 4 + counted


def test_clock_that_is_paused_cannot_tick() -> None:
    clock = StepClock()
    with pytest.raises(RuntimeError, match="resume"):
        clock.tick()
    clock.resume()
    clock.pause()
    with pytest.raises(RuntimeError, match="resume"):
        clock.tick()


DAMAGE = {
    "an empty line": lambda lines: [*lines[:3], b"\n", *lines[3:]],
    "a cut line": lambda lines: [*lines[:3], lines[3][: len(lines[3]) // 2] + b"\n", *lines[4:]],
    "zeros, as after a power cut": lambda lines: [*lines[:3], bytes(40) + b"\n", *lines[4:]],
    "no UTF-8": lambda lines: [*lines[:3], b"\xff\xfe" + lines[3], *lines[4:]],
    "a step twice": lambda lines: [*lines[:5], *lines[3:]],
    "nothing left": lambda lines: [],
    "no line end": lambda lines: [*lines[:-1], lines[-1].rstrip(b"\n")],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [slow("log.txt"), "metrics.jsonl"])
def test_a_damaged_log_does_not_block_a_checkpoint(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path) as log:
        run_steps(log, 0, 14, validate=(0, 10))
    lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
    (tmp_path / name).write_bytes(b"".join(DAMAGE[damage](lines)))
    with open_log(tmp_path, resume_step=10) as log:
        run_steps(log, 10, STEPS, validate=(10, STEPS))
    steps = [int(record["step"] or 0) for record in records(tmp_path)]
    assert steps == sorted(set(steps))
    assert set(range(11, STEPS + 1)) <= set(steps)
    log_lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(log_lines) == len(set(log_lines))
    assert all(line.startswith(("step:", "resumed:10/")) for line in log_lines)
    kept = {"an empty line", "a step twice", "no line end"}
    lost = 0 if damage in kept else {"nothing left": 11}.get(damage, 1)
    if name == "metrics.jsonl":
        assert set(range(STEPS + 1)) - set(steps) <= {0, *range(1, 11)}
        assert len(set(range(STEPS + 1)) - set(steps)) <= lost
    left_out = f"{tmp_path / name}: 1 damaged line(s) left out" in capsys.readouterr().err
    assert left_out == (damage in {"a cut line", "zeros, as after a power cut", "no UTF-8"})


@pytest.mark.parametrize("form", [{"indent": 2}, {"separators": (",", ":")}, {"sort_keys": True}])
def test_metrics_in_another_form_are_read(form: dict, tmp_path: Path) -> None:
    """As some editor or `jq` may have written them."""
    with open_log(tmp_path / "a") as log:
        run_steps(log, 0, 12, validate=(0, 10))
    before = records(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(json.dumps(record, **form) for record in before))
    with open_log(tmp_path / "a", resume_step=10) as log:
        pass
    assert records(tmp_path / "a") == before[:11]


NO_RECORDS = ['{"step": -1}', '{"step": true}', '{"step": "7"}', "[]", "7", '{"step": 3, "loss": "low"}', '{"loss": 1}']


@pytest.mark.parametrize("line", [*NO_RECORDS, '{"step": 3, "loss": Infinity}', "[" * 100_000])
def test_what_is_no_record_is_left_out(line: str, tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        run_steps(log, 0, 2)
    before = records(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with open_log(tmp_path, resume_step=2):
        pass
    assert records(tmp_path) == before


def test_an_unfinished_run_without_a_checkpoint_gives_way_if_asked(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        run_steps(log, 0, 7, validate=(0, 5))
    with open_log(tmp_path, replace=True) as log:
        run_steps(log, 0, 2)
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    assert not (tmp_path / "loss.png").exists()
    with open_log(tmp_path, replace=True) as log:
        run_steps(log, 0, STEPS, validate=(STEPS,))
    before = (tmp_path / "log.txt").read_bytes()
    with pytest.raises(UsageError, match="holds a finished run without a checkpoint; name another folder"):
        open_log(tmp_path, replace=True)
    assert (tmp_path / "log.txt").read_bytes() == before


def test_a_picture_that_cannot_be_drawn_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loss.png").mkdir()  # in its way
    with open_log(tmp_path, resume_step=0) as log:
        run_steps(log, 0, 12, validate=(4, 8, 12))
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 13))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path / 'loss.png'}: cannot be drawn (" in said
    assert "the run goes on without it" in said
