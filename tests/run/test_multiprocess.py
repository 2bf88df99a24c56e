"""One run of several processes on this machine: the same losses, the same end, and what happens when one is lost."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jax_speedrun.data.batches import TINY_DATA
from jax_speedrun.run import checkpoint, distributed
from jax_speedrun.tools import train as command
from tests.small_run import (
    ROOT,
    complete_checkpoints,
    finish,
    last_step,
    losses,
    start,
    start_several,
    values,
    wait_until,
    write_data,
)

SCRIPTS = ROOT / "scripts"
NOISE = re.compile(r".*(\[Gloo\]|peer ranks).*\n")  # its threads write in pieces, which mix


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("several") / "data")


@pytest.fixture(scope="module")
def alone(data, cache, tmp_path_factory):
    """The folder of 50 steps in one process, on one device."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    finish(start(*small(data), "--mesh", 1, "--out", out, cache=cache))
    return out


def small(data, steps=50):
    return ("--preset", "small", "--data", data, "--steps", steps, "--checkpoint-every", 25)


def require_same_losses(got, want, tolerance):
    np.testing.assert_allclose(losses(got)[0], losses(want)[0], rtol=1e-6)
    np.testing.assert_allclose(losses(got), losses(want), rtol=tolerance)
    last = len(losses(want))
    assert values(got)[last].val_loss == pytest.approx(values(want)[last].val_loss, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 8), (8, 8)])
def test_any_number_of_processes_gives_the_same_losses(processes, devices, data, cache, alone, tmp_path):
    out = tmp_path / "run"
    said = [
        finish(process)
        for process in start_several(processes, *small(data), "--mesh", devices, "--out", out, cache=cache)
    ]
    require_same_losses(out, alone, 1e-5)  # Newton-Schulz is done in float32
    assert f"devices:    {devices} x cpu" in said[0]
    assert [NOISE.sub("", text) for text in said[1:]] == [""] * (processes - 1)
    assert complete_checkpoints(out) == [25, 50]
    checkpoint.verify(out, 50)


@pytest.mark.slow
def test_resumed_by_other_numbers_of_processes(data, cache, alone, tmp_path):
    out = tmp_path / "run"
    resume = ("--data", data, "--resume", out)
    finish(start(*small(data), "--mesh", 1, "--out", out, cache=cache))
    for process in start_several(2, *resume, "--resume-step", 25, "--mesh", 4, cache=cache):
        finish(process)
    require_same_losses(out, alone, 1e-5)
    finish(start(*resume, "--resume-step", 25, "--mesh", 2, cache=cache))
    require_same_losses(out, alone, 1e-5)
    checkpoint.verify(out, 50)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "length", "steps", "counts", "tolerance"),
    [("still", 128, 20, (2, 8), 1e-5), ("tiny", 1024, 4, (2,), 2e-4)],
)
def test_first_losses_of_tiny(preset, length, steps, counts, tolerance, cache, tmp_path):
    """The preset itself on 8 devices, whose sums are taken in another order when they are in several processes.

    Where a gradient is about as small as its rounding, Adam makes a whole step of the noise: docs/scaling.md.
    """
    arguments = ("--preset", preset, "--data", TINY_DATA, "--steps", steps, "--mesh", 8, "--checkpoint-every", 0)
    arguments += ("--sequence-length", length)
    finish(start(*arguments, "--out", tmp_path / "1", cache=cache), patience=1800)
    for count in counts:
        out = tmp_path / str(count)
        for process in start_several(count, *arguments, "--out", out, cache=cache):
            finish(process, patience=1800)
        require_same_losses(out, tmp_path / "1", tolerance)


