"""The record's FineWeb shards, already encoded, from the Hugging Face hub."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from rich.console import Console

from ..errors import UsageError
from .batches import read_shard
from .tokenise import incoming_folder

FINEWEB_REPOSITORY = "kjj0/fineweb10B-gpt2"
FINEWEB_REVISION = "main"
"""Of the repository: a branch, a tag or, to be sure of the very same bytes for ever, a commit."""
FINEWEB_TRAIN_SHARDS = 103


def fetch_fineweb(out: Path, shards: int, revision: str = FINEWEB_REVISION) -> list[Path]:
    """Download FineWeb-10B's validation shard and the first `shards` training shards of 100 M tokens each.

    Files already in `out` that are whole and right (size, sha256) are kept, any other is fetched. A run that was cut
    short thus goes on with the file it was at, from its start; within a run a dropped connection goes on where it was.
    A file only appears in `out` once it is verified.

    Raises:
        UsageError: no network, an error of the hub, a file that is not what the hub says, a bad output folder.
    """
    if not 1 <= shards <= FINEWEB_TRAIN_SHARDS:
        raise UsageError(f"--shards {shards}: FineWeb-10B has 1 to {FINEWEB_TRAIN_SHARDS} training shards")
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{index:06d}.bin" for index in range(1, shards + 1))]
    with _hub_errors("the list of files"):
        entries = huggingface_hub.HfApi().get_paths_info(
            FINEWEB_REPOSITORY, names, revision=revision, repo_type="dataset"
        )
    facts = {entry.path: entry.lfs for entry in entries if isinstance(entry, huggingface_hub.RepoFile) and entry.lfs}
    if missing := [name for name in names if name not in facts]:
        raise UsageError(f"{missing[0]}: not in {FINEWEB_REPOSITORY}; ask for fewer --shards")
    console = Console(stderr=True, highlight=False)
    with incoming_folder(out) as incoming:
        for name in names:
            lfs = facts[name]
            if _is_intact(out / name, lfs.size, lfs.sha256):
                console.print(f"{name}: already there, verified")
                continue
            with _hub_errors(name):
                path = Path(
                    huggingface_hub.hf_hub_download(
                        FINEWEB_REPOSITORY, name, revision=revision, repo_type="dataset", local_dir=incoming
                    )
                )
            if not _is_intact(path, lfs.size, lfs.sha256):
                raise UsageError(f"{name}: what came differs from the size or sha256 the hub gives; try again later")
            read_shard(path)
            path.replace(out / name)
            console.print(f"{name}: fetched, verified")
    return [out / name for name in names]


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's package has changed the library under it before, and so its errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"{what} cannot be fetched from {FINEWEB_REPOSITORY} ({reason}); try again") from error


def _is_intact(path: Path, size: int, sha256: str) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
