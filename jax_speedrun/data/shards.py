"""A token shard on disk: 256 little-endian int32 of header (magic, version, number of tokens, zeros), then that many
little-endian uint16 GPT-2 token ids. This is the format of the record's FineWeb files.

Shards are read, not mapped into memory: a mapped file that somebody truncates kills the process with SIGBUS.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..atomic_write import atomic_write
from ..errors import UsageError
from ..kernels.block_mask import DOCUMENT_START

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32
SCAN_TOKENS = 1 << 22  # bounds the memory touched while checking ids

PUT_BACK = "put the file back and --resume the run"

type Tokens = np.ndarray[tuple[int, ...], np.dtype[np.uint16]]


class Identity(NamedTuple):
    """What a file must keep while a run reads it."""

    device: int
    inode: int
    bytes: int
    modified_ns: int


class Shard:
    """A shard's file, checked now, and again at each read: a run may take days, and files get replaced.

    Args:
        path: the file.
        check_ids: look at every token id now; else only at those that are read, when they are.

    Raises:
        UsageError: not a shard, a damaged one, or one of another tokenizer; the message names the file.
    """

    def __init__(self, path: Path, *, check_ids: bool = True) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._identity = _identity(file)
                header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror}); --data needs .bin shards") from error
        size = self._identity.bytes
        if header.size < HEADER_INTS:
            raise UsageError(f"{path}: {size} bytes, too short for the header of a shard; get the file again")
        magic, version, self.tokens = (int(value) for value in header[:3])
        if magic != MAGIC:
            raise UsageError(f"{path}: magic number {magic}, not {MAGIC}: no token shard; make it with prepare_data.py")
        if version != VERSION:
            raise UsageError(f"{path}: shard version {version}, only {VERSION} is known; make it with prepare_data.py")
        if self.tokens == 0:
            raise UsageError(f"{path}: an empty shard (0 tokens); delete it or make it again")
        if size != HEADER_BYTES + 2 * self.tokens:
            held = (size - HEADER_BYTES) / 2
            raise UsageError(
                f"{path}: the header says {self.tokens} tokens, the file holds {held:.12g}; get the file again"
            )
        if check_ids:
            for start in range(0, self.tokens, SCAN_TOKENS):
                self.read([start], min(SCAN_TOKENS, self.tokens - start))

    def read(self, starts: Sequence[int], count: int) -> Tokens:
        """Return `count` tokens from each of `starts` on, as (starts, count).

        Raises:
            UsageError: the file is not what it was when it was first looked at, or holds an id that GPT-2 lacks.
        """
        tokens: Tokens = np.zeros((len(starts), count), "<u2")
        try:
            with self.path.open("rb") as file:
                for row, start in zip(tokens, starts, strict=True):
                    file.seek(HEADER_BYTES + 2 * start)
                    file.readinto(row.data)
                # After reading, so that nothing changed meanwhile passes; a truncated file gives no short row either.
                now = _identity(file)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read any more ({error.strerror}); {PUT_BACK}") from error
        if now != self._identity:
            raise UsageError(f"{self.path}: {self._change(now)} while in use; {PUT_BACK}")
        if int(tokens.max()) > DOCUMENT_START:
            which, column = divmod(int(np.argmax(tokens > DOCUMENT_START)), count)
            raise UsageError(
                f"{self.path}: id {tokens[which, column]} at token {starts[which] + column}, GPT-2 ends at "
                f"{DOCUMENT_START}; make it again"
            )
        return tokens

    def _change(self, now: Identity) -> str:
        if now.bytes != self._identity.bytes:
            return f"went from {self._identity.bytes:,} to {now.bytes:,} bytes"
        return "was replaced" if now.inode != self._identity.inode else "was written to"


def _identity(file: BinaryIO) -> Identity:
    status = os.fstat(file.fileno())
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_shard(path: Path) -> Tokens:
    """Return all tokens of a shard, checked as by `Shard`, which see for the errors."""
    shard = Shard(path, check_ids=False)
    return shard.read([0], shard.tokens)[0]


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write 1 to 2^31 - 1 token ids as a shard, whole or not at all.

    Raises:
        ValueError: no token, too many, or an id outside 0 .. `DOCUMENT_START`, the largest there is.
    """
    if not 0 < tokens.size <= MAX_SHARD_TOKENS:
        raise ValueError(f"a shard holds 1 to {MAX_SHARD_TOKENS} tokens, not {tokens.size}")
    if int(tokens.min()) < 0 or int(tokens.max()) > DOCUMENT_START:
        raise ValueError(f"token ids must lie in 0 .. {DOCUMENT_START}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            # Not ndarray.tofile: an interrupt inside of it comes out as a TypeError.
            file.write(header)
            file.write(np.ascontiguousarray(tokens, "<u2"))

    atomic_write(path, write)
