"""Whole runs of a small model: any mesh, resuming, what a run writes, and how it fails."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.config import (
    HOST_FIELDS,
    Config,
    ModelConfig,
    OptimizerConfig,
    cache_key,
    from_dict,
    recipe_differences,
    resolve,
    to_dict,
)
from jax_speedrun.data.batches import read_shard, write_shard
from jax_speedrun.data.fingerprint import fingerprint
from jax_speedrun.errors import UsageError
from jax_speedrun.run import checkpoint
from jax_speedrun.run.loop import DivergedError, Loop, Outcome
from jax_speedrun.run.program_cache import ProgramCache
from jax_speedrun.run.train import train
from jax_speedrun.sharding import make_mesh
from jax_speedrun.step import make_program
from jax_speedrun.tools import train as command
from tests.paths import ROOT

VOCABULARY = 1024
START = VOCABULARY - 1  # of a document, in a vocabulary too small for GPT-2's
CONFIG = Config(
    "test",
    model=ModelConfig(
        vocab_size=VOCABULARY,  # the record's would be most of the time
        padded_vocab_size=VOCABULARY,
        layers=4,
        width=16,
        heads=1,
        head_width=16,
        mlp_width=32,
        long_layers=(0, 3),
        attention_free_layers=(2,),
        value_embedding_tables=1,
        table_dtype="float32",
        compute_dtype="float32",
        head_precision="float32",
        evaluation_precision="float32",
    ),
    # Scalars stand still: the first gradient of the residual weights is zero but for rounding (the final norm takes out
    # their scale while the blocks still add nothing), and Adam's eps of 1e-10 makes a step of its sign, so that it
    # differs between any two orders of summation.
    optimizer=OptimizerConfig(scalar_learning_rate=0.0, window_tokens=256, newton_schulz_dtype="float32"),
    steps=20,
    sequence_length=128,
    validation_tokens=3 * 128,
    validation_every=5,
    checkpoint_every=5,
    attention="reference",  # compiles faster; the implementations are compared elsewhere
)


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """The same small programs are compiled in many tests."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, size in (("words_train_000000", 30_000), ("words_train_000001", 20_000), ("words_val_000000", 1_000)):
        tokens = rng.zipf(1.3, size) % 1000
        tokens[rng.random(size) < 0.01] = START
        tokens[0] = START
        write_shard(folder / f"{name}.bin", tokens.astype(np.uint16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_speedrun.kernels.block_mask.DOCUMENT_START", START)
        yield folder


def run(config, mesh_size, data, out, **options):
    mesh = make_mesh(mesh_size, config.sequences)
    return train(resolve(config, mesh.devices.flat[0]), mesh, data, out, **options)


def metrics(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}


def losses(out):
    return [record["loss"] for step, record in sorted(metrics(out).items()) if step > 0]


@pytest.fixture(scope="module")
def reference_run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reference"
    return out, run(CONFIG, 1, data, out).val_loss


class TestWholeRun:
    def test_folder(self, reference_run):
        out, _ = reference_run
        assert {path.name for path in out.iterdir()} == {
            "log.txt",
            "metrics.jsonl",
            "config.json",
            "loss.png",
            "checkpoints",
        }
        assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert from_dict(json.loads((out / "config.json").read_text())["config"]).steps == CONFIG.steps

    def test_log_lines(self, reference_run):
        out, val_loss = reference_run
        lines = (out / "log.txt").read_text().splitlines()
        training = [line for line in lines if "val_loss" not in line]
        assert len(training) == CONFIG.steps
        for step, line in enumerate(training, start=1):
            assert re.fullmatch(rf"step:{step}/20 train_time:\d+ms step_avg:(\d+\.\d\d|nan)ms", line), line
        validations = [line for line in lines if "val_loss" in line]
        assert [int(re.match(r"step:(\d+)/", line).group(1)) for line in validations] == [0, 5, 10, 15, 20]
        last = re.fullmatch(
            r"step:20/20 val_loss:(\d\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms", validations[-1]
        )
        assert last
        assert float(last[1]) == pytest.approx(val_loss, abs=1e-4)
        assert float(last[3]) == pytest.approx(float(last[2]) / 10, abs=0.1)  # the first ten steps do not count

    def test_it_learns_from_a_uniform_start(self, reference_run):
        out, val_loss = reference_run
        assert metrics(out)[0]["val_loss"] == pytest.approx(np.log(VOCABULARY), rel=1e-6)
        assert losses(out)[0] == pytest.approx(np.log(VOCABULARY), rel=1e-6)
        validations = [metrics(out)[step]["val_loss"] for step in (0, 5, 10, 15, 20)]
        assert validations == sorted(validations, reverse=True)
        assert val_loss < 0.739 * np.log(VOCABULARY)  # of the uniform start's: 8 with the record's vocabulary

    def test_window_and_rate_follow_the_schedule(self, reference_run):
        out, _ = reference_run
        windows = [metrics(out)[step]["window"] for step in range(1, 21)]
        assert windows == [128 if step <= 10 else 256 for step in range(20)]
        rates = [metrics(out)[step]["lr"] for step in range(1, 21)]
        assert rates[:13] == pytest.approx([0.05] * 13)
        assert rates[19] == pytest.approx(0.05 * (0.125 + 0.875 * 0.1), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_any_mesh_gives_the_same_losses(devices, data, reference_run, tmp_path):
    run(dataclasses.replace(CONFIG, checkpoint_every=0), devices, data, tmp_path / "run")
    got, want = losses(tmp_path / "run"), losses(reference_run[0])
    assert len(got) == 20
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    got_val, want_val = metrics(tmp_path / "run")[20]["val_loss"], metrics(reference_run[0])[20]["val_loss"]
    np.testing.assert_allclose(got_val, want_val, rtol=1e-4)  # three sequences on as many devices as there are


@pytest.fixture(scope="module")
def interrupted_run(data, tmp_path_factory):
    """A run that stops after step 13, as if killed: its last checkpoint is that of step 10."""
    original, out = Loop._report, tmp_path_factory.mktemp("runs") / "interrupted"

    def report(loop):
        if loop.pending is not None and loop.pending[0] == 13:
            raise KeyboardInterrupt
        original(loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_report", report)
        with pytest.raises(KeyboardInterrupt):
            run(CONFIG, 1, data, out)
    return out


class TestResume:
    @pytest.fixture
    def out(self, interrupted_run, tmp_path):
        return Path(shutil.copytree(interrupted_run, tmp_path / "run"))

    def test_continues_bit_for_bit(self, data, reference_run, out):
        assert checkpoint.latest(out)[0] == 10
        run(CONFIG, 1, data, out, resume_step=10)
        assert losses(out) == losses(reference_run[0])
        assert metrics(out)[20]["val_loss"] == metrics(reference_run[0])[20]["val_loss"]
        assert sorted(metrics(out)) == list(range(21))

    def test_leftovers_of_a_killed_write_are_ignored(self, out):
        (out / "checkpoints" / "15.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
        assert checkpoint.latest(out)[0] == 10

    @pytest.mark.slow
    def test_on_other_devices(self, data, reference_run, out):
        run(CONFIG, 4, data, out, resume_step=10)
        np.testing.assert_allclose(losses(out), losses(reference_run[0]), rtol=1e-4)

    def test_configurations_are_compared_field_by_field(self):
        saved = from_dict(to_dict(CONFIG))
        assert saved == CONFIG
        assert recipe_differences(saved, dataclasses.replace(CONFIG, attention="xla", preset="x")) == []
        other = dataclasses.replace(CONFIG, steps=30, model=dataclasses.replace(CONFIG.model, width=32))
        assert recipe_differences(saved, other) == ["steps (20 -> 30)", "model.width (16 -> 32)"]


class TestOtherData:
    """A run goes on with the text that it was trained on, wherever that lies, and with no other."""

    @pytest.fixture
    def out(self, interrupted_run, tmp_path):
        return Path(shutil.copytree(interrupted_run, tmp_path / "run"))

    @pytest.fixture
    def copy(self, data, tmp_path):
        return Path(shutil.copytree(data, tmp_path / "copy"))

    def test_its_record(self, data, out):
        recorded = json.loads((out / "config.json").read_text())["data"]
        assert recorded == fingerprint(data) == checkpoint.latest(out).metadata["data"]

    @pytest.mark.parametrize(
        ("shard", "change", "reason"),
        [
            ("words_train_000001.bin", "rewritten", "holds other tokens"),
            ("words_val_000000.bin", "rewritten", "holds other tokens"),
            ("words_train_000001.bin", "removed", "is missing"),
            ("words_train_000002.bin", "added", "is new"),
        ],
    )
    def test_is_refused_by_name(self, shard, change, reason, data, out, copy):
        if change == "removed":
            (copy / shard).unlink()
        else:
            like = copy / shard if change == "rewritten" else copy / "words_train_000001.bin"
            write_shard(copy / shard, np.roll(read_shard(like), 7))
        before = (out / "log.txt").read_bytes()
        with pytest.raises(UsageError, match=f"--data {copy}: not the data .* trained on, in {data}: {shard} {reason}"):
            run(CONFIG, 1, copy, out, resume_step=10)
        assert (out / "log.txt").read_bytes() == before

    @pytest.mark.slow
    def test_the_same_elsewhere_is_fine(self, reference_run, out, copy):
        run(CONFIG, 1, copy, out, resume_step=10)
        assert losses(out) == losses(reference_run[0])

    @pytest.mark.slow
    def test_without_an_option_it_is_the_recorded_folder(self, data, reference_run, out, capsys):
        assert command.main(["--resume", str(out), "--mesh", "1"]) == 0
        assert f"data:       {data}\n" in capsys.readouterr().out
        assert losses(out) == losses(reference_run[0])


def test_programs_are_kept_by_what_they_come_from():
    """Runs that differ only in what the host reads share their programs, and no others do."""

    def text(config):
        program = make_program(config, make_mesh(1, 8))
        shape = jax.ShapeDtypeStruct((8, 256), jnp.int32)
        return [
            program.train_step.lower(program.state, shape, shape).as_text(),
            program.init.lower(jax.ShapeDtypeStruct((), jnp.uint32)).as_text(),
        ]

    other = dict(preset="other", seed=7, epochs=3, checkpoint_every=2, validation_every=9, validation_tokens=512)
    assert other.keys() == HOST_FIELDS
    changed = dataclasses.replace(CONFIG, **other)
    assert cache_key(changed) == cache_key(CONFIG)
    assert text(changed) == text(CONFIG)
    for name, value in vars(CONFIG).items():
        assert name in HOST_FIELDS or repr(value) in cache_key(CONFIG)
    assert cache_key(dataclasses.replace(CONFIG, steps=30)) != cache_key(CONFIG)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    from jax_speedrun.run import train as module

    original = module.make_program

    def poisoned(config, mesh):
        """From step 8 on every update is NaN, as after an overflow: the loss of step 9 shows it."""
        program = original(config, mesh)

        def train_step(state, tokens, targets):
            state, loss = program.train_step(state, tokens, targets)
            factor = jnp.where(state.step >= 9, jnp.nan, 1.0)
            return state._replace(params=jax.tree.map(lambda p: p * factor, state.params)), loss

        return program._replace(train_step=jax.jit(train_step, donate_argnums=0))

    monkeypatch.setattr(module, "make_program", poisoned)
    with pytest.raises(DivergedError, match=r"step 10/20 is nan"):
        run(CONFIG, 1, data, tmp_path / "run")
    assert checkpoint.latest(tmp_path / "run")[0] == 5
    assert len(losses(tmp_path / "run")) == 9


def test_a_checkpoint_is_never_written_from_parameters_that_are_not_finite(data, tmp_path, monkeypatch):
    monkeypatch.setattr("jax_speedrun.run.loop._all_finite", lambda params: False)
    with pytest.raises(DivergedError, match="step 5/20"):
        run(CONFIG, 1, data, tmp_path / "run")
    assert not [path for path in (tmp_path / "run" / "checkpoints").glob("*") if path.name.isdigit()]


def test_the_step_is_donated_and_pure(data):
    mesh = make_mesh(1, 8)
    program = make_program(CONFIG, mesh)
    shape = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    state = jax.eval_shape(program.init, 0)
    lowered = program.train_step.lower(state, shape, shape)
    donated = [info.donated for info in jax.tree.leaves(lowered.args_info[0][0])]
    assert all(donated)


@pytest.mark.slow
def test_profile_leaves_a_trace_and_the_losses_as_they_are(data, reference_run, tmp_path, capsys):
    run(CONFIG, 1, data, tmp_path / "run", profile=True)
    assert list((tmp_path / "run" / "profile").glob("**/*.xplane.pb"))
    assert f"trace: {tmp_path}/run/profile" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(reference_run[0])


@pytest.mark.slow
def test_a_later_run_finds_its_programs_compiled(data, tmp_path, monkeypatch):
    (tmp_path / "programs").mkdir()
    programs = ProgramCache(tmp_path / "programs", jax.devices()[:1])
    # Of a size that no other test has compiled.
    config = dataclasses.replace(CONFIG, steps=17, model=dataclasses.replace(CONFIG.model, mlp_width=40))
    run(config, 1, data, tmp_path / "first", programs=programs)
    assert len(list(programs.folder.glob("*.program"))) == 3

    def lowered(program):
        raise AssertionError("lowered again")

    monkeypatch.setattr("jax_speedrun.run.compilation.kernel_calls", lowered)
    run(config, 1, data, tmp_path / "second", programs=programs)
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    run(dataclasses.replace(config, seed=5), 1, data, tmp_path / "another seed", programs=programs)
    assert losses(tmp_path / "another seed") != losses(tmp_path / "first")
    with pytest.raises(AssertionError, match="lowered again"):
        run(dataclasses.replace(config, steps=16), 1, data, tmp_path / "other", programs=programs)


class TestBadInput:
    """Every mistake: one line that names the option or file, exit code 2, nothing written."""

    def check(self, capsys, tmp_path, *arguments, mentions):
        out = tmp_path / "never"
        arguments = [str(argument) for argument in arguments]
        if not {"--resume", "--out", "--out=", "--auto-resume"} & set(arguments):
            arguments += ["--out", str(out)]
        try:
            code = command.main(arguments)
        except SystemExit as exit:  # as argparse has it
            code = exit.code
        assert code == 2
        error = capsys.readouterr().err
        assert error.startswith("train.py: error: ")
        assert error.count("\n") == 1
        for text in mentions:
            assert text in error
        assert not out.exists()

    def shard(self, tmp_path, change):
        folder = tmp_path / "data"
        folder.mkdir()
        write_shard(folder / "a_val_0.bin", np.zeros(70_000, np.uint16))
        write_shard(folder / "a_train_0.bin", np.zeros(70_000, np.uint16))
        raw = bytearray((folder / "a_train_0.bin").read_bytes())
        (folder / "a_train_0.bin").write_bytes(change(raw))
        return folder

    def test_profile_of_a_run_too_short_for_it(self, capsys, tmp_path):
        self.check(
            capsys, tmp_path, "--preset", "tiny", "--steps", "15", "--profile", mentions=["--profile", "--steps"]
        )

    def test_missing_data_folder(self, capsys, tmp_path):
        self.check(capsys, tmp_path, "--preset", "tiny", "--data", "/no/such", mentions=["/no/such", "--data"])

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda raw: b"\0\0\0\0" + raw[4:], "magic"),
            (lambda raw: raw[:4] + b"\7\0\0\0" + raw[8:], "version"),
            (lambda raw: raw[:-2], "tokens"),
            (lambda raw: raw[:-2] + (50257).to_bytes(2, "little"), "50257"),
            (lambda raw: raw[:8] + b"\0\0\0\0" + raw[12:1024], "a_train_0"),
        ],
    )
    def test_bad_shard(self, capsys, tmp_path, change, word):
        folder = self.shard(tmp_path, change)
        self.check(capsys, tmp_path, "--preset", "tiny", "--data", folder, mentions=["a_train_0.bin", word])

    def test_sequence_length(self, capsys, tmp_path):
        self.check(
            capsys, tmp_path, "--preset", "tiny", "--sequence-length", 1000, mentions=["--sequence-length", "128"]
        )

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_a_seed_that_is_none(self, capsys, tmp_path, seed):
        self.check(capsys, tmp_path, "--preset", "tiny", "--seed", seed, mentions=["--seed", "4294967295"])

    def test_unknown_preset(self, capsys, tmp_path):
        self.check(capsys, tmp_path, "--preset", "huge", mentions=["--preset huge", "tiny", "eighth", "sub3min"])

    def test_mesh_does_not_divide_the_batch(self, capsys, tmp_path):
        self.check(capsys, tmp_path, "--preset", "tiny", "--mesh", 3, mentions=["--mesh 3", "1, 2, 4, 8"])

    def test_more_devices_than_there_are(self, capsys, tmp_path):
        self.check(
            capsys, tmp_path, "--preset", "tiny", "--sequences", 64, "--mesh", 64, mentions=["--mesh 64", "--mesh 8"]
        )

    def test_resume_without_checkpoint(self, capsys, tmp_path):
        self.check(capsys, tmp_path, "--resume", tmp_path, mentions=["--resume", "no complete checkpoint"])

    def test_resume_with_another_configuration(self, capsys, tmp_path, reference_run):
        self.check(
            capsys,
            tmp_path,
            "--resume",
            reference_run[0],
            "--seed",
            7,
            mentions=["another configuration", "seed (0 -> 7)"],
        )

    def test_output_folder_cannot_be_written(self, capsys, tmp_path):
        (tmp_path / "file").write_text("")
        self.check(capsys, tmp_path, "--preset", "tiny", "--out", tmp_path / "file" / "run", mentions=["--out"])

    def test_output_folder_holds_a_run(self, capsys, tmp_path, reference_run):
        before = (reference_run[0] / "log.txt").read_text()
        self.check(capsys, tmp_path, "--preset", "tiny", "--out", reference_run[0], mentions=["--out", "--auto-resume"])
        assert (reference_run[0] / "log.txt").read_text() == before

    def test_out_of_data(self, capsys, tmp_path):
        self.check(capsys, tmp_path, "--preset", "tiny", "--steps", 10_000, mentions=["--steps", "--epochs"])

    def test_attention_that_does_not_run_here(self, capsys, tmp_path):
        words = ["--attention hopper", "H100", "xla"]
        self.check(capsys, tmp_path, "--preset", "tiny", "--attention", "hopper", mentions=words)

    @pytest.mark.parametrize("number", [0, -1, 2**31, 10**30, "1e3", "many", ""])
    @pytest.mark.parametrize(
        "option", ["--steps", "--sequences", "--epochs", "--validation-every", "--sequence-length"]
    )
    def test_numbers(self, option, number, capsys, tmp_path):
        self.check(capsys, tmp_path, "--preset", "tiny", f"{option}={number}", mentions=[option])

    @pytest.mark.parametrize(
        "option",
        ["--mesh=0", "--mesh=-1", "--mesh=x", "--seed=1.5", "--checkpoint-every=-1", "--out=", "--data=", "--no"],
    )
    def test_other_options(self, option, capsys, tmp_path):
        self.check(capsys, tmp_path, "--preset", "tiny", option, mentions=[option.split("=")[0]])

    @pytest.mark.parametrize(
        ("options", "mentions"),
        [
            (["--auto-resume"], ["--auto-resume: needs --out DIR"]),
            (["--auto-resume", "--out", "a", "--resume", "a"], ["--auto-resume: needs --out DIR, and no --resume"]),
            (["--resume-step", "5"], ["needs --resume"]),
            (["--resume", "a", "--out", "b"], ["leave out --out"]),
        ],
    )
    def test_options_that_do_not_go_together(self, options, mentions, capsys, tmp_path):
        self.check(capsys, tmp_path, *options, mentions=mentions)

    @pytest.mark.slow
    def test_a_newer_checkpoint(self, capsys, tmp_path, reference_run, monkeypatch):
        """What another version has saved: a field more, a field less, another shape."""
        saved = checkpoint.latest(reference_run[0])

        def changed(change):
            config = json.loads(json.dumps(saved.metadata["config"]))
            change(config)
            latest = checkpoint.Saved(saved.step, {**saved.metadata, "config": config})
            monkeypatch.setattr(checkpoint, "latest", lambda *_: latest)

        changed(lambda config: config.update(shape="round"))
        self.check(capsys, tmp_path, "--resume", reference_run[0], mentions=["another version", "shape"])
        changed(lambda config: config["model"].pop("width"))
        self.check(capsys, tmp_path, "--resume", reference_run[0], mentions=["another version", "width"])
        changed(lambda config: config["model"].update(width=32))
        self.check(capsys, tmp_path, "--resume", reference_run[0], "--mesh", 1, mentions=["not a state", "float32["])

    @pytest.mark.parametrize("platform", ["nonsense", "cuda"])
    def test_a_platform_that_jax_does_not_find(self, platform, tmp_path):
        environment = {**os.environ, "JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--preset", "tiny"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"train.py: error: JAX finds no device to run on for JAX_PLATFORMS={platform} (")
        assert done.stderr.count("\n") == 1

    def test_steps(self, capsys, tmp_path):
        self.check(capsys, tmp_path, "--preset", "tiny", "--steps", 0, mentions=["--steps"])


def test_dry_run_compiles_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "train", None)
    monkeypatch.chdir(tmp_path)
    for preset, words in (("tiny", ["16.4 M", "8,192 a step"]), ("sub3min", ["275.6 M", "726,138,880"])):
        assert command.main(["--preset", preset, "--mesh", "8", "--dry-run"]) == 0
        printed = capsys.readouterr().out
        for word in (*words, "8 x cpu", "GiB", "reduce-scatter", "all-gather"):
            assert word in printed
    assert list(tmp_path.iterdir()) == []


def test_compiled_programs_are_kept_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "train", lambda *_, **__: Outcome(3.28, None))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert command.main(["--preset", "tiny", "--mesh", "1"]) == 0
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jax_speedrun")
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_compilation_cache_max_size", before[1])
