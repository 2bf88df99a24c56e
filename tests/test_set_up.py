"""`make train` and `make test` from nothing: with a Python and a pip that only take notes, and no other in sight."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

TOOLS = ("awk", "cat", "cp", "dirname", "find", "head", "ls", "make", "mkdir", "rm", "sh", "sort", "touch")

# What a Python does here: prove its version, make an environment, take a note of what pip installs, train.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    "-c "*) exit "${TOO_OLD:-0}" ;;
    --version) echo "Python 3.12.1" ;;
    "-m venv "*) echo "venv $3" >>"$NOTES"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip --version") exit 0 ;;
    "-m pip install "*) echo "$*" >>"$NOTES"; exit "${PIP_FAILS:-0}" ;;
    scripts/train.py) echo "train" >>"$NOTES"; mkdir -p runs/one ;;
    *) echo "$*" >>"$NOTES" ;;
esac
"""


class Machine:
    """A checkout's build files, beside a PATH that holds what is put there."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.path, self._notes = folder / "check out", folder / "bin", folder / "notes"
        self.path.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.path / tool).symlink_to(found)
        (self.checkout / "scripts").mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "scripts/find_python.sh", "scripts/set_up.sh"):
            shutil.copy(ROOT / name, self.checkout / name)

    def add(self, name: str, text: str = FAKE_PYTHON) -> None:
        program = self.path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.path), "HOME": str(self.path.parent), "NOTES": str(self._notes), **variables}
        command = ["make", *arguments]
        return subprocess.run(command, cwd=self.checkout, env=environment, capture_output=True, text=True, check=False)

    def notes(self) -> list[str]:
        """Return what was done since the last call."""
        done = self._notes.read_text().splitlines() if self._notes.exists() else []
        self._notes.unlink(missing_ok=True)
        return done


def installs(extras: str) -> str:
    return f"-m pip install --disable-pip-version-check --editable .{extras}"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("name", ["python3", "python3.13", "python"])
def test_train_sets_up_once_without_test_tools_and_says_what_to_look_at(machine: Machine, name: str) -> None:
    machine.add(name)
    first = machine.make("train")
    assert first.returncode == 0, first.stderr
    assert machine.notes() == ["venv .venv", installs(""), "train"]
    assert "runs/one/loss.png" in first.stdout
    assert "scripts/sample.py runs/one " in first.stdout
    assert machine.make("train").returncode == 0
    assert machine.notes() == ["train"]


def test_test_tools_come_with_make_test(machine: Machine) -> None:
    machine.add("python3")
    assert machine.make("train").returncode == 0
    machine.notes()
    assert machine.make("test").returncode == 0
    done = machine.notes()
    assert done[0] == installs("[test]")
    assert done[-1].startswith("-m pytest ")
    assert machine.make("test").returncode == 0
    assert machine.notes() == done[1:]


@pytest.mark.parametrize(
    ("answer", "extras"),
    [
        ("580.159.04, 9.0", "[cuda13]"),
        ("580.159.04, 9.0\n580.159.04, 9.0", "[cuda13]"),
        ("600.1, 12.0", "[cuda13]"),
        ("580.65.06, 7.0", "[cuda12]"),  # a V100, which CUDA 13 has left behind
        ("550.54.15, 9.0", "[cuda12]"),
        ("470.57.02, 8.0", ""),
        ("No devices were found", ""),
    ],
)
def test_a_gpu_gets_the_extra_of_its_driver(machine: Machine, answer: str, extras: str) -> None:
    machine.add("python3")
    machine.add("nvidia-smi", f"#!/bin/sh\necho '{answer}'\n")
    result = machine.make("train")
    assert result.returncode == 0
    assert machine.notes() == ["venv .venv", installs(extras), "train"]
    assert ("too old" in result.stderr) == answer.startswith("470")


def test_a_gpu_that_comes_later_is_noticed_and_one_out_of_order_is_not(machine: Machine) -> None:
    machine.add("python3")
    machine.add("nvidia-smi", "#!/bin/sh\necho '580.159.04, 9.0'\nexit 9\n")
    assert machine.make("train").returncode == 0
    assert machine.notes() == ["venv .venv", installs(""), "train"]
    machine.add("nvidia-smi", "#!/bin/sh\necho '580.159.04, 9.0'\n")
    assert machine.make("train").returncode == 0
    assert machine.notes() == [installs("[cuda13]"), "train"]


@pytest.mark.parametrize("goal", ["train", "test", "clean"])
def test_a_foreign_environment_is_left_alone(machine: Machine, goal: str) -> None:
    machine.add("python3")
    theirs = machine.checkout / ".venv" / "lib" / "python3.12" / "site-packages" / "jax_cuda13_plugin.py"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    before = sorted((machine.checkout / ".venv").rglob("*"))
    result = machine.make(goal)
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert ".venv was not made by this Makefile" in said[0]
    assert goal == "clean" or f"make VENV=.venv-speedrun {goal}" in said[0]
    assert machine.notes() == []
    assert sorted((machine.checkout / ".venv").rglob("*")) == before
    assert theirs.read_text() == "precious"
    # The way out that it names is one.
    assert machine.make("VENV=.venv-speedrun", goal).returncode == 0


def test_an_installation_that_failed_goes_on(machine: Machine) -> None:
    machine.add("python3")
    failed = machine.make("train", PIP_FAILS="1")
    assert failed.returncode == 2
    assert "the same command goes on" in failed.stderr
    assert machine.notes() == ["venv .venv", installs("")]
    assert machine.make("train").returncode == 0
    assert machine.notes() == [installs(""), "train"]


def test_an_environment_that_was_half_made_is_made_again(machine: Machine) -> None:
    machine.add("python3")
    (machine.checkout / ".venv" / "bin").mkdir(parents=True)
    (machine.checkout / ".venv" / ".jax_speedrun").touch()
    (machine.checkout / ".venv" / "bin" / "python").symlink_to("/gone/python3")
    assert machine.make("train").returncode == 0
    assert machine.notes() == ["venv .venv", installs(""), "train"]


def test_an_empty_folder_is_nobodys(machine: Machine) -> None:
    machine.add("python3")
    (machine.checkout / ".venv").mkdir()
    assert machine.make("train").returncode == 0


def test_other_dependencies_and_a_moved_checkout_are_installed_again(machine: Machine) -> None:
    machine.add("python3")
    assert machine.make("train").returncode == 0
    machine.notes()
    stamp = machine.checkout / ".venv" / ".ready-cpu"
    later = stamp.stat().st_mtime + 10
    os.utime(machine.checkout / "pyproject.toml", (later, later))
    assert machine.make("train").returncode == 0
    assert machine.notes() == [installs(""), "train"]
    os.utime(stamp, (later + 10, later + 10))
    assert machine.make("train").returncode == 0
    assert machine.notes() == ["train"]
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    assert machine.make("train").returncode == 0
    assert machine.notes() == [installs(""), "train"]


@pytest.mark.parametrize(
    "place", [".pyenv/versions/3.12.4/bin/python", ".local/share/uv/python/cpython-3.13.1-linux-x86_64-gnu/bin/python"]
)
def test_a_python_outside_the_path_is_found(machine: Machine, place: str) -> None:
    machine.add("python3", "#!/bin/sh\nexit 127\n")  # such as pyenv's own, where no version is chosen
    machine.add(f"../{place}")
    assert machine.make("train").returncode == 0
    assert machine.notes() == ["venv .venv", installs(""), "train"]


@pytest.mark.parametrize("goal", ["train", "test"])
@pytest.mark.parametrize("variables", [{}, {"TOO_OLD": "1"}, {"PYTHON": "/no/python"}])
def test_without_a_python_it_is_a_line_and_nothing_is_left(
    machine: Machine, goal: str, variables: dict[str, str]
) -> None:
    if variables:
        machine.add("python3")
    result = machine.make(goal, **variables)
    assert result.returncode == 2
    (said,) = (line for line in result.stderr.splitlines() if not line.startswith("make"))
    assert "Python 3.12 or newer" in said
    assert machine.notes() == []
    assert not (machine.checkout / ".venv").exists()


def test_clean_removes_what_was_made_here(machine: Machine) -> None:
    machine.add("python3")
    assert machine.make("train").returncode == 0
    assert machine.make("clean").returncode == 0
    assert not (machine.checkout / ".venv").exists()
    assert machine.make("clean").returncode == 0
