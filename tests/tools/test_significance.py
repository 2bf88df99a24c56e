"""The statistics against published figures and against the same quantities worked out another way."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_speedrun.errors import UsageError
from jax_speedrun.tools.significance import chart, compare, draw, main, p_below, read_run, read_runs, report, summarize
from tests.tools.comparison.fakes import words_of


def sample(mean: float, deviation: float, n: int) -> list[float]:
    """n values with exactly this mean and sample standard deviation."""
    values = np.random.default_rng(n).standard_normal(n)
    values = (values - values.mean()) / values.std(ddof=1)
    return list(mean + deviation * values)


def t_tail(t: float, freedom: float) -> float:
    """Probability of a value of at most t under Student's distribution, from the incomplete beta function."""
    outside = scipy.special.betainc(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return float(outside if t < 0 else 1 - outside)


def write_log(path: Path, val_loss: float, time_ms: float, steps: int = 1385, extra: str = "") -> Path:
    average = time_ms / (steps - 10)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"step:0/{steps} val_loss:10.8258 train_time:0ms step_avg:nanms\n"
        f"step:{steps}/{steps} train_time:{time_ms:.0f}ms step_avg:{average:.2f}ms\n{extra}"
        f"step:{steps}/{steps} val_loss:{val_loss:.4f} train_time:{time_ms:.0f}ms step_avg:{average:.2f}ms\n"
    )
    return path


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    code = main([str(argument) for argument in arguments])
    return Done(code, *capsys.readouterr())


def test_published_figures_of_the_rerun() -> None:
    """Mean 3.27869 and deviation 0.00176 over 32 runs: published as p = 0.0001."""
    values = sample(3.27869, 0.00176, 32)
    assert f"{p_below(values, 3.28):.4f}" == "0.0001"
    summary = summarize(values)
    assert (summary.n, f"{summary.mean:.5f}", f"{summary.deviation:.5f}") == (32, "3.27869", "0.00176")


def test_published_figures_of_the_record() -> None:
    """Mean 3.27925 and deviation 0.00107 over 20 runs, published with p = 0.0021.

    The two rounded figures alone give 0.0027, and no values that round to them
    give 0.0021, so what is asserted is Student's distribution, not that digit.
    """
    p = p_below(sample(3.27925, 0.00107, 20), 3.28)
    assert p == pytest.approx(t_tail((3.27925 - 3.28) / (0.00107 / math.sqrt(20)), 19), rel=1e-6)
    assert f"{p:.4f}" == "0.0027"


@settings(max_examples=50, deadline=None)
@given(mean=st.floats(3.2, 3.4), deviation=st.floats(1e-4, 0.1), n=st.integers(2, 40))
def test_interval_and_p_value_from_student(mean: float, deviation: float, n: int) -> None:
    values = sample(mean, deviation, n)
    summary = summarize(values)
    assert summary.mean == pytest.approx(sum(values) / n)
    assert summary.deviation == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)), rel=1e-6)
    error = deviation / math.sqrt(n)
    assert t_tail((summary.low - mean) / error, n - 1) == pytest.approx(0.025, rel=1e-4)
    assert summary.high - mean == pytest.approx(mean - summary.low, rel=1e-6)
    assert p_below(values, 3.28) == pytest.approx(t_tail((mean - 3.28) / error, n - 1), rel=1e-5, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(-0.01, 0.01), ratio=st.floats(0.1, 10), n=st.integers(2, 12), m=st.integers(2, 12))
def test_welch_from_its_definition(shift: float, ratio: float, n: int, m: int) -> None:
    found = compare(sample(3.28 + shift, 0.002, n), sample(3.28, 0.002 * ratio, m))
    variance, other = 0.002**2 / n, (0.002 * ratio) ** 2 / m
    error = math.sqrt(variance + other)
    freedom = (variance + other) ** 2 / (variance**2 / (n - 1) + other**2 / (m - 1))
    assert found.mean == pytest.approx(shift, abs=1e-12)
    assert found.p == pytest.approx(2 * t_tail(-abs(shift) / error, freedom), rel=1e-5, abs=1e-9)
    assert t_tail((found.low - shift) / error, freedom) == pytest.approx(0.025, rel=1e-4)
    assert found.low + found.high == pytest.approx(2 * shift, abs=1e-9)


