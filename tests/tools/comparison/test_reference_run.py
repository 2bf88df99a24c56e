"""The command that trains the PyTorch recipe: without PyTorch, without JAX, and its loop with a stand-in."""

import json
import math
import os
import subprocess
import sys

import pytest

from jax_speedrun.run.log import RunLog
from jax_speedrun.tools.comparison import reference_run
from tests.paths import ROOT

SCRIPT = ROOT / "scripts" / "reference_torch.py"


@pytest.mark.parametrize(("options", "code"), [(("--data", "x", "--out", "y"), 2), (("--help",), 0)])
def test_without_torch_one_line_says_how_to_get_it(tmp_path, options, code):
    # Absent also where it is installed.
    code_without_torch = """
import runpy, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, NoTorch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code_without_torch, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.splitlines() == [
            "reference_torch.py: error: PyTorch is not installed; run: pip install -e '.[torch]'"
        ]
    else:
        assert "usage:" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_workers_and_the_reference_need_no_jax():
    """A Python that has PyTorch alone runs them."""
    code = """
import sys

class NoJax:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "optax"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoJax())
from jax_speedrun.tools.comparison import reference_run, torch_side, worker
reference_run.parser()
try:
    from jax_speedrun.tools.comparison import jax_side
except ModuleNotFoundError as error:
    print("no", error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "no jax\n"), done.stderr


class Loss:
    """A loss as a tensor on a CPU has it."""

    is_cuda = False

    def __init__(self, value):
        self.value = value

    def to(self, device, non_blocking):
        return self

    def item(self):
        return self.value


class FakeTraining:
    """The loss falls by 1 a step; what is asked of it is written down."""

    steps = 130

    def __init__(self, events, diverges_at=None):
        self.events, self.diverges_at = events, diverges_at
        self.device = type("Device", (), {"type": "cpu"})

    def step(self, tokens, targets, step):
        self.events.append(("step", step, tokens))
        return Loss(math.nan if step == self.diverges_at else 200.0 - step)

    def evaluate(self, tokens, targets, step):
        self.events.append(("evaluate", step))
        return 2.0 + step

    def muon_rate(self, step):
        return 0.5 * step

    def window_tokens(self, step):
        return 128 + step


def run_loop(training, folder):
    batches = ((10 * step, 10 * step + 1) for step in range(training.steps))
    with RunLog(folder, steps=training.steps, tokens_per_step=1000, config={}, data={}) as log:
        reference_run._loop(training, batches, ("tokens", "targets"), reference_run.Report(training, log))


def test_every_step_is_made_once_and_logged_in_order(tmp_path):
    events = []
    run_loop(FakeTraining(events), tmp_path / "run")
    steps = [("step", step, 10 * step) for step in range(130)]
    assert events == [("evaluate", 0), *steps[:125], ("evaluate", 125), *steps[125:], ("evaluate", 130)]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(131))
    assert [record["loss"] for record in records[1:]] == [200.0 - step for step in range(130)]
    assert {record["step"]: record["val_loss"] for record in records if record["val_loss"]} == {
        0: 2,
        125: 127,
        130: 132,
    }
    assert (records[7]["lr"], records[7]["window"]) == (3.0, 134)
    last = (tmp_path / "run" / "log.txt").read_text().splitlines()[-1]
    assert last.startswith("step:130/130 val_loss:132.0000 train_time:")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    events = []
    with pytest.raises(SystemExit, match=r"reference_torch.py: error: the loss of step 8/130 is nan; stopped"):
        run_loop(FakeTraining(events, diverges_at=7), tmp_path / "run")
    assert ("step", 9, 90) not in events  # the one dispatched meanwhile is the last
