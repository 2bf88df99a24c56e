"""Checkpoints of a run with Orbax: written in the background, complete or not there at all.

A checkpoint holds the training state (parameters, optimiser state, step), and
beside it a manifest: what the host needs to go on (the configuration, the data,
the position in it, the clock), and the size and SHA-256 of every file. Orbax
checks no more than the parts it happens to read, and a flipped bit in a weight
looks like any other weight.

The manifest is written last, and only once Orbax has found every array again in
what it wrote. So a checkpoint without one was cut short, by a kill while Orbax was
writing or just after: it is never resumed from, and goes when the run is resumed
from the one before, which is kept until the manifest is there.
"""

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from ..errors import UsageError, system_reason
from . import distributed

KEPT = 2
"""Checkpoints kept: the last one, and the one before should the last turn out to be bad."""
MANIFEST = "manifest.txt"
MISREAD = "*?[\\"
"""Orbax takes a path for a pattern, TensorStore a backslash for a slash: what they write they do not find again."""
CLOUDS = ("gs", "s3", "az", "hf")
"""Orbax takes /gs/ at the root, and gs: anywhere, for storage in a cloud."""

Metadata = dict[str, Any]
METADATA_KEYS = {"config", "data", "data_position", "clock"}


class Saved(NamedTuple):
    """A complete checkpoint: the step after which it was saved, and what the host saved with it."""

    step: int
    metadata: Metadata


class Options(NamedTuple):
    """How the command at hand names a run's folder and a step, and what else there is to do; for messages."""

    folder: str = "--resume {run}"
    step: str = "--resume-step {step}"
    without: str = "--out {run} --auto-resume begins it again"


RESUMED = Options()


def require_usable(run_directory: Path) -> None:
    """Raise UsageError if checkpoints under a folder of this name could not be read back."""
    path = run_directory.absolute()
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"--out {str(path)!a}: its name is not UTF-8; name another folder") from error
    if misread := [character for character in MISREAD if character in str(path)]:
        raise UsageError(
            f"--out {run_directory}: checkpoints cannot be kept under a path with {misread[0]!r} in it, {path}; name "
            "another folder"
        )
    if (path.parts[1:2] and path.parts[1] in CLOUDS) or any(f"{cloud}:" in path.parts for cloud in CLOUDS):
        raise UsageError(f"--out {run_directory}: {path} would be taken for storage in a cloud; name another folder")


