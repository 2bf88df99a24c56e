"""Shards, batches and positions against plain NumPy slicing."""

import functools
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_speedrun.data.batches import (
    TokenBatches,
    find_shards,
    first_tokens,
    prefetch,
    read_shard,
    validation_count,
    validation_sequences,
    write_shard,
)
from jax_speedrun.errors import UsageError
from tests.paths import ROOT

T = 128
TINY = ROOT / "jax_speedrun" / "data" / "tiny"


def make_shards(folder: Path, sizes: list[int], seed: int = 0) -> tuple[list[Path], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    contents = [random.integers(0, 50257, size, dtype=np.uint16) for size in sizes]
    paths = [folder / f"c{seed}_train_{index:06d}.bin" for index in range(len(sizes))]
    for path, tokens in zip(paths, contents, strict=True):
        write_shard(path, tokens)
    return paths, contents


def brute_force(contents: list[np.ndarray], sequences: int, epochs: int) -> list[tuple[np.ndarray, np.ndarray]]:
    batches = []
    for _ in range(epochs):
        for tokens in contents:
            start = 0
            while start + sequences * T + 1 <= len(tokens):
                rows = [tokens[start + n * T : start + n * T + T + 1].astype(int) for n in range(sequences)]
                batches.append((np.array([row[:-1] for row in rows]), np.array([row[1:] for row in rows])))
                start += sequences * T
    return batches


def assert_same(got: list[tuple[np.ndarray, np.ndarray]], expected: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert len(got) == len(expected)
    for pair, truth in zip(got, expected, strict=True):
        for array, true_array in zip(pair, truth, strict=True):
            assert array.dtype == np.int32
            np.testing.assert_array_equal(array, true_array)


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Sizes near multiples of the batch, where a batch just fits or just does not.
shard_sizes = st.lists(
    st.builds(lambda blocks, extra: max(1, blocks * T + extra), st.integers(0, 9), st.integers(-1, 2)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(sizes=shard_sizes, sequences=st.integers(1, 4), epochs=st.integers(1, 3))
def test_batches_and_resume_everywhere(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], sequences: int, epochs: int
) -> None:
    paths, contents = make_shards(tmp_path_factory.mktemp("shards"), sizes)
    expected = brute_force(contents, sequences, epochs)
    if not expected:
        assert "out of data" in error_of(lambda: TokenBatches(paths, sequences, T, epochs=epochs))
        return
    batches = TokenBatches(paths, sequences, T, epochs=epochs)
    assert batches.steps == len(expected)
    positions, got = [batches.position()], []
    for batch in batches:
        got.append(batch)
        positions.append(batches.position())
    assert_same(got, expected)
    for step, position in enumerate(positions):
        resumed = TokenBatches(paths, sequences, T, epochs=epochs)
        resumed.seek(json.loads(json.dumps(position)))
        assert resumed.position() == position
        assert_same(list(resumed), expected[step:])


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_rows_of_processes_make_the_batch(tmp_path: Path, processes: int) -> None:
    paths, contents = make_shards(tmp_path, [8 * T * 2 + 1, 8 * T * 3])
    share = 8 // processes
    readers = [TokenBatches(paths, 8, T, rows=range(rank * share, (rank + 1) * share)) for rank in range(processes)]
    assert len({json.dumps(reader.position()) for reader in readers}) == 1
    parts = [list(reader) for reader in readers]
    assert all(tokens_NT.shape == (share, T) for part in parts for tokens_NT, _ in part)
    joined = [
        (np.concatenate([pair[0] for pair in step]), np.concatenate([pair[1] for pair in step]))
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, brute_force(contents, 8, 1))
    # A position taken by one number of processes serves any other.
    whole = TokenBatches(paths, 8, T)
    next(whole)
    readers[-1].seek(whole.position())
    np.testing.assert_array_equal(next(readers[-1])[0], brute_force(contents, 8, 1)[1][0][-share:])


def test_rows_in_any_order_of_devices(tmp_path: Path) -> None:
    paths, contents = make_shards(tmp_path, [8 * T * 2 + 1])
    rows = [1, 2, 5, 7]
    got = list(TokenBatches(paths, 8, T, rows=rows))
    assert_same(got, [(tokens[rows], targets[rows]) for tokens, targets in brute_force(contents, 8, 1)])


@pytest.mark.parametrize("rows", [[], [8], [-1, 0]])
def test_rows_must_be_of_the_batch(tmp_path: Path, rows: list[int]) -> None:
    paths, _ = make_shards(tmp_path, [8 * T + 1])
    with pytest.raises(ValueError, match="some of them"):
        TokenBatches(paths, 8, T, rows=rows)


def test_ids_are_checked_in_every_shard_or_when_read(tmp_path: Path) -> None:
    """Processes share the work of looking at every id; whoever reads a bad one still sees it."""
    paths, _ = make_shards(tmp_path, [4 * T + 1] * 3)
    bad = np.zeros(4 * T + 1, int)
    bad[3 * T] = 60000
    bad_shard(paths[1], [20240520, 1, bad.size], bad)
    for check in (slice(None), slice(1, None, 2)):
        assert "id 60000 at token 384" in error_of(functools.partial(TokenBatches, paths, 2, T, check=check))
    batches = TokenBatches(paths, 2, T, check=slice(0, None, 2))
    assert [next(batches)[0].shape for _ in range(3)] == [(2, T)] * 3
    assert f"{paths[1]}: id 60000 at token 384" in error_of(lambda: next(batches))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2 * T)


def replace(path: Path) -> None:
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    copy.rename(path)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2000)
        file.write(b"\1\2")


@pytest.mark.parametrize(
    ("change", "reason"),
    [(truncate, "bytes"), (replace, "was replaced"), (overwrite, "was written to"), (Path.unlink, "No such file")],
)
def test_a_shard_that_changes_while_it_is_read(tmp_path: Path, change: Callable[[Path], object], reason: str) -> None:
    paths, _ = make_shards(tmp_path, [8 * T + 1, 8 * T + 1])
    os.utime(paths[0], ns=(0, 0))  # so that the change shows on a file system with coarse times
    batches = TokenBatches(paths, 2, T)
    next(batches)
    change(paths[0])
    message = error_of(lambda: next(batches))
    assert str(paths[0]) in message
    assert reason in message
    assert "--resume" in message


def test_out_of_data_is_said_before_training(tmp_path: Path) -> None:
    paths, _ = make_shards(tmp_path, [2 * T * 3 + 5, 2 * T + 1])
    batches = TokenBatches(paths, 2, T)
    batches.require_steps(4)
    message = error_of(lambda: batches.require_steps(5))
    for part in (
        "out of data",
        "1,280 tokens",
        f"{6 * T + 5 + 2 * T + 1:,} tokens",
        "--steps 4",
        "--epochs 2",
        "--data",
    ):
        assert part in message
    TokenBatches(paths, 2, T, epochs=2).require_steps(8)
    next(batches)
    batches.require_steps(4)  # counted from the start of training, wherever the reader is


@pytest.mark.parametrize("length", [0, -128, 1, 127, 200])
def test_bad_sequence_length(tmp_path: Path, length: int) -> None:
    paths, _ = make_shards(tmp_path, [1000])
    assert f"sequence length {length}: must be a positive multiple of 128" in error_of(
        lambda: TokenBatches(paths, 1, length)
    )
    assert "multiple of 128" in error_of(lambda: validation_sequences(paths, length, 1000))


def test_bad_counts(tmp_path: Path) -> None:
    paths, _ = make_shards(tmp_path, [1000])
    assert "0 sequences" in error_of(lambda: TokenBatches(paths, 0, T))
    assert "--epochs 0" in error_of(lambda: TokenBatches(paths, 1, T, epochs=0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shard": 2}, "not in these shards"),
        ({"shard": -1}, "not in these shards"),
        ({"shard_tokens": 999}, "not in these shards"),
        ({"shard": 1}, "not in these shards"),  # the size is that of shard 0
        ({"offset": T}, "no start of a batch"),
        ({"offset": -2 * T}, "no start of a batch"),
        ({"offset": 6 * T}, "no start of a batch"),
        ({"epoch": -1}, "no start of a batch"),
        ({"epoch": 2}, "no start of a batch"),
    ],
)
def test_position_of_other_data(tmp_path: Path, change: dict[str, int], reason: str) -> None:
    paths, _ = make_shards(tmp_path, [6 * T + 1, 4 * T + 1])
    batches = TokenBatches(paths, 2, T)
    next(batches)
    position = batches.position()
    assert reason in error_of(lambda: batches.seek(position | change))
    assert "--resume" in error_of(lambda: batches.seek({}))
    assert batches.position() == position
    batches.seek({"epoch": 1, "shard": 0, "offset": 0, "shard_tokens": 6 * T + 1})
    assert list(batches) == []


def bad_shard(path: Path, header: list[int], tokens: np.ndarray, dtype: str = "<u2") -> Path:
    full = np.zeros(256, "<i4")
    full[: len(header)] = header
    path.write_bytes(full.tobytes() + tokens.astype(dtype).tobytes())
    return path


TOKENS = np.arange(1000)


@pytest.mark.parametrize(
    ("header", "tokens", "reason"),
    [
        ([20240521, 1, 1000], TOKENS, "magic number 20240521"),
        ([20240520, 2, 1000], TOKENS, "version 2"),
        ([20240520, 1, 1001], TOKENS, "1001 tokens, the file holds 1000"),
        ([20240520, 1, 999], TOKENS, "999 tokens, the file holds 1000"),
        ([20240520, 1, -1], TOKENS, "-1 tokens"),
        ([20240520, 1, 0], TOKENS[:0], "empty"),
        ([20240520, 1, 1000], np.where(TOKENS == 700, 50257, TOKENS), "id 50257 at token 700"),
    ],
)
def test_bad_shards(tmp_path: Path, header: list[int], tokens: np.ndarray, reason: str) -> None:
    good, _ = make_shards(tmp_path, [1000])
    path = bad_shard(tmp_path / "bad_train_000001.bin", header, tokens)
    for call in (
        lambda: read_shard(path),
        lambda: TokenBatches([*good, path], 1, T),
        lambda: validation_sequences([path], T, 1000),
    ):
        message = error_of(call)
        assert reason in message
        assert str(path) in message


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    assert "absent.bin: cannot be read" in error_of(lambda: read_shard(tmp_path / "absent.bin"))
    assert "cannot be read" in error_of(lambda: read_shard(tmp_path))
    short = tmp_path / "short.bin"
    for size in (0, 1, 1023):
        short.write_bytes(bytes(size))
        assert f"short.bin: {size} bytes, too short" in error_of(lambda: read_shard(short))
    short.write_bytes(np.array([20240520, 1, 2], "<i4").tobytes() + bytes(1012) + bytes(3))
    assert "holds 1.5" in error_of(lambda: read_shard(short))


def test_every_id_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_speedrun.data.shards.SCAN_TOKENS", 100)
    path = tmp_path / "x.bin"
    for where in (0, 99, 100, 250):
        tokens = np.full(251, 50256)
        bad_shard(path, [20240520, 1, 251], tokens)
        np.testing.assert_array_equal(read_shard(path), tokens)
        tokens[where] = 65535
        bad_shard(path, [20240520, 1, 251], tokens)
        for call in (lambda: read_shard(path), lambda: TokenBatches([path], 1, T)):
            assert f"id 65535 at token {where}" in error_of(call)


def test_write_shard_is_byte_exact_and_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a_train_000001.bin"
    write_shard(path, np.array([50256, 0, 258]))
    assert path.read_bytes() == bad_shard(tmp_path / "b", [20240520, 1, 3], np.array([50256, 0, 258])).read_bytes()
    for tokens in (np.array([], int), np.array([1, 50257]), np.array([-1])):
        with pytest.raises(ValueError, match="token"):
            write_shard(tmp_path / "c.bin", tokens)

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_shard(path, np.array([1, 2]))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a_train_000001.bin", "b"]


@pytest.mark.parametrize("length", [1, 100, 300, 301, 450, 1000])
def test_first_tokens_go_round(tmp_path: Path, length: int) -> None:
    _, contents = make_shards(tmp_path, [300, 150])
    everything = np.concatenate(contents).astype(np.int64)
    got = first_tokens(tmp_path, length)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, everything[np.arange(length) % 450])


