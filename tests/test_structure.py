"""The house stands: kernels know nothing of training, families do not know each other, no circle anywhere."""

import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jax_speedrun.tools import import_graph
from tests.paths import ROOT, module_names

LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """Hold the contracts of pyproject.toml against the package in `tree`."""
    command: list[str | Path] = [LINT_IMPORTS, "--no-logo", "--no-cache"]
    environment = {**os.environ, "COLUMNS": "300"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources alone, to be spoilt."""
    for name in ("jax_speedrun", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.bin")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_are_kept() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout
    assert "Contracts: 3 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("kernels/hopper/config.py", "from ..attention import schedule", "families"),
        ("kernels/block_mask.py", "from .layer import mlp", "families"),
        ("kernels/head/numerics.py", "from ..embedding import order", "families"),
        ("kernels/embedding/order.py", "from ..layer import residual", "families"),
        ("kernels/stairs.py", "", "families"),
        ("kernels/attention/reference.py", "def f():\n    from ...config import Config", "all of it on the kernels"),
        ("kernels/implementation.py", "from ..errors import UsageError", "all of it on the kernels"),
        ("jax_speedrun/model.py", "from .run import log", "all of it on the kernels"),
        ("jax_speedrun/run/loop.py", "from ..tools import cost_model", "all of it on the kernels"),
        ("jax_speedrun/data/shards.py", "from .. import model", "all of it on the kernels"),
        ("jax_speedrun/stairs.py", "", "all of it on the kernels"),
        ("kernels/attention/schedule.py", "def f():\n    from . import hopper", "no circle"),
        ("jax_speedrun/run/lock.py", "def f():\n    from . import train", "no circle"),
    ],
)
def test_a_wrong_import_breaks_a_contract(copy: Path, file: str, line: str, broken: str) -> None:
    with (copy / file).open("a") as source:
        source.write(f"\n{line}\n")
    result = lint(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    (verdict,) = (line for line in result.stdout.splitlines() if broken in line and line.endswith("BROKEN"))
    assert Path(file).stem in result.stdout.partition("Broken contracts")[2], verdict


def test_every_file_is_in_the_graph_and_no_module_leads_back_to_itself() -> None:
    imports = import_graph.modules(import_graph.import_graph())
    assert set(imports) == module_names()
    assert import_graph.floors(imports)[0]


def test_a_room_stands_above_all_that_it_imports() -> None:
    imports = {"attic": {"cellar", "parlour"}, "parlour": {"cellar"}, "cellar": set(), "shed": set()}
    assert import_graph.floors(imports) == [["cellar", "shed"], ["parlour"], ["attic"]]


def test_a_circle_is_named() -> None:
    with pytest.raises(graphlib.CycleError) as error:
        import_graph.floors({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    assert set(error.value.args[1]) == {"b", "c"}


def test_the_graph_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert import_graph.main(["jax_speedrun.kernels", "jax_speedrun.kernels.head"]) == 0
    printed = capsys.readouterr().out
    assert "jax_speedrun.kernels: 8 rooms on 4 floors, no circle" in printed
    assert ["3", "layer", "attention,", "block_mask,", "hopper,", "implementation"] in [
        line.split() for line in printed.splitlines()
    ]
    assert "hopper_logits" in printed


@pytest.mark.parametrize("name", ["jax_speedrun.attic", "jax_speedrun.model", "numpy"])
def test_an_unknown_package_is_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_graph.main([name]) == 2
    assert capsys.readouterr().err.count("\n") == 1