class Checkpoints:
    """Saves the checkpoints under a run's folder. A context manager: leaving it waits for the last write.

    In a run of several processes all of them call every method, in the same order.

    Raises:
      UsageError: the folder cannot be written.
    """

    def __init__(self, run_directory: Path):
        self.directory = run_directory / "checkpoints"
        _silence()
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.directory.absolute(),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=ocp.training.preservation_policies.LatestN(KEPT),
            )
        except OSError as error:
            raise UsageError(f"--out {run_directory}: cannot write there ({system_reason(error)})") from error
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
        self._writing = self._background.submit(self._finish, step, response, _structure(state), metadata)

    def check(self) -> None:
        """Raise UsageError if a write has failed; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved is complete on disk. Raises UsageError if it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _finish(
        self, step: int, response: ocp.AsyncResponse[bool], structure: dict[str, str], metadata: Metadata
    ) -> None:
        try:
            response.result()
            if distributed.is_main_process():
                checkpoint = self.directory / str(step)
                if (found := _difference(_structure_on_disk(checkpoint), structure)) is not None:
                    raise OSError(f"Orbax does not find again what it wrote: {found}")
                _write_manifest(checkpoint, metadata)
        except Exception as error:
            raise self._cannot_write(step, error) from error

    def _cannot_write(self, step: int, error: Exception) -> UsageError:
        return UsageError(
            f"{self.directory}: the checkpoint of step {step} cannot be written ({distributed.first_line(error)}); "
            f"see to room and permissions and --resume {self.directory.parent}: earlier checkpoints are kept"
        )


def latest(run_directory: Path, step: int | None = None, options: Options = RESUMED) -> Saved:
    """Return the newest complete checkpoint of a run, or that of `step`. `verify` looks at its files.

    Raises:
      UsageError: the folder holds none or cannot be read, the manifest is damaged, or of another version.
    """
    directory = run_directory / "checkpoints"
    steps = complete_steps(run_directory)
    named = options.folder.format(run=run_directory)
    if not steps:
        way_out = options.without.format(run=run_directory)
        raise UsageError(f"{named}: no complete checkpoint under {directory}; {way_out}")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        wanted = options.step.format(step=step)
        raise UsageError(f"{wanted}: no complete checkpoint of it under {directory}; there is {there}")
    chosen = steps[-1] if step is None else step
    manifest = _read_manifest(directory / str(chosen))
    if manifest is None:
        raise _damaged(run_directory, chosen, directory / str(chosen) / MANIFEST, "its bytes have changed", options)
    metadata = manifest["metadata"]
    if missing := sorted(METADATA_KEYS - metadata.keys()):
        raise UsageError(
            f"{named}: the checkpoint of step {chosen} is of another version of this program (it does not hold "
            f"{', '.join(missing)}); go on with the version that wrote it, see {run_directory / 'config.json'}"
        )
    return Saved(chosen, metadata)


def complete_steps(run_directory: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints, in order.

    Raises:
      UsageError: the folder cannot be read.
    """
    directory = run_directory / "checkpoints"
    try:
        names = os.listdir(directory)
        return sorted(int(name) for name in names if _is_step(name) and _there(directory / name / MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(error) from error


def verify(run_directory: Path, step: int, options: Options = RESUMED) -> None:
    """Read the whole checkpoint of `step` and compare it with its manifest.

    Raises:
      UsageError: a file is missing, has changed or cannot be read; the message names it, and an earlier checkpoint
        that is whole.
    """
    if (damage := _damage(run_directory / "checkpoints" / str(step))) is not None:
        raise _damaged(run_directory, step, *damage, options)


def restore[State](run_directory: Path, step: int, abstract_state: State) -> State:
    """Return the state of `step`, with shapes, dtypes and shardings of `abstract_state`, a `Program.saved`.

    All processes of a run call it alike. `verify` the checkpoint before.

    Raises:
      UsageError: the checkpoint holds other arrays, as one of another version may.
    """
    _silence()
    checkpoint = run_directory / "checkpoints" / str(step)
    try:
        found = _difference(_structure_on_disk(checkpoint), _structure(abstract_state))
        if found is None:
            return ocp.load(checkpoint.absolute(), abstract_state)
    except (KeyError, OSError, ValueError) as error:
        found = distributed.first_line(error)
    raise UsageError(
        f"{checkpoint}: not a state that this version of the program can load ({found}); use the version that wrote "
        f"it, see {run_directory / 'config.json'}"
    )


def discard_after(run_directory: Path, step: int) -> None:
    """Delete what a killed run left behind: writes cut short, and checkpoints of steps after `step`.

    Raises:
      UsageError: something cannot be deleted.
    """
    directory = run_directory / "checkpoints"
    complete = complete_steps(run_directory)
    try:
        for path in directory.iterdir() if directory.is_dir() else ():
            if not path.is_dir():
                continue
            if _is_step(path.name) and int(path.name) in complete and int(path.name) <= step:
                continue
            # First, so that one killed in here leaves nothing that looks complete.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
    except OSError as error:
        raise UsageError(f"{system_reason(error)}; it is of a later step and has to go: delete it") from error


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _there(path: Path) -> bool:
    """Return whether there is such a file. Raises OSError where that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _unreadable(error: OSError) -> UsageError:
    return UsageError(f"{system_reason(error)}; a checkpoint there has to be readable: see to its permissions")


def _silence() -> None:
    """Keep Orbax from logging what it also raises, with a traceback for each of its threads."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _structure(state: object) -> dict[str, str]:
    """Return shape and dtype of every array of a tree, by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _structure_on_disk(checkpoint: Path) -> dict[str, str]:
    """Return what `_structure` says of the arrays that Orbax finds, empty where it finds none."""
    return _structure(ocp.metadata(checkpoint.absolute()).metadata)


def _difference(found: dict[str, str], wanted: dict[str, str]) -> str | None:
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            return f"{name} is {found.get(name, 'missing')}, not {wanted.get(name, 'there')}"
    return None


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
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(error) from error
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
        except PermissionError as error:
            raise _unreadable(error) from error
        except OSError as error:
            return path, f"{error.strerror}"

    with ThreadPoolExecutor() as pool:
        return next((damage for damage in pool.map(compare, manifest["files"]) if damage is not None), None)


def _damaged(run_directory: Path, step: int, path: Path, what: str, options: Options) -> UsageError:
    directory, named = run_directory / "checkpoints", options.folder.format(run=run_directory)
    earlier = (s for s in reversed(complete_steps(run_directory)) if s < step)
    whole = next((s for s in earlier if _damage(directory / str(s)) is None), None)
    way_out = "no earlier one is whole: start the run anew in another folder"
    if whole is not None:
        way_out = f"that of step {whole} is whole: {named} {options.step.format(step=whole)}"
    return UsageError(f"{named}: the checkpoint of step {step} is damaged ({path}: {what}); {way_out}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