def test_what_one_value_or_equal_values_do_not_say() -> None:
    assert summarize([3.0]).mean == 3
    assert math.isnan(summarize([3.0]).deviation)
    assert math.isnan(p_below([3.0], 3.28))
    assert math.isnan(p_below([3.1, 3.1], 3.28))
    assert math.isnan(compare([3.0], [3.0, 3.1]).p)
    assert math.isnan(compare([3.0, 3.0], [3.1, 3.1]).p)
    assert compare([3.0], [3.0, 3.1]).mean == pytest.approx(-0.05)


def test_the_last_validation_line_counts(tmp_path: Path) -> None:
    run = read_run(write_log(tmp_path / "log.txt", 3.2785, 178712))
    assert (run.steps, run.val_loss, run.train_time_s, run.step_avg_ms) == (1385, 3.2785, 178.712, 129.97)
    assert not run.resumed
    assert read_run(tmp_path) == run
    assert read_run(write_log(tmp_path / "b.txt", 3.28, 178000, extra="resumed:1250/1385\n")).resumed


def test_a_log_that_begins_with_its_source_code_is_read(tmp_path: Path) -> None:
    """As the record's own logs do."""
    log = write_log(tmp_path / "log.txt", 3.2785, 178712)
    source = 'print0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{time:.0f}ms")\n\xff'
    log.write_bytes(source.encode("latin-1") + b"\n" + log.read_bytes())
    assert read_run(log).val_loss == 3.2785


def test_report_of_two_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses, others = (3.27, 3.28, 3.26), (3.25, 3.27)
    first = [write_log(tmp_path / f"a{i}" / "log.txt", loss, 178000 + 500 * i) for i, loss in enumerate(losses)]
    second = [write_log(tmp_path / f"b{i}.txt", loss, 179000 + 500 * i, 1393) for i, loss in enumerate(others)]
    said = run_command(capsys, *first, "--versus", *second, "--target", 3.3).stdout
    assert said == report(read_runs(first), read_runs(second), 3.3) + "\n"
    text = " ".join(said.split())
    for piece in (
        "3 runs of 1385 steps val loss mean 3.27000 95 % interval 3.24516 to 3.29484 deviation 0.01000",
        "time, s mean 178.50 95 % interval 177.26 to 179.74 deviation 0.50",
        "step, ms mean 129.82",
        "below 3.3 (one-sided t-test): 0.01755",
        "versus 2 runs of 1393 steps val loss mean 3.26000",
        "difference (first group minus second) val loss +0.01000 95 % interval",
        "time, s -0.75 95 % interval",
        "p by Welch's t-test, two-sided",
    ):
        assert piece in text
    assert max(map(len, said.splitlines())) <= 80


def test_report_of_one_run_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_command(capsys, write_log(tmp_path / "log.txt", 3.27, 178000))
    assert done.returncode == 0
    assert "1 run of 1385 steps" in done.stdout
    assert "mean  3.27000\n" in done.stdout
    assert "need at least 2 logs" in done.stdout
    assert "nan" not in done.stdout


def test_report_names_equal_losses_and_resumed_runs(tmp_path: Path) -> None:
    logs = [write_log(tmp_path / f"{i}.txt", 3.27, 178000, extra="resumed:9/1385\n" * i) for i in range(2)]
    text = report(read_runs(logs), read_runs(logs))
    assert "undefined, all losses are equal" in text
    assert "1 of them resumed" in text
    assert "nan" not in text


def unfinished(tmp_path: Path) -> list[Path]:
    log = tmp_path / "log.txt"
    log.write_text(
        "step:125/1385 val_loss:4.4 train_time:1ms step_avg:1ms\nstep:1385/1385 train_time:1ms step_avg:1ms\n"
    )
    return [log]


