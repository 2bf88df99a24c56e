"""What is installed works: from a wheel and an sdist, away from the checkout, beside Hugging Face's `kernels`."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.paths import ROOT, module_names

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SITE_PACKAGES = sysconfig.get_path("purelib")

# Each family once, far from its own tests' sizes: what is asked is whether the files are all there.
USE = """
import jax.numpy as jnp
from pathlib import Path
from jax_speedrun.data.batches import TINY_DATA
from jax_speedrun.kernels import attention, block_mask, embedding, head
from jax_speedrun.kernels.layer import mlp, self_attention
import jax_speedrun.kernels.hopper.matmul, jax_speedrun.kernels.attention.hopper
import jax_speedrun.model, jax_speedrun.run.train

tokens_T = jnp.arange(256) % 50
mask, _ = block_mask.long_short_masks(tokens_T, 2)
q_THK = jnp.ones((256, 1, 8))
ones_THK = attention.block_sparse_attention(q_THK, q_THK, q_THK, mask, scale=1.0)
assert jnp.allclose(ones_THK, 1), ones_THK
x_TD = embedding.embed(jnp.ones((50, 8)), tokens_T)
loss = head.head_loss(x_TD, jnp.zeros((64, 8)), tokens_T, "bfloat16")
assert jnp.allclose(loss, jnp.log(64)), loss
assert sorted(path.suffix for path in TINY_DATA.iterdir()) == [".bin", ".bin", ".md"]
print(Path(attention.__file__).parent)
"""


def package_files() -> set[str]:
    """Return what a wheel must hold: the files of jax_speedrun/, and those of kernels/, where its link leads."""
    return {
        f"{inside}/{path.relative_to(folder).as_posix()}"
        for folder, inside in ((ROOT / "jax_speedrun", "jax_speedrun"), (ROOT / "kernels", "jax_speedrun/kernels"))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Return what a command printed; it must have gone well."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist, both built from a copy of this tree."""
    folder = tmp_path_factory.mktemp("distributions")
    (folder / "tree").mkdir()
    for path in ROOT.iterdir():
        if path.name in ("docs", "examples", "jax_speedrun", "kernels", "scripts", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / "tree" / path.name, symlinks=True, ignore=ignored)
        elif path.is_file():
            shutil.copy(path, folder / "tree" / path.name)
    build = (sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", folder, "tree")
    run(*build, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(distributions: dict[str, Path]) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    assert names == package_files()


@pytest.mark.slow
def test_an_sdist_holds_what_its_tests_need(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    folders = [ROOT / name for name in ("docs", "examples", "kernels", "scripts", "tests")]
    needed = {path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    files = {path.relative_to(ROOT).as_posix() for path in needed} | {"LICENSE", "Makefile", "README.md"}
    assert names >= files | package_files()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_works_where_it_is_installed(kind: str, distributions: dict[str, Path], tmp_path: Path) -> None:
    """An sdist is first made a wheel, by pip."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment)
    python = environment / "bin" / "python"
    own_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # JAX and the rest come from here; the checkout does not, since the files that lead to it are not read.
    (own_packages / "rest.pth").write_text(SITE_PACKAGES)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--ignore-installed")
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", distributions[kind], cwd=tmp_path)
    assert run(python, "-c", USE, cwd=elsewhere).strip() == str(own_packages / "jax_speedrun" / "kernels" / "attention")
    for command in PROJECT["scripts"] if kind == "wheel" else ():
        assert "usage:" in run(environment / "bin" / command, "--help", cwd=elsewhere)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_a_plain_clone_keeps_the_link(tmp_path: Path) -> None:
    run("git", "clone", "--quiet", ROOT, "clone", cwd=tmp_path)
    assert (tmp_path / "clone" / "jax_speedrun" / "kernels").readlink() == Path("..", "kernels")
    run(sys.executable, "-c", "import jax_speedrun.kernels.attention", cwd=tmp_path / "clone")


def test_the_other_kernels_distribution_is_installed() -> None:
    assert importlib.metadata.version("kernels")
    files = importlib.metadata.files("kernels") or []
    assert any(file.parts[:2] == ("kernels", "__init__.py") for file in files)


@pytest.mark.slow
def test_all_of_ours_imports_and_the_name_kernels_stays_theirs(tmp_path: Path) -> None:
    without_torch = {name for name in module_names() if not name.endswith(("torch_side", "reference_torch"))}
    imports = "\n".join(f"import {name}" for name in sorted(without_torch))
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
    assert "jax_speedrun.kernels.layer.self_attention_hopper" in imports
    # Safe path: the working directory is not searched, as in an installed environment.
    run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_every_script_explains_itself(script: str, tmp_path: Path) -> None:
    assert "usage:" in run(sys.executable, ROOT / "scripts" / script, "--help", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert list(tmp_path.iterdir()) == []


def test_windows_is_refused_in_one_line() -> None:
    code = "import sys; sys.platform = 'win32'; import jax_speedrun"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "jax_speedrun does not run on Windows; use WSL 2, Linux or macOS\n"


def test_the_tiny_data_stays_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "jax_speedrun" / "data" / "tiny").iterdir()) < 3_000_000


@pytest.mark.parametrize("extra", ["cuda12", "cuda13"])
def test_extras_for_gpus_take_every_release_that_the_package_takes(extra: str) -> None:
    jax, nccl = (Requirement(line) for line in PROJECT["optional-dependencies"][extra])
    assert (jax.name, jax.extras) == ("jax", {extra})
    assert all(jax.specifier.contains(version) for version in ("0.11.2", "0.12.0", "0.12.0.1", "0.12.1", "0.13.0"))
    # What jax 0.12's own all-reduce asks for.
    assert nccl.name == f"nvidia-nccl-{extra.replace('cuda', 'cu')}"
    assert nccl.specifier.contains("2.29.2")
    assert not nccl.specifier.contains("2.28.9")
