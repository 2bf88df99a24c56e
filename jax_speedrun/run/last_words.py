"""The last line of a process that can say nothing itself: killed, or aborted from inside a library.

JAX ends a process whose run has lost another one with a stack trace of C++, and no handler in Python gets to speak.
So a small process of its own (this file, run as a script) waits at the end of a pipe, and says at its end, unless the
end was announced, what has happened and how to go on.
"""

import contextlib
import signal
import subprocess
import sys
from typing import IO

ORDERLY = "."


class LastWords:
    """What is to be said should this process die without a word. Nothing, until `watch` is called."""

    def __init__(self) -> None:
        self.advice = ""
        """How to go on."""
        self._monitor: subprocess.Popen[str] | None = None
        self._who = ""

    def watch(self, who: str) -> None:
        """Start to watch this process, which is `who` in a sentence: `process 1 of 4`."""
        self._who = who
        self._monitor = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            encoding="utf-8",
            errors="backslashreplace",
            start_new_session=True,  # Ctrl-C and the end of a terminal are none of its business
        )
        self.advise("start all of them again")

    def advise(self, advice: str) -> None:
        """Say from now on, if anything, how to go on."""
        self.advice = advice
        self._tell(
            f"train.py: error: {self._who} ended without a word of its own: it was killed, or a library gave up, as "
            f"JAX does half a minute after another process is lost or hangs (what stands above says more); {advice}"
        )

    def dismiss(self) -> None:
        """Announce that this process ends in good order, or has said why it does not."""
        self._tell(ORDERLY)
        if self._monitor is not None and self._monitor.stdin is not None:
            with contextlib.suppress(OSError):
                self._monitor.stdin.close()
            self._monitor.wait()
            self._monitor = None

    def _tell(self, line: str) -> None:
        if self._monitor is not None and self._monitor.stdin is not None:
            with contextlib.suppress(OSError):
                self._monitor.stdin.write(line.replace("\n", " ") + "\n")
                self._monitor.stdin.flush()


def main(lines: IO[str], out: IO[str]) -> None:
    """Print the last of `lines` once they end, unless it is `ORDERLY`."""
    last = ORDERLY
    for line in lines:
        last = line.rstrip("\n")
    if last != ORDERLY:
        print(f"\n{last}", file=out, flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with open(sys.stdin.fileno(), encoding="utf-8", errors="replace") as lines:
        main(lines, sys.stderr)