def mixed(tmp_path: Path) -> list[Path]:
    return [write_log(tmp_path / "a.txt", 3.27, 1000), write_log(tmp_path / "log.txt", 3.27, 1000, 1393)]


def twice(tmp_path: Path) -> list[Path]:
    return [write_log(tmp_path / "log.txt", 3.27, 1000), tmp_path]


def diverged(tmp_path: Path) -> list[Path]:
    return [write_log(tmp_path / "log.txt", math.nan, 1000)]


def concatenated(tmp_path: Path) -> list[Path]:
    log = write_log(tmp_path / "log.txt", 3.27, 1000)
    log.write_text(2 * log.read_text())
    return [log]


def damaged(tmp_path: Path) -> list[Path]:
    log = tmp_path / "log.txt"
    log.write_text("step:9/9 val_loss:3.2x train_time:1ms step_avg:1ms\n")
    return [log]


def missing(tmp_path: Path) -> list[Path]:
    return [tmp_path / "log.txt"]


@pytest.mark.parametrize("make", [unfinished, mixed, twice, diverged, concatenated, damaged, missing])
def test_a_bad_log_is_named(tmp_path: Path, make: Callable[[Path], list[Path]]) -> None:
    with pytest.raises(UsageError) as error:
        read_runs(make(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / 'log.txt'}: ")
    assert "\n" not in str(error.value)


def test_the_script_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_command(capsys, *unfinished(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("significance.py: error: ")
    assert str(tmp_path / "log.txt") in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_curve_is_that_of_the_log(tmp_path: Path) -> None:
    middle = "step:700/1385 val_loss:4.5 train_time:90000ms step_avg:130.43ms\n"
    log = write_log(tmp_path / "log.txt", 3.27, 178000, extra=middle)
    assert read_run(log).curve == ((0.0, 10.8258), (90.0, 4.5), (178.0, 3.27))


def test_a_chart_is_complete_alone(tmp_path: Path) -> None:
    """Card, versions, date, what is compared, and the spread of several runs."""
    logs = {name: [write_log(tmp_path / f"{name}{i}" / "log.txt", 3.27 + 0.01 * i, 1e5 * (i + 1)) for i in range(3)]
            for name in ("jax", "torch", "bare")}  # fmt: skip
    devices = {"kind": "A Card", "count": 2}
    config = {"config": {}, "versions": {"jax": "1.2.3"}, "devices": devices}
    for log in logs["jax"]:
        log.with_name("config.json").write_text(json.dumps(config))
    for log in logs["torch"]:
        log.with_name("config.json").write_text(
            json.dumps({**config, "config": {"framework": "torch 4.5 on 2 x A Card"}})
        )
    groups = {"ours": read_runs(logs["jax"]), "theirs": read_runs(logs["torch"]), "bare": read_runs(logs["bare"])}
    words = words_of(chart(groups))
    for piece in (
        "ours, 1385 steps: jax 1.2.3 on 2 x A Card",
        "theirs, 1385 steps: torch 4.5 on 2 x A Card",
        "bare, 1385 steps: no config.json beside the logs",
        f"drawn {time.strftime('%Y-%m-%d')}",
        "mean ± deviation",
        "ours: 3.2800 ± 0.0100 after 200.0 ± 100.0 s (n = 3)",
        "training time by the record's clock, s",
    ):
        assert piece in words
    assert "ours: 3.270 after 100 s (n = 1)" in words_of(chart({"ours": read_runs(logs["jax"][:1])}))


def test_the_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [write_log(tmp_path / f"{name}.txt", 3.27, 178000) for name in "ab"]
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert run_command(capsys, logs[0], "--chart", one).returncode == 0
    named = run_command(capsys, logs[0], "--versus", logs[1], "--chart", two, "--names", "JAX", "PyTorch")
    assert (named.returncode, named.stderr) == (0, "")
    assert one.read_bytes().startswith(b"\x89PNG")
    assert one.read_bytes() != two.read_bytes()
    with pytest.raises(UsageError, match=r"never/chart.png: cannot be written"):
        draw({"JAX": read_runs(logs)}, tmp_path / "never" / "chart.png")