@pytest.fixture
def pair(data, cache, tmp_path):
    """Two processes of a long run, which has a checkpoint."""
    out = tmp_path / "run"
    processes = start_several(2, *small(data, 2000), "--mesh", 2, "--out", out, cache=cache)
    wait_until(lambda: complete_checkpoints(out), *processes)
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed(victim, pair, tmp_path):
    pair[victim].kill()
    killed = time.monotonic()
    error = finish(pair[1 - victim], 1)
    assert time.monotonic() - killed < 60
    assert f"train.py: error: process {1 - victim} of 2 stops: a computation broke off (" in error
    assert "another process has died" in error
    out, last = tmp_path / "run", f"; go on with --out {tmp_path / 'run'} --auto-resume"
    assert error.rstrip("\n").endswith(last)
    killed = finish(pair[victim], -signal.SIGKILL).splitlines()[-1]
    assert killed.startswith(f"train.py: error: process {victim} of 2 ended without a word of its own: it was killed")
    assert killed.endswith(last)
    step, _ = checkpoint.latest(out)
    checkpoint.verify(tmp_path / "run", step)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_hangs(victim, pair, tmp_path):
    """As on GPUs when a machine loses power: nothing tells the others, but its heartbeat is missing."""
    pair[victim].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    _, error = pair[1 - victim].communicate(timeout=60)
    assert time.monotonic() - stopped < 60
    assert pair[1 - victim].returncode not in (0, None)
    last = error.splitlines()[-1]
    assert last.startswith(f"train.py: error: process {1 - victim} of 2 ")
    assert "another process" in last
    assert last.endswith(f"; go on with --out {tmp_path / 'run'} --auto-resume")


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_stops_all(asked, pair, tmp_path):
    pair[asked].terminate()
    sent = time.monotonic()
    said = [finish(process, 128 + signal.SIGTERM) for process in pair]
    assert time.monotonic() - sent < 10
    step = last_step(tmp_path / "run")
    assert f"stopped by SIGTERM after step {step}/2000" in said[0]
    assert complete_checkpoints(tmp_path / "run")[-1] == step
    checkpoint.verify(tmp_path / "run", step)


@pytest.mark.slow
def test_mistakes_are_told_by_all(data, cache, tmp_path):
    """What one process finds wrong ends them all with the same reason, and nothing is written."""
    out, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    port = free_port()

    def pair_with(*options):
        """Two processes, the second with other `options`."""
        where = ("--mesh", 2, "--out", out, "--coordinator", f"127.0.0.1:{port}", "--processes", 2)
        arguments = [*small(data), *where]
        processes = [start(*arguments, *extra, "--process-id", i, cache=cache) for i, extra in enumerate(((), options))]
        return [finish(process, 2) for process in processes]

    for error in pair_with("--seed", 7):
        assert "process 1: other options than process 0; start all of them alike" in error
    errors = pair_with("--data", other)
    assert f"process 1: --data {other}: no *_train_*.bin in it" in errors[0]
    assert f"train.py: error: --data {other}: no *_train_*.bin in it" in errors[1]
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "words_train_000001.bin").unlink()  # on one node it has not arrived
    for error in pair_with("--data", copy):
        said = f"process 1 reads other data than process 0: in its {copy}, words_train_000001.bin is missing"
        assert said in error
    assert not out.exists()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (("--processes", 2), "--coordinator, --process-id missing"),
        (("--coordinator", "node0:1", "--process-id", 0), "--processes missing"),
        (("--coordinator", "node0", "--processes", 2, "--process-id", 0), "--coordinator node0: must be HOST:PORT"),
        (("--coordinator", "node0:99999", "--processes", 2, "--process-id", 0), "--coordinator node0:99999"),
        (("--coordinator", "node0:1", "--processes", 0, "--process-id", 0), "--processes 0"),
        (("--coordinator", "node0:1", "--processes", 2, "--process-id", 2), "--process-id 2: must be 0 to 1"),
        (("--coordinator", "n:1", "--processes", 2, "--process-id", 1, "--mesh", 3), "--mesh 3 does not divide evenly"),
    ],
)
def test_options_that_cannot_be(options, mentions, capsys):
    assert command.main([str(option) for option in options]) == 2
    error = capsys.readouterr().err
    assert mentions in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ["--coordinator", where, "--processes", "2", "--process-id", "0"]
        assert command.main(options) == 2
    assert f"--coordinator {where}: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address", ["http://node0:1", "a:b:1", "node0:²", "node0:1 ", "[::1:1", ":1", "nöde:1", "node0:"]
)
def test_an_address_that_cannot_be_parsed(address, capsys):
    assert command.main(["--coordinator", address, "--processes", "2", "--process-id", "1"]) == 2
    assert f"--coordinator {address}: must be HOST:PORT, such as node0:12345" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "host", "reason"),
    [
        (0, "no-such-host.invalid", "Name or service not known|Temporary failure in name resolution|No address"),
        (1, "no-such-host.invalid", "Name or service not known|Temporary failure in name resolution|No address"),
        (1, "127.0.0.1", "Connection refused, waited 1 s"),
    ],
)
def test_a_coordinator_that_cannot_be_reached(process, host, reason):
    """In a process of its own, which is one of several ever after."""
    where = f"{host}:{free_port()}"
    program = f"""
from jax_speedrun.run import distributed
from jax_speedrun.tools.train import main
distributed.REACH_SECONDS = 1
main(["--coordinator", "{where}", "--processes", "2", "--process-id", "{process}"])
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    said = f"train.py: error: --coordinator {where}: process {process} cannot reach process 0 there "
    assert ended.stderr.startswith(said)
    assert re.search(reason, ended.stderr)


def test_it_is_said_within_a_minute():
    assert distributed.REACH_SECONDS < 60
    assert distributed.HEARTBEAT_SECONDS < 60


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "[::1]"])
def test_a_coordinator_that_can_be_reached(address):
    if ":" in address and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    distributed._require_coordinator(f"{address}:{free_port()}", 0)


@pytest.mark.slow
def test_processes_that_do_not_come(tmp_path):
    program = f"""
