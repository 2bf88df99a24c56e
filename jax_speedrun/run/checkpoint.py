"""Checkpoints of a run with Orbax: written in the background, complete or not there at all.

A checkpoint holds the training state (parameters, optimiser state, step), and
beside it a manifest: what the host needs to go on (the configuration, the
position in the data, the clock), and the size and SHA-256 of every file. Orbax
checks no more than the parts it happens to read, and a flipped bit in a weight
looks like any other weight.

The manifest is written last. So a checkpoint without one was cut short, by a kill
while Orbax was writing or just after: it is never resumed from, and goes when the
run is resumed from the one before, which is kept until the manifest is there.
"""

import hashlib
import json
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from orbax.checkpoint import v1 as ocp

from ..errors import UsageError
from . import distributed

KEPT = 2
"""Checkpoints kept: the last one, and the one before should the last turn out to be bad."""
MANIFEST = "manifest.txt"

Metadata = dict[str, Any]


class Saved(NamedTuple):
    """A complete checkpoint: the step after which it was saved, and what the host saved with it."""

    step: int
    metadata: Metadata


class Checkpoints:
    """Saves and restores the checkpoints under a run's folder. A context manager: leaving it waits for the last write.

    In a run of several processes all of them call every method, in the same order.
    """

    def __init__(self, run_directory: Path):
        self.directory = run_directory / "checkpoints"
        # What Orbax raises it also logs, with a traceback for each of its threads.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._checkpointer = ocp.training.Checkpointer(
            self.directory.resolve(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(KEPT),
        )
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if distributed.fails_alone(error):
            return  # the others will not come to finish the write
        try:
            self.wait()
            self._checkpointer.close()
        except Exception:
            if error is None:
                raise
        finally:
            self._background.shutdown()

    def save(self, step: int, state: object, metadata: Metadata) -> None:
        """Start writing `state` (any pytree of arrays) and return once the arrays may be donated again.

        Raises:
          UsageError: this checkpoint or the one before cannot be written, such as on a full disk.
        """
        self.wait()
        try:
            response = self._checkpointer.save_async(step, state, force=True)
        except Exception as error:
            raise self._cannot_write(step, error) from error
        assert response is not None
        self._writing = self._background.submit(self._finish, step, response, metadata)

    def check(self) -> None:
        """Raise UsageError if a write has failed; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved is complete on disk. Raises UsageError if it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore[State](self, step: int, abstract_state: State) -> State:
        """Return the state of `step`, with shapes, dtypes and shardings of `abstract_state`, a `Program.saved`."""
        return self._checkpointer.load(step, abstract_state)

    def _finish(self, step: int, response: ocp.AsyncResponse[bool], metadata: Metadata) -> None:
        try:
            response.result()
            if distributed.is_main_process():
                _write_manifest(self.directory / str(step), metadata)
        except Exception as error:
            raise self._cannot_write(step, error) from error

    def _cannot_write(self, step: int, error: Exception) -> UsageError:
        return UsageError(
            f"{self.directory}: the checkpoint of step {step} cannot be written ({distributed.first_line(error)}); "
            f"make room and --resume {self.directory.parent}: earlier checkpoints are kept"
        )


def latest(run_directory: Path, step: int | None = None) -> Saved:
    """Return the newest complete checkpoint of a run, or that of `step`. `verify` looks at its files.

    Raises:
      UsageError: if the folder holds none, or the manifest is damaged.
    """
    directory = run_directory / "checkpoints"
    steps = _complete_steps(directory)
    if not steps:
        raise UsageError(f"--resume {run_directory}: no complete checkpoint under {directory}; start the run anew")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise UsageError(f"--resume-step {step}: no complete checkpoint of it under {directory}; there is {there}")
    chosen = steps[-1] if step is None else step
    manifest = _read_manifest(directory / str(chosen))
    if manifest is None:
        raise _damaged(run_directory, chosen, directory / str(chosen) / MANIFEST, "its bytes have changed")
    return Saved(chosen, manifest["metadata"])


def verify(run_directory: Path, step: int) -> None:
    """Read the whole checkpoint of `step` and compare it with its manifest.

    Raises:
      UsageError: a file is missing or has changed; the message names it, and an earlier checkpoint that is whole.
    """
    if (damage := _damage(run_directory / "checkpoints" / str(step))) is not None:
        raise _damaged(run_directory, step, *damage)


def discard_after(run_directory: Path, step: int) -> None:
    """Delete what a killed run left behind: writes cut short, and checkpoints of steps after `step`."""
    directory = run_directory / "checkpoints"
    complete = _complete_steps(directory)
    for path in directory.iterdir() if directory.is_dir() else ():
        if not path.is_dir():
            continue
        if path.name.isdigit() and int(path.name) in complete and int(path.name) <= step:
            continue
        # First, so that one killed in here leaves nothing that looks complete.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def _complete_steps(directory: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in directory.glob(f"*/{MANIFEST}") if path.parent.name.isdigit())


def _write_manifest(checkpoint: Path, metadata: Metadata) -> None:
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    content = json.dumps({"metadata": metadata, "files": files}, indent=1).encode() + b"\n"
    partial = checkpoint / f".{MANIFEST}.tmp"
    partial.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    partial.replace(checkpoint / MANIFEST)


def _read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """Return what a checkpoint's manifest holds, None if it is damaged."""
    try:
        digest, _, content = (checkpoint / MANIFEST).read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest != hashlib.sha256(content).hexdigest().encode():
        return None
    manifest: dict[str, Any] = json.loads(content)
    return manifest


def _damage(checkpoint: Path) -> tuple[Path, str] | None:
    """Return the first file that is not as it was written, and what is wrong with it."""
    manifest = _read_manifest(checkpoint)
    if manifest is None:
        return checkpoint / MANIFEST, "its bytes have changed"

    def compare(name: str) -> tuple[Path, str] | None:
        path, was = checkpoint / name, manifest["files"][name]
        try:
            if (size := path.stat().st_size) != was["bytes"]:
                return path, f"it has {size:,} bytes, not {was['bytes']:,}"
            return None if _sha256(path) == was["sha256"] else (path, "its bytes have changed")
        except OSError as error:
            return path, f"{error.strerror}"

    with ThreadPoolExecutor() as pool:
        return next((damage for damage in pool.map(compare, manifest["files"]) if damage is not None), None)


def _damaged(run_directory: Path, step: int, path: Path, what: str) -> UsageError:
    directory = run_directory / "checkpoints"
    earlier = (s for s in reversed(_complete_steps(directory)) if s < step and _damage(directory / str(s)) is None)
    whole = next(earlier, None)
    way_out = "no earlier one is whole: start the run anew"
    if whole is not None:
        way_out = f"that of step {whole} is whole: --resume {run_directory} --resume-step {whole}"
    return UsageError(f"--resume {run_directory}: the checkpoint of step {step} is damaged ({path}: {what}); {way_out}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
