"""What a run's data is: its folder, and the name, the size and a digest of samples of every shard.

A run is trained on one text. So its checkpoints and config.json hold this record; a resumed run compares it with the
data it is given, and several processes compare theirs. The same shards in another folder are the same data.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import UsageError, system_reason
from .batches import find_shards

SAMPLES = 16
SAMPLE_BYTES = 4096
"""Read of a shard, evenly spaced from its first byte to its last: any other text differs there. Smaller ones whole."""

type Fingerprint = Mapping[str, Any]
"""As JSON values: `folder`, and `shards` with `bytes` and `samples_sha256` of each name."""


def fingerprint(folder: Path) -> dict[str, Any]:
    """Return the `Fingerprint` of a folder's training and validation shards.

    Raises:
      UsageError: no such shards, or one that cannot be read.
    """
    shards = [path for split in ("train", "val") for path in find_shards(folder, split)]
    with ThreadPoolExecutor(32) as pool:  # a network's file system answers each in a few ms
        facts = list(pool.map(_facts, shards))
    return {
        "folder": str(folder.absolute()),
        "shards": {path.name: facts for path, facts in zip(shards, facts, strict=True)},
    }


def difference(was: Fingerprint, now: Fingerprint) -> str | None:
    """Return the first shard of `now` that is not as it was, and how it differs; None if all are the same."""
    before, after = was["shards"], now["shards"]
    for name, facts in before.items():
        if name not in after:
            return f"{name} is missing"
        if after[name]["bytes"] != facts["bytes"]:
            return f"{name} has {after[name]['bytes']:,} bytes, not {facts['bytes']:,}"
        if after[name] != facts:
            return f"{name} holds other tokens"
    added = [name for name in after if name not in before]
    return f"{added[0]} is new" if added else None


def require_same(fingerprints: Sequence[Fingerprint]) -> None:
    """Raise UsageError, naming process and shard, unless all processes read the same as the first."""
    for process, own in enumerate(fingerprints):
        if (found := difference(fingerprints[0], own)) is not None:
            raise UsageError(
                f"--data: process {process} reads other data than process 0: in its {own['folder']}, {found}; copy the "
                "shards anew"
            )


def _facts(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size <= SAMPLES * SAMPLE_BYTES:
                return {"bytes": size, "samples_sha256": hashlib.sha256(file.read()).hexdigest()}
            digest = hashlib.sha256()
            for sample in range(SAMPLES):
                file.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise UsageError(f"{system_reason(error)}; --data needs shards that can be read") from error
    return {"bytes": size, "samples_sha256": digest.hexdigest()}
