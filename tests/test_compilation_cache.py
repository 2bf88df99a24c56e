"""The compilation cache: in the user's own folder or nowhere, and a second process compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jax_speedrun.compilation_cache import keep_compiled_programs

ROOT = Path(__file__).resolve().parent.parent


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


def test_no_folder_to_be_had(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled_programs() is None


def test_the_users_choice_stands(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert keep_compiled_programs() == tmp_path


def test_a_second_process_compiles_nothing(tmp_path):
    code = """
import jax
from jax_speedrun.compilation_cache import keep_compiled_programs
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
