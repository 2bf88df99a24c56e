"""What a run says while it goes on: never a reason for it to end."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Unfailing:
    """A stream that is written to as far as possible: what cannot be encoded is escaped; what cannot be written, lost.

    A terminal may be closed, and the reader of a pipe may go, hours before a run is over.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        # Or Python tries once more to write what is left, as it exits, and exits with code 120.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Make standard output and error `Unfailing` while entered. Either may be missing altogether."""
    with contextlib.ExitStack() as stack:
        for redirect, stream in ((contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr)):
            if stream is not None:
                unfailing = Unfailing(stream)
                stack.callback(unfailing.flush)
                stack.enter_context(redirect(unfailing))
        yield
