"""What ends a command in one line: what its user can put right, and signals."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNALLED = 128
"""A command that a signal has ended exits with its number and this, as shells have it."""


class UsageError(ValueError):
    """Something the user can put right: one line that names the file or option and the way out.

    Scripts print it without a traceback and exit with code 2.
    """


def system_reason(error: OSError) -> str:
    """Return what the system says, and of which path: `/runs/first: Permission denied`."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return reason
    path = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else error.filename
    return f"{path}: {reason}"


class Interrupted(KeyboardInterrupt):
    """One of the `SIGNALS`, raised so that whatever is open is closed and cleared away."""

    def __init__(self, number: int):
        super().__init__()
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let the first of the `SIGNALS` raise `Interrupted` while entered; what nohup has had ignored stays so.

    A second Ctrl-C ends the process at once; of other signals, which launchers like to repeat, only the first counts.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
        raise Interrupted(number)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
