"""scripts/rehearse.py with stand-ins for the scripts it starts: what it asks of them, what it makes of their logs."""

import json

import numpy as np
import pytest

from jax_speedrun.data.batches import write_shard
from jax_speedrun.kernels.block_mask import DOCUMENT_START
from jax_speedrun.tools import rehearse as script

TRAIN = """
import json, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(options["--out"])
out.mkdir(parents=True)
(out / "argv.json").write_text(json.dumps(options))
(out / "log.txt").write_text("step:1385/1385 val_loss:3.2790 train_time:139000ms step_avg:100.36ms\\n")
factor = {factor}
with (out / "metrics.jsonl").open("w") as file:
    for step in range(1, int(options["--steps"]) + 1):
        window = 128 if step <= 15 else 256
        ms = 1000.0 if step <= 3 else factor * (window + step % 3)
        off = {drift} if options.get("--mesh") == "2" else 0
        file.write(json.dumps({{"step": step, "loss": 10 - step / 10 + off, "window": window, "ms": ms}}) + "\\n")
"""
PROFILE = "import sys; print('profiled', sys.argv[1:])"
LAUNCHER = "import runpy, sys; sys.argv = sys.argv[3:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """The script, with `install(drift)` for its stand-ins, and a data set of two batches."""
    scripts = tmp_path / "scripts"
    monkeypatch.setattr(script, "SCRIPTS", scripts)
    (tmp_path / "torch" / "distributed").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("")
    (tmp_path / "torch" / "distributed" / "__init__.py").write_text("")
    (tmp_path / "torch" / "distributed" / "run.py").write_text(LAUNCHER)
    data = tmp_path / "data"
    data.mkdir()
    write_shard(data / "text_train_000001.bin", np.full(2 * 8 * 65536 + 1, DOCUMENT_START))

    def install(drift):
        scripts.mkdir()
        (scripts / "train.py").write_text(TRAIN.format(factor=1, drift=drift))
        (scripts / "reference_torch.py").write_text(TRAIN.format(factor=2, drift=0))
        (scripts / "profile_step.py").write_text(PROFILE)
        return lambda *options: script.main(["--data", str(data), "--out", str(tmp_path / "out"), *options])

    return install


def test_all_parts(rehearse, tmp_path, capfd):
    main = rehearse(1e-4)
    assert main("--mesh", "2", "--steps", "20", "--rounds", "2") == 0
    said = capfd.readouterr().out
    # The first three steps do not count, and medians are of all rounds.
    assert "   128    129.0       258.0   0.500" in said
    assert "   256    257.0       514.0   0.500" in said
    assert "profiled ['--preset', 'sub3min', '--mesh', '2'" in said
    assert "step:1385/1385 val_loss:3.2790" in said
    assert "largest relative difference 2.0e-05" in said
    asked = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/argv.json")}
    assert asked.keys() == {
        *(f"speed-{name}-{turn}" for name in ("jax", "torch") for turn in (0, 1)), "losses-1", "losses-2", "run",
    }  # fmt: skip
    assert asked["speed-torch-0"]["--sequences"] == "8"
    assert (asked["losses-1"]["--mesh"], asked["run"]["--steps"], asked["run"]["--epochs"]) == ("1", "1385", "693")
    # What is there is read again, not run again.
    assert main("--mesh", "2", "--parts", "losses") == 0


def test_losses_that_differ_fail(rehearse, capfd):
    assert rehearse(7e-3)("--mesh", "2", "--parts", "losses") == 1  # of losses from 9.9 down to 5
    said = capfd.readouterr().out
    assert "losses of 50 steps on 2 GPU(s) and on 1: largest relative difference 1.4e-03" in said
    assert f"more than 1e-03 at step(s) {', '.join(map(str, range(31, 51)))}" in said


def test_a_loss_that_is_no_number_fails(rehearse):
    assert rehearse("float('nan')")("--mesh", "2", "--parts", "losses") == 1


def test_a_run_that_fails_is_named(rehearse, tmp_path, capfd):
    main = rehearse(0)
    (tmp_path / "scripts" / "train.py").write_text("raise SystemExit(7)")
    assert main("--mesh", "2", "--parts", "run") == 2
    assert "train.py ended with code 7" in capfd.readouterr().err


def test_without_a_gpu_it_says_so(rehearse, capfd):
    assert rehearse(0)("--parts", "losses") == 2
    assert "no GPU" in capfd.readouterr().err
