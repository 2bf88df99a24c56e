"""The examples run as they stand, say what they say, and draw their masks."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from tests.paths import ROOT

SAID = {
    "gemma2_attention": ["two layers: (1024, 256)", "gradients are finite: True"],
    "longformer_attention": [
        f"{name}: (1000, 2, 64), padding is not felt: True" for name in ("window", "dilated window")
    ],
    "prefix_lm": ["the prompt's last token is felt by tokens 0 to 299, all of its document"],
    "from_flex_attention": ["output (1, 1024, 4, 64) log-sum-exp (1, 1024, 4)"],
}


def test_every_example_is_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*SAID, "page"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_it_runs(name: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", "--out", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [*SAID[name], f"wrote {tmp_path / f'{name}.png'}"]
    assert matplotlib.image.imread(tmp_path / f"{name}.png").shape[0] > 100
