"""The compilation cache: in the user's own folder or nowhere, and a second process compiles nothing.

And programs compiled together: the kernels in them are found, compiled once each, and before the programs.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jax_speedrun.kernels.implementation import compiling_for_hopper
from jax_speedrun.kernels.layer.residual_hopper import matmul_add
from jax_speedrun.run import compilation
from jax_speedrun.run.compilation import Call, compile_together, keep_compiled_programs, kernel_calls, kernel_program
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def untouched():
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_compilation_cache_max_size", before[1])


def test_a_private_folder_of_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled_programs() == tmp_path / "jax_speedrun"
    assert (tmp_path / "jax_speedrun").stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jax_speedrun")


@pytest.mark.parametrize("named", ["", "relative/path"])
def test_home_is_the_default(tmp_path, monkeypatch, named):
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keep_compiled_programs() == tmp_path / ".cache" / "jax_speedrun"


def test_a_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "jax_speedrun").mkdir()
    (tmp_path / "jax_speedrun").chmod(0o777)
    assert keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_no_folder_to_be_had(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled_programs() is None
    assert f"every run compiles anew ({tmp_path}/file" in capsys.readouterr().out


@pytest.mark.parametrize("home", [None, "", "~", "relative"])
@pytest.mark.parametrize("uid", [54321, 0])
def test_without_a_home_nothing_is_written(home, uid, tmp_path, monkeypatch, capsys):
    """Nobody 54321 is in no list of users, so there is no other home than what HOME says."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    elif uid == 0:
        pytest.skip("the list of users names this one's home")
    monkeypatch.setattr(os, "getuid", lambda: uid)
    monkeypatch.chdir(tmp_path)
    assert keep_compiled_programs() is None
    assert capsys.readouterr().out.count("no home folder, and no XDG_CACHE_HOME") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_without_a_home_writes_its_folder_and_nothing_else(tmp_path):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": "~"}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--preset", "tiny", "--steps", "2", "--out", "run"]
    options = ["--mesh", "1", "--sequence-length", "128", "--validation-every", "1", "--attention", "reference"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("no home folder") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "loss.png").exists()


def test_the_users_choice_stands(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert keep_compiled_programs() == tmp_path


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    code = """
import jax
from jax_speedrun.run.compilation import keep_compiled_programs
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
print(jax.jit(lambda x: x + 1)(1), len(hits))
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run():
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert run() == ["2", "0"]
    value, hits = run()
    assert value == "2"
    assert int(hits) >= 1


def lowered_for_a_gpu():
    """Two calls of one kernel, one inside a loop, and one of another."""
    x, w, wide = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 256), (256, 256), (512, 256)))

    @jax.jit
    def add(x, w, y):
        return matmul_add(x, w, (None, y))[0]

    def run(x, w, wide):
        y = jax.lax.fori_loop(0, 3, lambda _, y: add(x, w, y), add(x, w, x))
        return y, add(wide, w, wide)

    with compiling_for_hopper():
        return jax.jit(run).trace(x, w, wide).lower(lowering_platforms=("cuda",))


def test_the_kernels_of_a_program_are_found():
    calls = list(kernel_calls(lowered_for_a_gpu()))
    assert len({call["kernel_hash"] for call in calls}) == 2
    for call in calls:
        assert b"matmul_add" in call["module"]
        # The program of one kernel has XLA compile the very same one.
        (again,) = kernel_calls(kernel_program(call).trace().lower(lowering_platforms=("cuda",)))
        assert again == call


def test_programs_of_a_cpu_have_none():
    assert not list(kernel_calls(jax.jit(jnp.sin).lower(1.0)))


class Recorded:
    """A jitted function, or what it was lowered to, that says when it is compiled."""

    def __init__(self, what, events):
        self.what, self.events = what, events

    def lower(self):
        return self

    def compile(self):
        self.events.append(self.what)
        if self.what == "broken":
            raise ValueError("no")
        return self.what


def test_kernels_come_once_and_first(monkeypatch):
    events = []
    monkeypatch.setattr(compilation, "kernel_calls", lambda program: ({"kernel_hash": k} for k in program.what))
    monkeypatch.setattr(compilation, "kernel_program", lambda attributes: Recorded(attributes["kernel_hash"], events))
    first, second = (b"a", b"b", b"a"), (b"b", b"c")
    assert compile_together(*(Call(Recorded(what, events), ()) for what in (first, second))) == [first, second]
    assert sorted(event for event in events if isinstance(event, bytes)) == [b"a", b"b", b"c"]
    assert events.index(first) > max(events.index(b"a"), events.index(b"b"))
    assert events.index(second) > max(events.index(kernel) for kernel in (b"a", b"b", b"c"))


def test_a_program_that_does_not_compile_says_so(monkeypatch):
    monkeypatch.setattr(compilation, "kernel_calls", lambda program: ())
    with pytest.raises(ValueError, match="no"):
        compile_together(Call(Recorded("fine", []), ()), Call(Recorded("broken", []), ()))


def test_programs_compiled_together_compute_what_they_should():
    sine, cosine = compile_together(*(Call(jax.jit(function), (1.0,)) for function in (jnp.sin, jnp.cos)))
    assert sine(0.5) == jnp.sin(0.5)
    assert cosine(0.5) == jnp.cos(0.5)
