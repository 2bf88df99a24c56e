"""What goes wrong in real runs, done for real: kills, signals, full disks, changed shards, damaged checkpoints."""

import contextlib
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from jax_speedrun.data.batches import read_shard, write_shard
from jax_speedrun.errors import UsageError
from jax_speedrun.run import checkpoint
from jax_speedrun.run.lock import locked
from jax_speedrun.tools import train as command
from tests.small_run import (
    complete_checkpoints,
    finish,
    last_step,
    start,
    values,
    wait_until,
    write_data,
)

STEPS = 140


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture(scope="module")
def uninterrupted(data, cache, tmp_path_factory):
    """The folder of a run of so many steps that nothing has happened to; it has two checkpoints."""

    @functools.cache
    def run(steps):
        out = tmp_path_factory.mktemp("runs") / "uninterrupted"
        arguments = ("--preset", "small", "--data", data, "--steps", steps, "--mesh", 1, "--checkpoint-every", 100)
        finish(start(*arguments, "--out", out, cache=cache))
        return out

    return run


@pytest.fixture
def launch(data, cache, tmp_path):
    """Starts a run on one device, or resumes it."""
    folder = data

    def run(*options, out=tmp_path / "run", data=folder, steps=STEPS, resume=False):
        arguments = ("--resume", out) if resume else ("--preset", "small", "--steps", steps, "--out", out)
        return start(*arguments, *options, "--data", data, "--mesh", 1, cache=cache)

    return run


