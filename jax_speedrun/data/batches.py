"""Token shards cut into batches, with a position that can be saved."""

import bisect
import fnmatch
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import UsageError, system_reason
from ..kernels.block_mask import BLOCK_SIZE
from .shards import MAX_SHARD_TOKENS, Shard, Tokens, read_shard, write_shard

__all__ = [
    "MAX_SHARD_TOKENS",
    "TINY_DATA",
    "Batch",
    "TokenBatches",
    "Tokens",
    "find_shards",
    "first_tokens",
    "prefetch",
    "read_shard",
    "validation_count",
    "validation_sequences",
    "write_shard",
]

TINY_DATA = Path(__file__).parent / "tiny"
"""The public-domain shards in the package."""

type Rows = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
type Batch = tuple[Rows, Rows]


def find_shards(directory: Path, split: str) -> list[Path]:
    """Return the shards `*_{split}_*.bin` of a folder, in the order in which they are read.

    Raises:
        UsageError: no such folder, one that cannot be read, or no such shard in it.
    """
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"--data {directory}: no such folder; prepare_data.py fills one") from error
    except OSError as error:
        raise UsageError(f"--data {directory}: cannot be read ({system_reason(error)})") from error
    if shards := fnmatch.filter(names, f"*_{split}_*.bin"):
        return [directory / name for name in shards]
    if packed := fnmatch.filter(names, f"*_{split}_*.bin.xz"):
        raise UsageError(f"--data {directory}: {packed[0]} is compressed; unpack with `xz -dk {directory}/*.bin.xz`")
    raise UsageError(f"--data {directory}: no *_{split}_*.bin in it; prepare_data.py makes shards")


def first_tokens(directory: Path, length: int) -> Rows:
    """Return the first `length` training tokens of a folder, from the start again where they end; for benchmarks.

    Raises:
        UsageError: as `find_shards`, or a bad shard.
    """
    parts: list[Tokens] = []
    for path in find_shards(directory, "train"):
        if sum(map(len, parts)) < length:
            parts.append(read_shard(path)[:length])
    return np.resize(np.concatenate(parts), length).astype(np.int32)


