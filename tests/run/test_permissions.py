"""Permission denied anywhere on a path: one line that names the path, and never the advice to start anew."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_speedrun.config import PRESETS, to_dict
from jax_speedrun.data.batches import TINY_DATA
from jax_speedrun.run.checkpoint import Checkpoints
from jax_speedrun.run.log import RunLog
from jax_speedrun.tools import sampling
from jax_speedrun.tools import train as command
from tests.powers import without_powers


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Calls the command as somebody for whom permission bits count: its one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, main=command.main):
        with without_powers():
            code = main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert code == 2
        assert error.count("\n") == 1, error
        assert "Permission denied" in error
        return error

    yield call
    for folder, folders, files in os.walk(tmp_path):
        for name in (*folders, *files):
            Path(folder, name).chmod(0o700)


@pytest.fixture
def resumable(tmp_path):
    """A folder with a checkpoint, as far as anybody looks before the rights are asked."""
    out = tmp_path / "run"
    metadata = {"config": to_dict(PRESETS["tiny"]), "data": {}, "data_position": {}, "clock": {}}
    with Checkpoints(out) as checkpoints:
        checkpoints.save(5, jax.device_put({"w": np.ones(3)}, jax.devices()[0]), metadata)
    return out


TINY = ("--preset", "tiny", "--mesh", 1)


@pytest.mark.parametrize("locked", [".", "a_train_000000.bin", "a_val_000000.bin"])
def test_data(locked, run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        shutil.copy(TINY_DATA / f"tiny_{split}_000000.bin", data / f"a_{split}_000000.bin")
    (data / locked).chmod(0)
    error = run(*TINY, "--data", data, "--out", tmp_path / "out")
    assert str(data / locked) in error
    assert not (tmp_path / "out").exists()


def test_data_behind_a_locked_door(run, tmp_path):
    (tmp_path / "door" / "data").mkdir(parents=True)
    (tmp_path / "door").chmod(0)
    error = run(*TINY, "--data", tmp_path / "door" / "data", "--out", tmp_path / "out")
    assert f"{tmp_path}/door/data" in error


@pytest.mark.parametrize("mode", [0, 0o500])
def test_a_place_where_a_run_may_not_be(mode, run, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(mode)
    error = run(*TINY, "--out", tmp_path / "shared" / "run")
    assert error.startswith(
        f"train.py: error: --out {tmp_path}/shared/run: cannot write there ({tmp_path}/shared/run: "
    )


@pytest.mark.parametrize("options", [("--resume",), ("--auto-resume", "--out")])
@pytest.mark.parametrize(
    ("locked", "mode"), [("checkpoints", 0), ("checkpoints/5", 0), ("checkpoints/5/manifest.txt", 0), (".", 0)]
)
def test_a_checkpoint_that_may_not_be_read_is_no_reason_to_start_anew(locked, mode, options, run, resumable):
    before = sorted(resumable.rglob("*"))
    (resumable / locked).chmod(mode)
    error = run(*options, resumable)
    assert str(resumable / locked) in error
    assert "see to its permissions" in error
    assert "anew" not in error
    assert "no complete checkpoint" not in error
    (resumable / locked).chmod(0o700)
    assert sorted(resumable.rglob("*")) == before


def test_an_array_that_may_not_be_read_is_not_damaged(run, resumable):
    array = next((resumable / "checkpoints" / "5" / "state").rglob("*/d/*"))
    array.chmod(0)
    error = run(
        resumable, "--bpe-files", "vocab.bpe", "encoder.json", main=lambda arguments: sample(resumable, arguments)
    )
    assert str(array) in error
    assert "damaged" not in error


def sample(folder, arguments):
    """`sample.py` from where it reads the checkpoint; what comes before needs GPT-2's files."""
    return sampling.run_command(sampling.parser(), lambda options: sampling.load(options.run) and 0, arguments)


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_a_log_that_may_not_be_read(name, run, resumable, tmp_path):
    (resumable / name).write_text("")
    (resumable / name).chmod(0)

    def open_log(_):
        def work(_):
            RunLog(resumable, steps=9, tokens_per_step=1, config={}, data={}, resume_step=5)
            return 0

        return sampling.run_command(sampling.parser(), work, ["x"])

    assert str(resumable / name) in run(main=open_log)


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_any_sensible_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        with without_powers(), Checkpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(1, jax.device_put({"w": np.ones(3)}, jax.devices()[0]), {})
    finally:
        os.umask(before)
    assert (tmp_path / "run" / "checkpoints" / "1" / "manifest.txt").exists()


def test_a_umask_that_forbids_everything_is_told(run, tmp_path):
    before = os.umask(0o777)
    try:
        error = run(*TINY, "--out", tmp_path / "run")
    finally:
        os.umask(before)
    assert f"--out {tmp_path}/run: cannot write there" in error
