"""Token shards: read and check them, cut them into batches, keep a position that can be saved.

A shard is 256 little-endian int32 of header (magic, version, number of tokens, zeros), then that many
little-endian uint16 GPT-2 token ids. This is the format of the record's FineWeb files.
"""

import bisect
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .errors import UsageError

TINY_DATA = Path(__file__).parent / "tiny"
"""The public-domain shards in the package."""

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
END_OF_TEXT = 50256  # starts every document, and is the largest id there is
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32
SEQUENCE_MULTIPLE = 128  # tokens in an attention block
SCAN_TOKENS = 1 << 22  # bounds the memory touched while checking ids

type Tokens = np.ndarray[tuple[int, ...], np.dtype[np.uint16]]
type Rows = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
type Batch = tuple[Rows, Rows]


def find_shards(directory: Path, split: str) -> list[Path]:
    """The shards `*_{split}_*.bin` of a folder, in the order in which they are read.

    Raises:
        UsageError: no such folder, or no such shard in it.
    """
    if not directory.is_dir():
        raise UsageError(f"--data {directory}: no such folder; scripts/prepare_data.py fills one")
    if shards := sorted(directory.glob(f"*_{split}_*.bin")):
        return shards
    if packed := sorted(directory.glob(f"*_{split}_*.bin.xz")):
        raise UsageError(
            f"--data {directory}: {packed[0].name} is compressed; unpack with `xz -dk {directory}/*.bin.xz`"
        )
    raise UsageError(f"--data {directory}: no *_{split}_*.bin in it; scripts/prepare_data.py makes shards")


