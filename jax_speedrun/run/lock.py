"""One run at a time in a folder."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UsageError, system_reason

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
    # The file says who holds it, so filelock must not write marks of its own where locks are unknown.
    lock = FileLock(path, timeout=0.2, fallback_to_soft=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except Timeout as error:
        raise UsageError(
            f"--out {directory}: a run is going on in it ({_holder(path)}); wait for it, or name another folder"
        ) from error
    except OSError as error:
        raise UsageError(
            f"--out {directory}: cannot write there ({system_reason(error)}); name another folder"
        ) from error
    try:
        yield
    finally:
        # Before it is released: whoever waits for this file sees that it is gone, and makes another.
        path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "which has just ended"