from jax_speedrun.run import distributed
distributed.JOIN_SECONDS = 2
distributed.start("127.0.0.1:{free_port()}", 2, 0, None)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "process 0: " in ended.stderr
    assert ended.returncode == 2
    assert "the 2 processes do not find each other (waited 2 s); start all, with process 0 in reach" in ended.stderr


@pytest.mark.parametrize("name", ["train_slurm.sh", "train_ssh.sh"])
def test_shell_scripts_parse(name):
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)
    assert os.access(SCRIPTS / name, os.X_OK)


@pytest.fixture
def stand_in(tmp_path, cache):
    """Puts a program of a given name on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name, text):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
        return {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        }

    return put


TINY_RUN = ("--preset", "tiny", "--sequence-length", "128", "--mesh", "2", "--attention", "reference")


@pytest.mark.slow
def test_over_ssh(stand_in, tmp_path):
    """`ssh` runs the command here, in an empty folder; Ctrl-C or SIGTERM to the script stops the run."""
    (tmp_path / "home").mkdir()
    calls = tmp_path / "calls"
    environment = stand_in("ssh", f'echo "$1" >> {calls}\ncd {tmp_path}/home && exec bash -c "$2"\n')
    out = tmp_path / "a run"  # a name with a space arrives whole
    process = subprocess.Popen(
        [SCRIPTS / "train_ssh.sh", "127.0.0.1 localhost", *TINY_RUN, "--steps", "60", "--out", str(out)],
        env={**environment, "PORT": str(free_port())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: last_step(out) >= 2, process)
    process.terminate()
    assert "stopped by SIGTERM after step" in finish(process, 128 + signal.SIGTERM)
    assert complete_checkpoints(out) == [last_step(out)]
    assert sorted(calls.read_text().split()[:2]) == ["127.0.0.1", "localhost"]
    assert calls.read_text().split()[2:] == ["127.0.0.1"] * 2  # for the signal, and to clear up
    assert not list((ROOT / "runs").glob(".train_ssh.*"))


@pytest.mark.slow
def test_over_ssh_the_first_failure_is_its_exit_status(stand_in):
    environment = stand_in("ssh", '[ "$1" = bad ] && exit 7\nexit 0\n')
    for hosts, code in (("good good", 0), ("good bad", 7), ("bad good", 7)):
        ended = subprocess.run([SCRIPTS / "train_ssh.sh", hosts], env=environment, check=False)
        assert ended.returncode == code
    assert subprocess.run([SCRIPTS / "train_ssh.sh"], capture_output=True, check=False).returncode == 2


@pytest.mark.slow
def test_under_slurm(stand_in, tmp_path):
    """`srun` starts two tasks here, with the variables Slurm gives them."""
    environment = stand_in(
        "srun",
        """
shift
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
wait
""",
    )
    slurm = {"SLURM_JOB_ID": "4242", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    process = subprocess.Popen(
        [SCRIPTS / "train_slurm.sh", *TINY_RUN, "--steps", "3", "--out", str(tmp_path / "run")],
        env={**environment, **slurm, "SLURM_SUBMIT_DIR": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = finish(process)
    assert "devices:    2 x cpu" in said
    assert len(losses(tmp_path / "run")) == 3