def read_shard(path: Path) -> Tokens:
    """Memory-maps a shard's tokens, every id checked.

    Raises:
        UsageError: not a shard, a damaged one, or one of another tokenizer; the message names the file.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); --data needs .bin shards") from error
    if header.size < HEADER_INTS:
        raise UsageError(f"{path}: {size} bytes, too short for the header of a shard; get the file again")
    magic, version, count = (int(value) for value in header[:3])
    if magic != MAGIC:
        raise UsageError(f"{path}: magic number {magic}, not {MAGIC}: no token shard; make it with prepare_data.py")
    if version != VERSION:
        raise UsageError(f"{path}: shard version {version}, only {VERSION} is known; make it with prepare_data.py")
    if count == 0:
        raise UsageError(f"{path}: an empty shard (0 tokens); delete it or make it again")
    if size != HEADER_BYTES + 2 * count:
        held = (size - HEADER_BYTES) / 2
        raise UsageError(f"{path}: the header says {count} tokens, the file holds {held:.12g}; get the file again")
    tokens: Tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,)).view(np.ndarray)
    for start in range(0, count, SCAN_TOKENS):
        chunk = tokens[start : start + SCAN_TOKENS]
        if int(chunk.max()) > END_OF_TEXT:
            where = start + int(np.argmax(chunk > END_OF_TEXT))
            raise UsageError(f"{path}: id {tokens[where]} at token {where}, GPT-2 ends at {END_OF_TEXT}; make it again")
    return tokens


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes 1 to 2^31 - 1 token ids as a shard, whole or not at all.

    Raises:
        ValueError: no token, too many, or an id outside 0 .. 50256.
    """
    if not 0 < tokens.size <= MAX_SHARD_TOKENS:
        raise ValueError(f"a shard holds 1 to {MAX_SHARD_TOKENS} tokens, not {tokens.size}")
    if int(tokens.min()) < 0 or int(tokens.max()) > END_OF_TEXT:
        raise ValueError(f"token ids must lie in 0 .. {END_OF_TEXT}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            # Not ndarray.tofile: an interrupt inside of it comes out as a TypeError.
            file.write(header)
            file.write(np.ascontiguousarray(tokens, "<u2"))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class TokenBatches(Iterator[Batch]):
    """Batches of N consecutive sequences of T tokens: shards in order, no shuffle, each batch once an epoch.

    A batch needs N T tokens and one more, since the targets are the inputs shifted by one. What a shard has left
    when no whole batch fits is skipped, as in the record.

    Args:
        shards: files, in the order in which they are read; all are checked now.
        sequences: N, of the whole batch.
        sequence_length: T, a multiple of 128.
        epochs: passes over the shards.
        rows: which of the N sequences this process reads; the others are never touched.

    Yields:
        tokens_NT, targets_NT: int32, with as many rows as `rows` picks.

    Raises:
        UsageError: a bad shard, a T that is not a positive multiple of 128, or shards too small for a single batch.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        sequences: int,
        sequence_length: int,
        *,
        epochs: int = 1,
        rows: slice = slice(None),
    ) -> None:
        _check_sequence_length(sequence_length)
        if sequences < 1:
            raise UsageError(f"{sequences} sequences a batch: at least 1 is needed")
        if epochs < 1:
            raise UsageError(f"--epochs {epochs}: at least 1 is needed")
        first, last, stride = rows.indices(sequences)
        if stride != 1 or first >= last:
            raise ValueError(f"rows {rows} of {sequences} sequences: must be one contiguous, non-empty range")
        self._start, self._stop = first * sequence_length, last * sequence_length
        self._sequence_length = sequence_length
        self._batch_tokens = sequences * sequence_length
        self._shards = [read_shard(path) for path in shards]
        # _ends[i]: the batches of an epoch that are over when shard i is.
        self._ends = list(itertools.accumulate((tokens.size - 1) // self._batch_tokens for tokens in self._shards))
        self._epochs = epochs
        if self.steps == 0:
            self.require_steps(1)
        self._step = 0

    @property
    def steps(self) -> int:
        """Batches in all epochs together."""
        return self._epochs * self._ends[-1] if self._ends else 0

    def require_steps(self, steps: int) -> None:
        """Raises UsageError if there are fewer than `steps` batches, counted from the very first."""
        if steps <= self.steps:
            return
        needed, held = steps * self._batch_tokens, sum(tokens.size for tokens in self._shards)
        ways = ["more shards in --data"]
        if self.steps:
            ways = [f"--steps {self.steps}", f"--epochs {-(-steps // self._ends[-1])}", *ways]
        raise UsageError(
            f"out of data: {steps} steps need {needed:,} tokens, but {self._epochs} epoch(s) of the {held:,} tokens in"
            f" --data hold {self.steps} whole batches of {self._batch_tokens:,}; use {' or '.join(ways)}"
        )

    def position(self) -> dict[str, int]:
        """Where the next batch starts, for `seek`: epoch, shard, offset in tokens, and that shard's size as a check."""
        epoch, batch = divmod(self._step, self._ends[-1])
        shard = bisect.bisect_right(self._ends, batch)
        offset = (batch - self._first_batch(shard)) * self._batch_tokens
        return {"epoch": epoch, "shard": shard, "offset": offset, "shard_tokens": self._shards[shard].size}

    def seek(self, position: dict[str, int]) -> None:
        """Continues where `position()` was taken, bit for bit, for any `rows`.

        Raises:
            UsageError: the position is not one of these shards, cut into these batches.
        """
        epoch, shard, offset, shard_tokens = (
            position.get(key, -1) for key in ("epoch", "shard", "offset", "shard_tokens")
        )
        if not (0 <= shard < len(self._shards) and self._shards[shard].size == shard_tokens):
            raise UsageError(f"--resume: its data position {position} is not in these shards; give --data as before")
        batch, rest = divmod(offset, self._batch_tokens)
        step = epoch * self._ends[-1] + self._first_batch(shard) + batch
        at_a_batch = rest == 0 and 0 <= batch < self._ends[shard] - self._first_batch(shard)
        if not (at_a_batch and epoch >= 0 and step <= self.steps):
            raise UsageError(
                f"--resume: its data position {position} is no start of a batch of {self._batch_tokens:,} tokens"
                f" within {self._epochs} epoch(s); give --data, --epochs and the preset as before"
            )
        self._step = step

    def __next__(self) -> Batch:
        if self._step >= self.steps:
            raise StopIteration
        position = self.position()
        offset = position["offset"]
        tokens = self._shards[position["shard"]][offset + self._start : offset + self._stop + 1]
        self._step += 1
        return _inputs_and_targets(tokens, self._sequence_length)

    def _first_batch(self, shard: int) -> int:
        return self._ends[shard - 1] if shard else 0


def validation_sequences(shards: Sequence[Path], sequence_length: int, max_tokens: int) -> Batch:
    """The first sequences of the first shard, at most `max_tokens` tokens, as many as fit whole.

    Returns:
        tokens_NT, targets_NT: int32.

    Raises:
        UsageError: a bad shard, a T that is not a positive multiple of 128, or not one sequence fits.
    """
    _check_sequence_length(sequence_length)
    tokens = read_shard(shards[0])
    count = min(max_tokens, tokens.size - 1) // sequence_length
    if count < 1:
        raise UsageError(
            f"{shards[0]}: validating on at most {max_tokens:,} of its {tokens.size:,} tokens leaves no whole sequence"
            f" of {sequence_length:,} + 1; give a larger validation shard in --data or a preset with shorter sequences"
        )
    return _inputs_and_targets(tokens[: count * sequence_length + 1], sequence_length)


def prefetch[Placed](
    batches: TokenBatches, put: Callable[[Batch], Placed], depth: int = 2
) -> Generator[tuple[dict[str, int], Placed]]:
    """Reads and places batches in a background thread, up to `depth` ahead of the consumer.

    The reader runs ahead, so `batches.position()` is of no use to a checkpoint. Each item therefore carries its own:
    the position of the batch after it, to be saved once the item has been trained on.

    Args:
        batches: read by the thread alone from the first item on.
        put: called in the thread, such as `lambda batch: jax.device_put(batch, sharding)`.
        depth: batches held in advance.

    Yields:
        position_after, put(batch). An exception of the thread is raised here, in the place of its item. Closing the
        generator, or breaking off, ends the thread.
    """

    def read() -> tuple[dict[str, int], Placed] | None:
        batch = next(batches, None)
        return None if batch is None else (batches.position(), put(batch))

    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        pending = deque(pool.submit(read) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(read))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _inputs_and_targets(tokens: Tokens, sequence_length: int) -> Batch:
    window = tokens.astype(np.int32)
    return window[:-1].reshape(-1, sequence_length), window[1:].reshape(-1, sequence_length)


def _check_sequence_length(sequence_length: int) -> None:
    if sequence_length < 1 or sequence_length % SEQUENCE_MULTIPLE:
        raise UsageError(f"sequence length {sequence_length}: must be a positive multiple of {SEQUENCE_MULTIPLE}")
