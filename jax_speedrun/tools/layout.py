"""Text for a terminal: 80 columns, lines broken between words."""

import shutil
import sys
import textwrap

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 80


def wrap(text: str, indent: str = "") -> str:
    """Break a line that is longer than a terminal between words; `indent` stands before the second and later lines."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def make_table(title: str, label: str, *numbers: str) -> Table:
    """Return an empty table: a first column of words, which may take several lines, and columns of numbers."""
    table = Table(
        title=wrap(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column(label, vertical="top")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_table(table: Table, *lines: str) -> None:
    """Print a table and, below it, lines of text."""
    # A pipe or a file has no width of its own.
    width = max(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH
    Console(width=width).print(table)
    for line in lines:
        print(wrap(line, "  "))
