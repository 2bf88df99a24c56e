"""One run at a time in a folder."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageError

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a run's folder, made if missing. The kernel lets go of it when the process ends, however it ends.

    File systems that know no locks (Lustre, as some mount it) are taken on trust.

    Raises:
      UsageError: another run holds it, or the folder cannot be written.
    """
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BlockingIOError as error:
        raise UsageError(
            f"--out {directory}: a run is going on in it ({_holder(path)}); wait for it, or name another folder"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--out {directory}: cannot write there ({reason}); name another folder") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """A descriptor that holds the lock. Raises BlockingIOError if another one does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
        # Whoever held it may have deleted the file between our two calls; then ours would lock nobody out.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "which has just ended"
