"""The whole command, with stand-ins for one framework or both."""

import importlib.util
import json
import os
import resource
import subprocess
import sys

import jax
import pytest

from jax_speedrun.tools.comparison.compare import main
from tests.paths import ROOT
from tests.tools.comparison.fakes import FAKE_ANSWER, fake_python

SCRIPT = ROOT / "scripts" / "compare.py"


def test_missing_torch_is_one_line(tmp_path, capsys):
    no_torch = tmp_path / "python"
    no_torch.write_text("#!/bin/sh\nexit 1\n")
    no_torch.chmod(0o755)
    out = tmp_path / "out"
    assert main(["--torch-python", str(no_torch), "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        "compare.py: error: PyTorch is not installed; run: pip install -e '.[torch]' (or name --torch-python)\n"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", "128,12672"], "--windows 12672: a run's windows are multiples of 128 tokens, here up to 640"),
        (["--windows", "100"], "--windows 100: a run's windows are multiples of 128 tokens, here up to 640"),
        (["--windows", "0"], "--windows 0: a run's windows are multiples of 128 tokens, here up to 640"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--curve-steps", "-1"], "--curve-steps must be at least 1"),
        (["--attention", "fast"], "--attention fast: choose one of auto"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--sequence-length", "100"], "--sequence-length must be a positive multiple of 128"),
        (["--train"], "--train needs --data"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    python = fake_python(tmp_path / "python", "")
    assert main(["--preset", "tiny", "--torch-python", python, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"compare.py: error: {message}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_out_must_be_new(tmp_path, capsys):
    python = fake_python(tmp_path / "python", "")
    assert main(["--preset", "tiny", "--torch-python", python, "--out", str(tmp_path)]) == 2
    assert "there already; name another folder" in capsys.readouterr().err


def run_compare(tmp_path, *options):
    return subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path / "out", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


def run_script(tmp_path, python, *options):
    small = ("--preset", "tiny", "--sequence-length", "256", "--torch-python", python)
    return run_compare(tmp_path, *small, *options)


@pytest.mark.slow
def test_the_whole_command_with_a_stand_in_for_pytorch(tmp_path):
    times = [{"part": part, "window": 384, "ms": [4.0]} for part in ("attention_forward", "attention")]
    times.append({"part": "matmul", "window": None, "ms": [4.0]})
    answer = {**FAKE_ANSWER, "times": times, "first_step_s": None, "peak_bytes": None}
    python = fake_python(tmp_path / "python", f"print(json.dumps({answer!r}))")
    parts = ("--parts", "attention", "--windows", "384", "--rounds", "1", "--samples", "2")
    done = run_script(tmp_path, python, *parts)
    assert done.returncode == 0, done.stderr
    assert {"attention,", "one", "layer,", "forward", "backward"} <= set(done.stdout.split())
    assert max(len(line) for line in done.stdout.splitlines() if "/" not in line) <= 80
    assert "a stand-in" in done.stdout
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    jax_times = written["results"][0]["times"]
    assert [(t["part"], t["window"], len(t["ms"])) for t in jax_times] == [(t["part"], t["window"], 2) for t in times]
    assert all(ms > 0 for t in jax_times for ms in t["ms"])
    assert written["results"][0]["versions"]["jax"] == jax.__version__
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000
    assert not (tmp_path / "out" / "work" / "cache").exists()


ANSWER_TO_ALL = """
from jax_speedrun.tools.comparison.worker import PARTS, WINDOWED
windows = [w["tokens"] for w in job["windows"]]
times = [{"part": part, "window": w, "ms": [4.0] * job["samples"]}
         for name in job["parts"] for part in PARTS[name] for w in (windows if part in WINDOWED else [None])]
times.append({"part": "matmul", "window": None, "ms": [4.0]})
"""


def answers(tmp_path, name, **changes):
    """A Python that answers every job to measure, with times for whatever it asks."""
    tail = f"print(json.dumps({{**{ {**FAKE_ANSWER, **changes}!r}, 'times': times}}))"
    body = ANSWER_TO_ALL + tail
    return fake_python(tmp_path / name, body)


def test_on_a_machine_without_a_gpu_the_default_is_tiny_and_claims_no_factor(tmp_path, capsys):
    on_a_cpu = {"platform": "cpu", "device": "cpu"}
    jax_python = answers(tmp_path, "jax", **on_a_cpu)  # which says nothing of GPUs
    torch_python = answers(tmp_path, "torch", **on_a_cpu, reduced="dense attention")
    assert main(["--out", str(tmp_path / "out"), "--jax-python", jax_python, "--torch-python", torch_python]) == 0
    printed = capsys.readouterr().out
    assert "preset tiny, since JAX finds no GPU here" in printed
    assert "no factor between frameworks: PyTorch ran with dense attention" in " ".join(printed.split())
    assert " x" not in printed.partition("faster")[2].partition("tokens/s")[0]
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    measured = [(row["part"], row["window"]) for row in written["rows"]]
    assert measured[:3] == [("step", 128), ("step", 640), ("micro", 128)]
    assert {row["ratio"] for row in written["rows"]} == {None, 1.0}
    assert written["rows"][0]["jax"]["n"] == 2 * 3


@pytest.mark.parametrize(("options", "sides"), [((), ["jax", "xla", "torch"]), (("--no-xla",), ["jax", "torch"])])
def test_with_kernels_jax_is_measured_without_them_too(tmp_path, capsys, options, sides):
    jax_python = answers(tmp_path, "jax", attention="hopper", kernels="hopper")
    torch_python = answers(tmp_path, "torch")
    pythons = ("--jax-python", jax_python, "--torch-python", torch_python)
    assert main(["--out", str(tmp_path / "out"), *pythons, "--preset", "tiny", "--rounds", "1", *options]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [result["side"] for result in written["results"]] == sides
    assert list(written["rows"][0].keys() & {"jax", "xla", "torch"}) == list({"jax", "xla", "torch"} & set(sides))
    jobs = {side: json.loads((tmp_path / "out" / "work" / f"{side}-0.json").read_text())["config"] for side in sides}
    chosen = {side: (config["attention"], config["kernels"]) for side, config in jobs.items()}
    assert chosen == {side: ("xla", "xla") if side == "xla" else ("auto", "auto") for side in sides}
    assert ("our kernels" in printed) == ("xla" in sides)
    assert "4.5.6" in printed.partition("full")[0]  # PyTorch's version heads its column


@pytest.mark.slow
def test_the_default_on_a_cpu_takes_under_five_minutes(tmp_path):
    """Half of it, in CPU seconds, is for JAX: where a test shares two cores with others, seconds say nothing."""
    torch_python = answers(tmp_path, "torch", platform="cpu", reduced="dense attention")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_compare(tmp_path, "--torch-python", torch_python)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Whatever uses one core of two takes as long as its CPU seconds, and most of it uses both.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit('ValueError: lost')", 2, "worker failed (ValueError: lost)"),
        ("import os, time; os.kill(os.getppid(), 2); time.sleep(60)", 130, "compare.py: stopped"),
    ],
    ids=["failure", "interrupt"],
)
def test_finished_rounds_outlast_a_failure_and_an_interrupt(tmp_path, end, code, said):
    answer = {**FAKE_ANSWER, "times": [{"part": part, "window": 384, "ms": [4.0]} for part in ("step", "matmul")]}
    body = f"if sys.argv[-1].endswith('torch-1.json'):\n    {end}\nprint(json.dumps({answer!r}))"
    python = fake_python(tmp_path / "python", body)
    parts = ("--jax-python", python, "--parts", "step", "--windows", "384", "--rounds", "3")
    done = run_script(tmp_path, python, *parts)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "full step with optimisers" in done.stdout
    assert "1 of 3 rounds" in " ".join(done.stdout.split())
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(written["results"]) == 2
    # 256 tokens in 4 ms: a step here is one sequence, whatever the preset's batch.
    assert written["throughput"][0]["tokens_per_s"] == pytest.approx({"jax": 64_000, "torch": 64_000})
    assert (tmp_path / "out" / "compare.png").exists()
    assert not (tmp_path / "out" / "work" / "cache").exists()


def test_the_whole_command_with_pytorch(tmp_path):
    """Both measured and compared: set TORCH_PYTHON to a Python with PyTorch, unless this one has it."""
    if importlib.util.find_spec("torch"):
        python = sys.executable
    else:
        python = os.environ.get("TORCH_PYTHON") or pytest.skip(
            "PyTorch is not installed; pip install -e '.[torch]', or name a Python that has it in TORCH_PYTHON"
        )
    done = run_script(tmp_path, python, "--parity", "--curve-steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "out" / "parity.json").read_text())["lines"]
    gradients = [line for line in lines if line["quantity"].startswith("gradient")]
    assert len(gradients) == 39
    assert max(line["difference"] for line in gradients) < 1e-4
