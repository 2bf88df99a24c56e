"""Beside Hugging Face's `kernels` distribution (installed with the test dependencies) everything of ours works."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from jax_speedrun.kernels.implementation import SPILLING_JAX
from tests.paths import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in [*(ROOT / "jax_speedrun").glob("*.py"), *(ROOT / "jax_speedrun" / "comparison").glob("*.py")]
    if path.name != "__init__.py" and path.stem != "torch_side"  # which alone needs PyTorch
) + sorted(f"jax_speedrun.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py"))


def run_python(code, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    # Safe path: the working directory is not searched, as in an installed environment.
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_other_kernels_distribution_is_installed():
    assert importlib.metadata.version("kernels")
    files = importlib.metadata.files("kernels") or []
    assert any(file.parts[:2] == ("kernels", "__init__.py") for file in files)


def test_all_of_ours_imports_and_the_name_kernels_stays_theirs(tmp_path):
    imports = "\n".join(f"import {module}" for module in MODULES)
    code = f"""
import sys
sys.path.append(sys.path.pop(sys.path.index({str(ROOT)!r})))  # our checkout after site-packages
{imports}
import kernels
assert "site-packages" in kernels.__file__, kernels.__file__
assert kernels.get_kernel  # theirs
import jax_speedrun.kernels.attention as ours
assert ours.block_sparse_attention
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_every_script_explains_itself(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_package_holds_its_kernels_and_data():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert packages == [
        "jax_speedrun",
        "jax_speedrun.kernels",
        "jax_speedrun.tools.comparison",
        "jax_speedrun.data.tiny",
    ]
    assert (ROOT / "jax_speedrun" / "kernels").resolve() == ROOT / "kernels"
    assert sum(path.stat().st_size for path in (ROOT / "jax_speedrun" / "data" / "tiny").iterdir()) < 3_000_000


@pytest.mark.parametrize("extra", ["cuda12", "cuda13"])
def test_extras_for_gpus_leave_out_releases_that_spill_registers_and_no_others(extra):
    (line,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    allowed = Requirement(line).specifier
    assert not any(allowed.contains(version) for version in SPILLING_JAX)
    assert all(allowed.contains(version) for version in ("0.11.2", "0.12.1", "0.13.0"))
