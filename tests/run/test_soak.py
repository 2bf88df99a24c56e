"""A long run, watched from outside: it needs no more memory and no more open files at its end than at its beginning."""

import os
from pathlib import Path

import pytest

from tests.small_run import finish, last_step, losses, start, wait_until, write_data

STEPS = 1400
READ_BACK_BYTES = 800_000
"""What Orbax 0.12 keeps of memory each time it reads a small checkpoint's metadata: 600 KB, seen in a loop of 200."""


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_a_long_run(tmp_path):
    out, data = tmp_path / "run", write_data(tmp_path / "data")
    arguments = ("--preset", "small", "--data", data, "--out", out, "--mesh", 1, "--steps", STEPS)
    checkpoint_every = 50
    options = ("--checkpoint-every", checkpoint_every, "--validation-every", 100)
    # One arena: to see what the run holds, and not how glibc spreads it over the threads that Orbax starts.
    process = start(*arguments, *options, cache=tmp_path / "cache", MALLOC_ARENA_MAX="1")
    memory, files = {}, {}
    for step in range(200, STEPS - 49, 25):
        wait_until(lambda step=step: last_step(out) >= step, process)
        memory[step], files[step] = resident_bytes(process.pid), open_files(process.pid)
    finish(process)
    assert len(losses(out)) == STEPS
    early = max(memory[step] for step in memory if step <= 400)
    late = max(memory[step] for step in memory if step >= STEPS - 250)
    read_back = READ_BACK_BYTES * (STEPS - 400) / checkpoint_every
    assert late < 1.01 * early + read_back, memory
    # A checkpoint being written has a few files open.
    assert min(list(files.values())[-8:]) <= min(list(files.values())[:8]), files
    assert max(files.values()) < min(files.values()) + 40, files
