"""What every command has: a parser, a main, and one line for what its user can put right.

    def parser() -> argparse.ArgumentParser:
        p = make_parser("sample.py", __doc__)
        ...

    def main(arguments: list[str] | None = None) -> int:
        return run_command(parser(), work, arguments)

Imports nothing but the standard library: a Python that has PyTorch alone runs commands too.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from ..errors import SIGNALLED, Interrupted, UsageError, interruptible


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an option, like all else that a user can put right; `--help` has the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for the command `name` that shows `description` as it is written."""
    return Parser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_command(
    parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int], arguments: list[str] | None
) -> int:
    """Parse `arguments` (None: the process' own), do the work, and return the exit code.

    A UsageError becomes a line on stderr and the code 2, a signal a line and 128 and its number: 130 for Ctrl-C.
    """
    options = parser.parse_args(arguments)
    try:
        with interruptible():
            return work(options)
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return SIGNALLED + (error.signal if isinstance(error, Interrupted) else signal.SIGINT)
