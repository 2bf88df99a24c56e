"""What the benchmarks share: where kernels run, a table that is printed as it grows, a record as JSON."""

import argparse
import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ...kernels.implementation import interpret_kernels
from ..command import make_parser


def bench_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of bench_`name`.py, with the options of all benchmarks."""
    p = make_parser(f"bench_{name}.py", description)
    p.add_argument(
        "--out", type=Path, default=Path(f"bench_{name}"), metavar="DIR", help="for the record (default: %(default)s)"
    )
    return p


def add_size(parser: argparse.ArgumentParser, option: str, default: int, metavar: str, what: str = "") -> None:
    """Add an option for a size of the problem."""
    about = f"{what} (default: %(default)s)" if what else "default: %(default)s"
    parser.add_argument(option, type=int, default=default, metavar=metavar, help=about)


def on_gpu() -> bool:
    """Whether kernels are measured, or only tried out in Pallas' interpreter."""
    return jax.default_backend() == "gpu"


@contextlib.contextmanager
def kernels_run_here() -> Iterator[None]:
    """Let kernels run inside: on a GPU as they are, elsewhere in the interpreter, slowly."""
    with contextlib.suppress(RuntimeError):  # JAX has started: its owner has seen to it
        # The interpreter needs a CPU thread for each warpgroup, and none that waits for the computation it is part of.
        jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if on_gpu():
        yield
        return
    with interpret_kernels():
        yield


class Table:
    """Rows printed as they come, below headings, in columns of fixed width: 80 characters in all at most.

    Args:
      columns: heading -> how its values are formatted, such as "<9" or "9.3f"; the number is the width.
    """

    def __init__(self, columns: dict[str, str]):
        self._formats = list(columns.values())
        headings = (f"{name:{'<' if '<' in form else '>'}{_width(form)}}" for name, form in columns.items())
        print(" ".join(headings).rstrip(), flush=True)

    def add(self, *values: object) -> None:
        """Print one row; None leaves its place empty."""
        cells = (
            " " * _width(form) if value is None else f"{value:{form}}"
            for value, form in zip(values, self._formats, strict=True)
        )
        print(" ".join(cells).rstrip(), flush=True)


def _width(form: str) -> int:
    match = re.match(r"[<>]?(\d+)", form)
    assert match, form
    return int(match[1])


def describe(**sizes: int) -> str:
    """Return a line with the device, JAX's version and the sizes of the problem."""
    facts = [jax.devices()[0].device_kind, f"jax {jax.__version__}", *(f"{name} = {n}" for name, n in sizes.items())]
    return ", ".join(facts)


def write_record(folder: Path, name: str, rows: Sequence[Any], **facts: object) -> None:
    """Write `rows`, which are dataclasses, and `facts` to NAME.json, with the device, JAX's version and the date."""
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        **facts,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