class TokenBatches(Iterator[Batch]):
    """Batches of N consecutive sequences of T tokens: shards in order, no shuffle, each batch once an epoch.

    A batch needs N T tokens and one more, since the targets are the inputs shifted by one. What a shard has left
    when no whole batch fits is skipped, as in the record.

    Args:
        shards: files, in the order in which they are read; all are checked now.
        sequences: N, of the whole batch.
        sequence_length: T, a multiple of 128.
        epochs: passes over the shards.
        rows: which of the N sequences this process reads (default: all); the others are never touched.
        check: of which shards to look at every id now (default: of all); all get the other checks.

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
        rows: Sequence[int] | None = None,
        check: slice = slice(None),
    ) -> None:
        _check_sequence_length(sequence_length)
        if sequences < 1:
            raise UsageError(f"{sequences} sequences a batch: at least 1 is needed")
        if epochs < 1:
            raise UsageError(f"--epochs {epochs}: at least 1 is needed")
        self._rows = list(range(sequences) if rows is None else rows)
        if not self._rows or not 0 <= min(self._rows) <= max(self._rows) < sequences:
            raise ValueError(f"rows {self._rows} of {sequences} sequences: must be some of them")
        self._sequence_length = sequence_length
        self._batch_tokens = sequences * sequence_length
        checked = set(range(len(shards))[check])
        self._shards = [Shard(path, check_ids=index in checked) for index, path in enumerate(shards)]
        # _ends[i]: the batches of an epoch that are over when shard i is.
        self._ends = list(itertools.accumulate((shard.tokens - 1) // self._batch_tokens for shard in self._shards))
        self._epochs = epochs
        if self.steps == 0:
            self.require_steps(1)
        self._step = 0

    @property
    def steps(self) -> int:
        """Return how many batches all epochs have together."""
        return self._epochs * self._ends[-1] if self._ends else 0

    def require_steps(self, steps: int) -> None:
        """Raise UsageError if there are fewer than `steps` batches, counted from the very first."""
        if steps <= self.steps:
            return
        needed, held = steps * self._batch_tokens, sum(shard.tokens for shard in self._shards)
        ways = ["more shards in --data"]
        if self.steps:
            ways = [f"--steps {self.steps}", f"--epochs {-(-steps // self._ends[-1])}", *ways]
        raise UsageError(
            f"out of data: {steps} steps need {needed:,} tokens, but {self._epochs} epoch(s) of the {held:,} tokens in"
            f" --data hold {self.steps} whole batches of {self._batch_tokens:,}; use {' or '.join(ways)}"
        )

    def position(self) -> dict[str, int]:
        """Return where the next batch starts, for `seek`: epoch, shard, offset in tokens; and that shard's size."""
        epoch, batch = divmod(self._step, self._ends[-1])
        shard = bisect.bisect_right(self._ends, batch)
        offset = (batch - self._first_batch(shard)) * self._batch_tokens
        return {"epoch": epoch, "shard": shard, "offset": offset, "shard_tokens": self._shards[shard].tokens}

    def seek(self, position: dict[str, int]) -> None:
        """Continue where `position()` was taken, bit for bit, for any `rows`.

        Raises:
            UsageError: the position is not one of these shards, cut into these batches.
        """
        epoch, shard, offset, shard_tokens = (
            position.get(key, -1) for key in ("epoch", "shard", "offset", "shard_tokens")
        )
        if not (0 <= shard < len(self._shards) and self._shards[shard].tokens == shard_tokens):
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
        starts = [position["offset"] + row * self._sequence_length for row in self._rows]
        tokens = self._shards[position["shard"]].read(starts, self._sequence_length + 1)
        self._step += 1
        return _inputs_and_targets(tokens)

    def _first_batch(self, shard: int) -> int:
        return self._ends[shard - 1] if shard else 0


def validation_count(shards: Sequence[Path], sequence_length: int, max_tokens: int) -> int:
    """Return how many whole sequences of the first shard are validated on, for at most `max_tokens` tokens.

    Raises:
        UsageError: a bad shard, a T that is not a positive multiple of 128, or not one sequence fits.
    """
    _check_sequence_length(sequence_length)
    tokens = Shard(shards[0], check_ids=False).tokens
    count = min(max_tokens, tokens - 1) // sequence_length
    if count < 1:
        raise UsageError(
            f"{shards[0]}: validating on at most {max_tokens:,} of its {tokens:,} tokens leaves no whole sequence"
            f" of {sequence_length:,} + 1; give a larger validation shard in --data or a preset with shorter sequences"
        )
    return count


def validation_sequences(
    shards: Sequence[Path], sequence_length: int, max_tokens: int, rows: Sequence[int] | None = None
) -> Batch:
    """Return the first sequences of the first shard, those of `validation_count`, or only the `rows` among them.

    Returns:
        tokens_NT, targets_NT: int32.

    Raises:
        UsageError: as `validation_count`.
    """
    count = validation_count(shards, sequence_length, max_tokens)
    starts = [row * sequence_length for row in (range(count) if rows is None else rows)]
    return _inputs_and_targets(Shard(shards[0], check_ids=False).read(starts, sequence_length + 1))


def prefetch[Placed](
    batches: TokenBatches, put: Callable[[Batch], Placed], depth: int = 2
) -> Generator[tuple[dict[str, int], Placed]]:
    """Read and place batches in a background thread, up to `depth` ahead of the consumer.

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


def _inputs_and_targets(tokens: Tokens) -> Batch:
    """Cut rows of T + 1 tokens into T inputs and T targets, which are the inputs shifted by one."""
    return tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)


def _check_sequence_length(sequence_length: int) -> None:
    if sequence_length < 1 or sequence_length % BLOCK_SIZE:
        raise UsageError(f"sequence length {sequence_length}: must be a positive multiple of {BLOCK_SIZE}")
