"""What a run's data is: any other data has another fingerprint, and the same data elsewhere the same."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from jax_speedrun.data.batches import read_shard, write_shard
from jax_speedrun.data.fingerprint import difference, fingerprint, require_same
from jax_speedrun.errors import UsageError

NAMES = ("a_train_000001.bin", "a_train_000002.bin", "a_val_000000.bin")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of one size: one small, two sampled."""
    random = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name, size in zip(NAMES, (20_000, 200_000, 200_000), strict=True):
        write_shard(tmp_path / "data" / name, random.integers(0, 50257, size))
    return tmp_path / "data"


def swap(first: Path, second: Path) -> None:
    first.rename(first.with_suffix(".tmp"))
    second.rename(first)
    first.with_suffix(".tmp").rename(second)


def rewrite(path: Path, seed: int = 1) -> None:
    write_shard(path, np.random.default_rng(seed).integers(0, 50257, read_shard(path).size))


def one_token(path: Path) -> None:
    tokens = read_shard(path).copy()
    tokens[-1] ^= 1
    write_shard(path, tokens)


CHANGES = {
    "other text": (lambda f: rewrite(f / NAMES[1]), f"{NAMES[1]} holds other tokens"),
    "other validation text": (lambda f: rewrite(f / NAMES[2]), f"{NAMES[2]} holds other tokens"),
    "the last token": (lambda f: one_token(f / NAMES[1]), f"{NAMES[1]} holds other tokens"),
    "a token of a small shard": (lambda f: one_token(f / NAMES[0]), f"{NAMES[0]} holds other tokens"),
    "longer": (lambda f: write_shard(f / NAMES[0], np.zeros(30_000)), f"{NAMES[0]} has 61,024 bytes, not 41,024"),
    "added": (lambda f: shutil.copy(f / NAMES[0], f / "a_train_000003.bin"), "a_train_000003.bin is new"),
    "added for validation": (lambda f: shutil.copy(f / NAMES[2], f / "a_val_000001.bin"), "a_val_000001.bin is new"),
    "removed": (lambda f: (f / NAMES[1]).unlink(), f"{NAMES[1]} is missing"),
    "renamed": (lambda f: (f / NAMES[1]).rename(f / "a_train_000000.bin"), f"{NAMES[1]} is missing"),
    "swapped": (lambda f: swap(f / NAMES[1], f / NAMES[2]), f"{NAMES[1]} holds other tokens"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_named(change: str, folder: Path) -> None:
    act, said = CHANGES[change]
    before = json.loads(json.dumps(fingerprint(folder)))
    act(folder)
    assert difference(before, fingerprint(folder)) == said


def test_the_same_data_elsewhere(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    assert before["folder"] == str(folder)
    elsewhere = Path(shutil.copytree(folder, tmp_path / "else where"))
    (elsewhere / "notes.txt").write_text("mine")
    assert difference(before, fingerprint(elsewhere)) is None
    shutil.rmtree(folder)
    folder.symlink_to(elsewhere)
    assert difference(before, fingerprint(folder)) is None


def test_a_process_with_other_data_is_named(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "node1"))
    require_same([fingerprint(folder), fingerprint(other)])
    (other / NAMES[1]).unlink()
    with pytest.raises(UsageError, match=f"process 2 reads other data than process 0: in its {other}, {NAMES[1]} is m"):
        require_same([fingerprint(folder), fingerprint(folder), fingerprint(other)])


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything; tests/run/test_permissions.py does not")
def test_a_shard_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / NAMES[1]).chmod(0)
    with pytest.raises(UsageError, match=f"{NAMES[1]}: Permission denied"):
        fingerprint(folder)


def test_a_hundred_shards_take_less_than_a_second(tmp_path: Path) -> None:
    for index in range(100):
        with (tmp_path / f"a_train_{index:06d}.bin").open("wb") as file:
            file.truncate(200_000_000)  # as large as FineWeb's; the file system keeps no zeros
    (tmp_path / "a_val_000000.bin").write_bytes(b"x")
    began = time.perf_counter()
    assert len(fingerprint(tmp_path)["shards"]) == 101
    assert time.perf_counter() - began < 1
