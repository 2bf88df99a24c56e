"""scripts/draw_masks.py: the batch, the step and the window that it draws, read back from what it says."""

import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from jax_speedrun.config import PRESETS
from jax_speedrun.kernels.attention.drawing import ascii_blocks
from jax_speedrun.kernels.block_mask import long_short_masks
from jax_speedrun.tools.draw_masks import main
from tests.paths import ROOT

TINY = ROOT / "jax_speedrun" / "data" / "tiny"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_script_draws_the_batch_of_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "masks.png"
    assert run("--step", 7, "--steps", 20, "--sequence-length", 2048, "--out", out) == 0
    said = capsys.readouterr().out

    # The shard read by hand: step 7 begins after 7 batches of all its sequences.
    shard = np.fromfile(TINY / "tiny_train_000000.bin", "<u2")[512:]
    start = 7 * PRESETS["tiny"].sequences * 2048
    window = -(-PRESETS["tiny"].optimizer.window_tokens * 7 // (20 * 128))
    for name, mask in zip(
        ("long", "short"), long_short_masks(jnp.asarray(shard[start : start + 2048]), window), strict=True
    ):
        letters = ascii_blocks(mask)
        assert f"{letters.count('F')} full + {letters.count('P')} partial" in said.split(name)[1].splitlines()[0]
    assert f"window of {128 * window} tokens" in said
    assert matplotlib.image.imread(out).shape[2] == 4
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_script_zooms_and_writes_svg_after_more_than_one_pass(tmp_path: Path) -> None:
    """The record's last step lies far behind the end of the tiny data."""
    out = tmp_path / "masks.svg"
    assert run("--preset", "sub3min", "--sequence-length", 1024, "--blocks", "2:", "--out", out) == 0
    assert xml.etree.ElementTree.parse(out).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--step", "50"], "--step 50"),
        (["--step", "-1"], "--step -1"),
        (["--steps", "0"], "--steps"),
        (["--sequence-length", "100"], "--sequence-length"),
        (["--blocks", "3"], "--blocks 3"),
        (["--blocks", "a:b"], "--blocks a:b"),
        (["--blocks", "4:2"], "--blocks 4:2"),
        (["--blocks", "0:99"], "--blocks 0:99"),
        (["--out", "masks.gif"], "--out masks.gif"),
        (["--out", "no/such/folder/masks.png"], "--out no/such"),
        (["--data", "nowhere"], "--data nowhere"),
    ],
)
def test_script_names_bad_input(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    names: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"draw_masks.py: error: {names}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_script_says_it_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "draw_masks.py"), "--data", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("draw_masks.py: error: --data nowhere")
    assert done.stderr.count("\n") == 1
