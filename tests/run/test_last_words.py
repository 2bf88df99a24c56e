"""A process that is killed, or aborted in C++, has a last line all the same; one that ends in good order has none."""

import subprocess
import sys

import pytest

from tests.paths import ROOT

BEGIN = """
import os, sys
from jax_speedrun.run.last_words import LastWords
words = LastWords()
words.watch("process 1 of 4")
words.advise("go on with --out r\\u00fcn --auto-resume")
print("its own", file=sys.stderr, flush=True)
"""


def run(end, **environment):
    command = [sys.executable, "-c", BEGIN + end]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os.abort()", "os._exit(1)", "raise SystemExit(3)"])
def test_the_last_line_says_what_happened_and_how_to_go_on(end):
    done = run(end)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train.py: error: process 1 of 4 ended without a word of its own: it was killed, or")
    assert last.endswith("; go on with --out rün --auto-resume")


@pytest.mark.parametrize("signals", [[], ["SIGTERM", "SIGINT", "SIGHUP"]])
def test_signals_to_all_do_not_silence_it(signals):
    """As Slurm sends them to whatever a job has started."""
    ends = [f"words._monitor.send_signal(signal.{name})" for name in signals]
    done = run("\n".join(["import signal, time", "time.sleep(1)", *ends, "time.sleep(0.2)", "os.abort()"]))
    assert "go on with" in done.stderr.splitlines()[-1]


def test_good_order():
    done = run("words.dismiss()")
    assert done.returncode == 0
    assert done.stderr == "its own\n"