def test_find_shards(tmp_path: Path) -> None:
    assert "--data" in error_of(lambda: find_shards(tmp_path / "absent", "train"))
    assert "no *_val_*.bin" in error_of(lambda: find_shards(tmp_path, "val"))
    (tmp_path / "a_val_000000.bin.xz").touch()
    assert "xz -dk" in error_of(lambda: find_shards(tmp_path, "val"))
    for name in ("b_train_000002.bin", "b_train_000010.bin", "a_train_000003.bin", "a_val_000000.bin", "notes.bin"):
        (tmp_path / name).touch()
    names = [path.name for path in find_shards(tmp_path, "train")]
    assert names == ["a_train_000003.bin", "b_train_000002.bin", "b_train_000010.bin"]
    assert [path.name for path in find_shards(tmp_path, "val")] == ["a_val_000000.bin"]


def test_tiny_data_in_the_package() -> None:
    (val,) = find_shards(TINY, "val")
    assert read_shard(val).size == 131_073
    assert read_shard(val)[0] == 50256
    assert TokenBatches(find_shards(TINY, "train"), 8, 1024).steps == 128
    assert validation_sequences([val], 1024, 10_485_760)[0].shape == (128, 1024)


def test_validation_sequences(tmp_path: Path) -> None:
    paths, contents = make_shards(tmp_path, [5 * T, 9 * T])
    for limit, count in [(T, 1), (2 * T - 1, 1), (3 * T, 3), (4 * T, 4), (5 * T, 4), (10_485_760, 4)]:
        inputs = contents[0][: count * T].reshape(count, T)
        targets = contents[0][1 : count * T + 1].reshape(count, T)
        assert_same([validation_sequences(paths, T, limit)], [(inputs, targets)])
        assert validation_count(paths, T, limit) == count
        rows = [0, count - 1]
        assert_same([validation_sequences(paths, T, limit, rows)], [(inputs[rows], targets[rows])])
    assert str(paths[0]) in error_of(lambda: validation_sequences(paths, 5 * T, 10_000))
    assert str(paths[0]) in error_of(lambda: validation_sequences(paths, T, T - 1))


