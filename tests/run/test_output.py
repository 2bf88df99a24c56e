"""Showing progress never ends training: poor terminals, closed ones, pipes that nobody reads."""

import contextlib
import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios

import pytest

from jax_speedrun.run.output import Unfailing, unfailing_output
from tests.paths import ROOT
from tests.small_run import last_step, start, wait_until, write_data

UNICODE = "läuft 日本"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_cannot_be_encoded_is_escaped(encoding):
    raw = io.BytesIO()
    stream = Unfailing(io.TextIOWrapper(raw, encoding=encoding))
    stream.write(f"{UNICODE}\n")
    stream.flush()
    assert raw.getvalue().decode(encoding).startswith("l")
    assert "\\u65e5" in raw.getvalue().decode(encoding) or encoding == "utf-8"


def python(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)


def test_a_pipe_that_nobody_reads_any_more():
    code = """
from jax_speedrun.run.output import unfailing_output
with unfailing_output():
    for number in range(100_000):
        print(number, "x" * 100)
import sys
sys.exit(7)
"""
    process = python(code, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 7
    assert process.stderr.read() == ""


@pytest.mark.parametrize("closed", ["1", "2", "1 2"])
def test_without_an_output_at_all(closed):
    code = f"""
import os, sys
for number in "{closed}".split():
    os.close(int(number))
from jax_speedrun.run.output import unfailing_output
with unfailing_output():
    print("said"), print("said", file=sys.stderr)
os._exit(7)
"""
    assert python(code, stdout=subprocess.PIPE).wait() == 7


def test_output_is_as_before_afterwards(capsys):
    before = sys.stdout, sys.stderr
    with contextlib.suppress(ZeroDivisionError), unfailing_output():
        print("said")
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "said\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("output") / "däta")


@contextlib.contextmanager
def terminal(columns):
    """A pseudo-terminal of so many columns: the end that a program gets, and ours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    yield ours, theirs
    for end in (ours, theirs):
        with contextlib.suppress(OSError):
            os.close(end)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "environment"),
    [
        (80, {"PYTHONIOENCODING": "ascii", "TERM": "vt100"}),
        (80, {"PYTHONIOENCODING": "latin-1", "TERM": "xterm"}),
        (1, {"TERM": "xterm"}),
        (0, {"TERM": "dumb", "COLUMNS": "nonsense"}),
    ],
)
def test_a_poor_terminal(columns, environment, data, cache, tmp_path):
    out = tmp_path / UNICODE
    with terminal(columns) as (ours, theirs):
        arguments = ("--preset", "small", "--steps", 30, "--data", data, "--mesh", 1, "--out", out)
        process = start(*arguments, cache=cache, output=theirs, **environment)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of what is shown
            while piece := os.read(ours, 65536):
                shown += piece
        assert process.wait() == 0, shown.decode(errors="replace")
    assert last_step(out) == 30
    assert b"Traceback" not in shown


@pytest.mark.slow
def test_a_terminal_that_goes_away(data, cache, tmp_path):
    """Under nohup, as the terminal's signal would else end it in good order; what is printed has no place to go."""
    out = tmp_path / "run"
    with terminal(80) as (ours, theirs):
        arguments = ("--preset", "small", "--steps", 60, "--data", data, "--mesh", 1, "--out", out)
        process = start(*arguments, cache=cache, output=theirs, TERM="xterm")
        os.close(theirs)
        os.set_blocking(ours, False)

        def five_steps():
            with contextlib.suppress(OSError):
                os.read(ours, 65536)
            return last_step(out) >= 5

        wait_until(five_steps, process)
        os.close(ours)
        assert process.wait() == 0
    assert last_step(out) == 60


@pytest.mark.slow
def test_hanging_up_saves_and_ends_the_run(data, cache, tmp_path):
    out = tmp_path / "run"
    process = start("--preset", "small", "--steps", 2000, "--data", data, "--mesh", 1, "--out", out, cache=cache)
    wait_until(lambda: last_step(out) >= 5, process)
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGHUP
    assert f"stopped by SIGHUP after step {last_step(out)}/2000" in said
