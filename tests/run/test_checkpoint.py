"""Checkpoints under any name that a file system allows: found again, or refused before anything is written."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.errors import UsageError
from jax_speedrun.run import checkpoint
from jax_speedrun.run.checkpoint import CLOUDS, MISREAD, Checkpoints
from jax_speedrun.tools import train as command

STATE = {"params": {"w": np.arange(12.0).reshape(3, 4), "b": jnp.ones(3, jnp.bfloat16)}, "step": np.int32(7)}
METADATA: dict[str, dict] = {"config": {}, "data": {}, "data_position": {}, "clock": {}}
BESIDE = set(MISREAD) | {"/"}
EVERY_CHARACTER = "".join(chr(code) for code in range(1, 128) if chr(code) not in BESIDE) + "äß日本\u202e\U0001f9e8"


@pytest.fixture(scope="module")
def state():
    return jax.device_put(STATE, jax.devices()[0])


def save(run, state):
    with Checkpoints(run) as checkpoints:
        checkpoints.save(5, state, METADATA)


@pytest.mark.parametrize(
    "name", ["plain", EVERY_CHARACTER, " ", "~", "...", "-x", "{run}", "%s", "5", "a.orbax-checkpoint-tmp"]
)
def test_a_name_that_works(name, state, tmp_path):
    run = tmp_path / name / "run"
    checkpoint.require_usable(run)
    save(run, state)
    assert checkpoint.latest(run) == (5, METADATA)
    checkpoint.verify(run, 5)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = checkpoint.restore(run, 5, abstract)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)
    assert [path.name for path in tmp_path.iterdir()] == [name]


NAMES = [
    *(f"a{character}b" for character in MISREAD),
    "lr[0.05]",
    os.fsdecode(b"a\xff"),
    *(f"{cloud}:" for cloud in CLOUDS),
]


@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_work_is_refused_at_once(name, parent, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = f"{name}/run" if parent else name
    if name.endswith(":") and not parent:
        out = f"{name}/"  # a name of its own, and it has checkpoints/ below it
    assert command.main(["--preset", "tiny", "--mesh", "1", "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: --out ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_folder_at_the_root_that_would_be_a_cloud(cloud):
    with pytest.raises(UsageError, match="a cloud"):
        checkpoint.require_usable(checkpoint.Path(f"/{cloud}/runs/first"))


@pytest.mark.parametrize("name", ["lr[0.05]", "a\\b"])
def test_what_is_not_found_again_is_no_checkpoint(name, state, tmp_path, monkeypatch):
    """Where a name slips through, as these do here: Orbax reports success, and no checkpoint comes of it."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / name
    with pytest.raises(UsageError, match="does not find again what it wrote: params/b is missing"):
        save(run, state)
    assert checkpoint.complete_steps(run) == []
    with pytest.raises(UsageError, match="no complete checkpoint"):
        checkpoint.latest(run)


def test_arrays_of_another_version_are_refused_by_name(state, tmp_path):
    save(tmp_path / "run", state)
    wanted = {**state, "step": jax.ShapeDtypeStruct((2,), jnp.int32)}
    with pytest.raises(UsageError, match=r"step is int32\[\], not int32\[2\]"):
        checkpoint.restore(tmp_path / "run", 5, wanted)
    with pytest.raises(UsageError, match="more is missing"):
        checkpoint.restore(tmp_path / "run", 5, {**state, "more": state["step"]})


def test_what_a_checkpoint_of_another_version_does_not_say(state, tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(5, state, {"config": {}, "clock": {}})
    with pytest.raises(UsageError, match=r"another version of this program \(it does not hold data, data_position"):
        checkpoint.latest(tmp_path / "run")


def test_reading_back_takes_no_time(state, tmp_path):
    """Not of a step, which goes on meanwhile; and little of the writing thread: it looks at shapes, not at values."""
    large = {f"w{number}": jnp.ones((256, 1024)) for number in range(50)}
    save(tmp_path / "run", large)
    began = time.perf_counter()
    assert checkpoint._structure_on_disk(tmp_path / "run" / "checkpoints" / "5") == checkpoint._structure(large)
    assert time.perf_counter() - began < 1