def placed(batch: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return batch


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_keeps_order_and_positions(tmp_path: Path, depth: int) -> None:
    paths, contents = make_shards(tmp_path, [7 * T + 1, 3, 4 * T + 1])
    expected = brute_force(contents, 2, 2)
    items = list(prefetch(TokenBatches(paths, 2, T, epochs=2), placed, depth))
    assert_same([batch for _, batch in items], expected)
    for consumed in range(1, len(expected) + 1):
        stream = prefetch(TokenBatches(paths, 2, T, epochs=2), placed, depth)
        *_, (position, _batch) = itertools.islice(stream, consumed)
        assert position == items[consumed - 1][0]
        resumed = TokenBatches(paths, 2, T, epochs=2)
        resumed.seek(position)
        assert_same([batch for _, batch in prefetch(resumed, placed, depth)], expected[consumed:])
    del stream
    assert prefetch_threads() == []


def test_prefetch_runs_ahead_in_its_thread_and_no_further_than_depth(tmp_path: Path) -> None:
    paths, _ = make_shards(tmp_path, [20 * T + 1])
    calls: list[str] = []

    def put(batch: tuple[np.ndarray, np.ndarray]) -> int:
        calls.append(threading.current_thread().name)
        return len(calls)

    stream = prefetch(TokenBatches(paths, 1, T), put, depth=3)
    assert next(stream)[1] == 1
    deadline = time.monotonic() + 10
    while len(calls) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(calls) == 4  # the one taken and three ahead
    assert all(name.startswith("prefetch") for name in calls)
    stream.close()
    assert prefetch_threads() == []
    assert len(calls) == 4


def test_prefetch_passes_errors_on_in_their_place(tmp_path: Path) -> None:
    paths, _ = make_shards(tmp_path, [10 * T + 1])
    count = itertools.count()

    def put(batch: tuple[np.ndarray, np.ndarray]) -> int:
        if (number := next(count)) == 3:
            raise RuntimeError("device lost")
        return number

    stream = prefetch(TokenBatches(paths, 1, T), put)
    assert [next(stream)[1] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="device lost"):
        next(stream)
    assert prefetch_threads() == []


def test_prefetch_stops_when_the_consumer_breaks_off(tmp_path: Path) -> None:
    paths, _ = make_shards(tmp_path, [10 * T + 1])
    for _ in prefetch(TokenBatches(paths, 1, T), placed):
        break
    assert prefetch_threads() == []
    stream = prefetch(TokenBatches(paths, 1, T), placed)
    next(stream)
    with pytest.raises(KeyError):
        stream.throw(KeyError)
    assert prefetch_threads() == []
