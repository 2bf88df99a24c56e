"""The whole command, with stand-ins for one framework or both."""

import importlib.util
import json
import os
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
        (["--windows", "1,99"], "--windows 99: a run of 24 steps never"),
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


def run_script(tmp_path, python, *options):
    return subprocess.run(
        [
            *(sys.executable, SCRIPT, "--preset", "tiny", "--sequence-length", "256", "--torch-python", python),
            *("--out", tmp_path / "out", *options),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


def test_the_whole_command_with_a_stand_in_for_pytorch(tmp_path):
    times = [{"part": part, "window": 3, "ms": [4.0]} for part in ("attention_forward", "attention")]
    times.append({"part": "matmul", "window": None, "ms": [4.0]})
    answer = {**FAKE_ANSWER, "times": times, "first_step_s": None, "peak_bytes": None}
    python = fake_python(tmp_path / "python", f"print(json.dumps({answer!r}))")
    parts = ("--parts", "attention", "--windows", "3", "--rounds", "1", "--samples", "2")
    done = run_script(tmp_path, python, *parts)
    assert done.returncode == 0, done.stderr
    assert "attention, one layer, forward + backward" in done.stdout
    assert "PyTorch: a stand-in" in done.stdout
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    jax_times = written["results"][0]["times"]
    assert [(t["part"], t["window"], len(t["ms"])) for t in jax_times] == [(t["part"], t["window"], 2) for t in times]
    assert all(ms > 0 for t in jax_times for ms in t["ms"])
    assert written["results"][0]["versions"]["jax"] == jax.__version__
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000
    assert not (tmp_path / "out" / "work" / "cache").exists()


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit('ValueError: lost')", 2, "worker failed (ValueError: lost)"),
        ("import os, time; os.kill(os.getppid(), 2); time.sleep(60)", 130, "compare.py: stopped"),
    ],
    ids=["failure", "interrupt"],
)
def test_finished_rounds_outlast_a_failure_and_an_interrupt(tmp_path, end, code, said):
    answer = {**FAKE_ANSWER, "times": [{"part": part, "window": 3, "ms": [4.0]} for part in ("step", "matmul")]}
    body = f"if sys.argv[-1].endswith('torch-1.json'):\n    {end}\nprint(json.dumps({answer!r}))"
    python = fake_python(tmp_path / "python", body)
    parts = ("--jax-python", python, "--parts", "step", "--windows", "3", "--rounds", "3")
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