def refused(capsys, *arguments):
    """What the script, called in this process, says as it refuses."""
    assert command.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def require_sound(out, *, at_least=0):
    """The newest checkpoint is whole, every byte of it."""
    step, _ = checkpoint.latest(out)
    assert step >= at_least
    checkpoint.verify(out, step)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(launch, uninterrupted, tmp_path):
    """kill -9, each time a dozen steps further on; every third time while a checkpoint is being written.

    The first run compiles the step, and the others load it from the cache: that changes no bit either.
    """
    kills = 10
    out, steps = tmp_path / "run", 12 * kills + 104
    moments, in_a_checkpoint = random.Random(kills), 0

    def reached(life):
        return (out / "log.txt").exists() and (out / "log.txt").read_text().count("resumed:") == life

    def writing():
        folders = {path for path in (out / "checkpoints").iterdir() if path.is_dir()}
        return {path for path in folders if not (path / "manifest.txt").exists()}

    for life in range(kills):
        process = launch(steps=steps, resume=life > 0)
        wait_until(lambda life=life: reached(life) and last_step(out) >= 12 * (life + 1), process)
        if life % 3 == 0:
            seen = writing()
            wait_until(lambda seen=seen: any("tmp" in path.name for path in writing() - seen), process)
        else:
            time.sleep(moments.uniform(0, 0.2))
        process.kill()
        finish(process, -signal.SIGKILL)
        in_a_checkpoint += bool(writing())
        require_sound(out, at_least=5)
    assert in_a_checkpoint >= kills / 3
    finish(launch(resume=True))
    assert values(out) == values(uninterrupted(steps))
    assert sorted(values(out)) == list(range(steps + 1))
    assert writing() == set()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_and_ends_the_run(number, launch, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = launch("--checkpoint-every", 0)
    wait_until(lambda: last_step(out) >= 7, process)
    process.send_signal(number)
    asked = time.monotonic()
    said = finish(process, 128 + number)
    assert time.monotonic() - asked < 10  # a step takes milliseconds
    step = last_step(out)
    assert 7 <= step < STEPS
    assert f"stopped by {number.name} after step {step}/{STEPS}; go on with --resume {out}" in said
    assert complete_checkpoints(out) == [step]
    finish(launch(resume=True))
    assert values(out) == values(uninterrupted(STEPS))


@pytest.mark.slow
def test_a_resubmitted_job_goes_on_by_the_same_command(launch, uninterrupted, tmp_path):
    """From nothing, from before the first checkpoint, from the last one; and once done it has nothing to do."""
    out, same = tmp_path / "run", "--auto-resume"

    def lives():
        return (out / "log.txt").read_text().count("resumed:") if (out / "log.txt").exists() else 0

    process = launch(same, "--checkpoint-every", 100)
    wait_until(lambda: last_step(out) >= 3, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert complete_checkpoints(out) == []
    process = launch(same)
    wait_until(lambda: complete_checkpoints(out), process)
    process.terminate()
    finish(process, 128 + signal.SIGTERM)
    assert lives() == 0
    finish(launch(same))
    assert lives() == 1
    assert values(out) == values(uninterrupted(STEPS))
    finish(launch(same))
    assert values(out) == values(uninterrupted(STEPS))


@pytest.mark.slow
def test_advice_leads_on(launch, tmp_path, capsys):
    """Interrupted before the first checkpoint: what each command says is no circle, and works as it is printed."""
    out = tmp_path / "run"
    process = launch("--checkpoint-every", 100)
    wait_until(lambda: last_step(out) >= 3, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    advice = f"--out {out} --auto-resume"
    assert advice in finish(launch(), 2)
    assert advice in refused(capsys, "--resume", out)
    finish(launch("--auto-resume"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_interrupted_while_compiling(number, data, tmp_path):
    out = tmp_path / "run"
    arguments = ("--preset", "small", "--data", data, "--mesh", 1, "--out", out)
    process = start(*arguments, cache=tmp_path / "empty")
    wait_until(lambda: (out / "log.txt").exists(), process)
    time.sleep(0.5)
    process.send_signal(number)
    asked = time.monotonic()
    said, error = process.communicate()
    assert time.monotonic() - asked < 5
    assert process.returncode == 128 + number
    assert "compiled in" not in said
    assert error == (
        f"train.py: error: interrupted by {number.name}, without a checkpoint of where it was; go on with --out {out} "
        "--auto-resume\n"
    )
    assert not (out / ".lock").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 16 MB: mounting one takes root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system takes root; the limit on file sizes below is tested for everybody")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def check_unwritable(process, out, *reasons):
    error = finish(process, 2)
    for text in ("train.py: error: ", "the checkpoint of step", "cannot be written", *reasons, f"--resume {out}"):
        assert text in error
    assert error.count("\n") == 1, error
    require_sound(out, at_least=5)


def fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_a_full_disk(small_disk, launch, uninterrupted):
    """Room for the log is left, but not for a checkpoint; the same run goes on when there is room again."""
    out, filler = small_disk / "run", small_disk / "filler"
    process = launch(out=out)
    wait_until(lambda: complete_checkpoints(out), process)
    fill(filler)
    os.truncate(filler, filler.stat().st_size - 64 * 1024)
    check_unwritable(process, out, "No space left on device")
    filler.unlink()
    finish(launch(out=out, resume=True))
    assert values(out) == values(uninterrupted(STEPS))


@pytest.mark.slow
def test_files_that_may_not_grow(launch, tmp_path):
    """A quota, as a limit on the size of a file: writing a checkpoint fails as on a full disk."""
    out = tmp_path / "run"
    process = launch(out=out)
    wait_until(lambda: complete_checkpoints(out), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))
    check_unwritable(process, out, "File too large")


def truncate(shard):
    os.truncate(shard, 1024 + 2 * 5000)


def replace(shard):
    write_shard(shard, read_shard(shard)[::-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"), [(truncate, "went from 61,024 to 11,024 bytes"), (replace, "was replaced")]
)
def test_a_shard_that_changes_during_training(change, reason, data, launch, uninterrupted, tmp_path):
    out, own = tmp_path / "run", Path(shutil.copytree(data, tmp_path / "data"))
    shard = own / "words_train_000000.bin"
    process = launch(data=own)
    wait_until(lambda: complete_checkpoints(out), process)
    change(shard)
    error = finish(process, 2)
    assert f"train.py: error: {shard}: {reason} while in use" in error
    assert error.count("\n") == 1
    require_sound(out, at_least=5)
    shutil.copy2(data / shard.name, shard)
    finish(launch(data=own, resume=True))
    assert values(out) == values(uninterrupted(STEPS))


def flip(path, where):
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)


@pytest.mark.slow
class TestDamagedCheckpoint:
    @pytest.fixture
    def out(self, uninterrupted, tmp_path):
        return Path(shutil.copytree(uninterrupted(STEPS), tmp_path / "run"))

    def test_any_byte_of_any_file(self, out):
        folder = out / "checkpoints" / str(STEPS)
        files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
        assert len(files) > 3
        for path in files:
            whole = path.read_bytes()
            for where in {0, len(whole) // 2, len(whole) - 1}:
                flip(path, where)
                with pytest.raises(UsageError, match=f"{path}: its bytes have changed.*that of step 100 is whole"):
                    checkpoint.verify(out, STEPS)
                path.write_bytes(whole)
        checkpoint.verify(out, STEPS)

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda path: flip(path, path.stat().st_size // 2), "its bytes have changed"),
            (lambda path: os.truncate(path, 100), "it has 100 bytes, not"),
            (lambda path: path.unlink(), "No such file"),
        ],
    )
    def test_is_refused_by_name_and_the_one_before_offered(self, damage, reason, data, out, capsys):
        path = max((out / "checkpoints" / str(STEPS)).rglob("*"), key=lambda path: path.stat().st_size)
        damage(path)
        before = (out / "log.txt").read_bytes(), sorted((out / "checkpoints").iterdir())
        error = refused(capsys, "--resume", out, "--data", data, "--mesh", 1)
        assert f"the checkpoint of step {STEPS} is damaged ({path}: {reason}" in error
        assert f"that of step 100 is whole: --resume {out} --resume-step 100" in error
        assert before == ((out / "log.txt").read_bytes(), sorted((out / "checkpoints").iterdir()))

    def test_and_its_manifest(self, data, out, capsys):
        path = out / "checkpoints" / str(STEPS) / "manifest.txt"
        flip(path, 500)
        error = refused(capsys, "--resume", out, "--data", data)
        assert f"({path}: its bytes have changed)" in error
        assert "--resume-step 100" in error

    def test_none_is_whole(self, data, out, capsys):
        for step in (100, STEPS):
            next((out / "checkpoints" / str(step)).rglob("*METADATA*")).unlink()
        error = refused(capsys, "--resume", out, "--data", data, "--mesh", 1)
        assert "no earlier one is whole: start the run anew" in error

    def test_going_on_from_the_one_before(self, launch, uninterrupted, out):
        flip(out / "checkpoints" / str(STEPS) / "manifest.txt", 500)
        finish(launch("--resume-step", 100, out=out, resume=True))
        assert values(out) == values(uninterrupted(STEPS))
        require_sound(out, at_least=STEPS)

    def test_a_step_that_there_is_not(self, data, out, capsys):
        error = refused(capsys, "--resume", out, "--resume-step", 7, "--data", data)
        assert f"--resume-step 7: no complete checkpoint of it under {out / 'checkpoints'}; there is 100, 140" in error
        assert "needs --resume" in refused(capsys, "--resume-step", 7)

    def test_another_recipe(self, data, out, capsys):
        error = refused(capsys, "--resume", out, "--data", data, "--preset", "tiny", "--seed", 7)
        for field in ("seed (0 -> 7)", "model.width (16 -> 64)", "optimizer.window_tokens (256 -> 640)"):
            assert field in error


class TestTwoRunsInOneFolder:
    @pytest.mark.slow
    def test_the_second_is_refused(self, data, launch, tmp_path, capsys):
        out = tmp_path / "run"
        process = launch(steps=2000)
        wait_until(lambda: complete_checkpoints(out), process)
        error = refused(capsys, "--resume", out, "--data", data, "--mesh", 1)
        assert f"--out {out}: a run is going on in it (process {process.pid} on " in error
        process.terminate()
        finish(process, 128 + signal.SIGTERM)
        assert list(values(out)) == list(range(last_step(out) + 1))
        require_sound(out, at_least=last_step(out))

    def test_the_lock_goes_with_its_holder(self, tmp_path):
        for _ in range(2):
            with (
                locked(tmp_path / "run"),
                pytest.raises(UsageError, match="a run is going on"),
                locked(tmp_path / "run"),
            ):
                pass
        assert list((tmp_path / "run").iterdir()) == []
