"""The program cache: a program comes back and computes the same, and never for something else than it was made for."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jax_speedrun
from jax_speedrun.run import program_cache
from jax_speedrun.run.compilation import Call, compile_together
from jax_speedrun.run.program_cache import KEPT, ProgramCache, cache_for
from jax_speedrun.sharding import make_mesh, replicate, split_sequences
from jax_speedrun.step import make_program
from tests.paths import ROOT
from tests.small_run import SMALL


@pytest.fixture
def cache(tmp_path):
    return ProgramCache(tmp_path, jax.devices()[:1])


def traced(function):
    """`function` jitted, and the list that grows whenever it is traced."""
    traces = []

    def double(*arguments):
        traces.append(1)
        return function(*arguments)

    return jax.jit(double), traces


def test_a_program_is_traced_once(cache):
    for _ in range(2):
        double, traces = traced(lambda x: {"twice": 2 * x})
        x = jnp.arange(3.0)
        (program,) = compile_together(Call(double, (x,)), cache=cache, cache_key="a")
        np.testing.assert_array_equal(program(x)["twice"], [0, 2, 4])
    assert not traces


def test_only_what_is_missing_is_compiled(cache):
    x = jnp.arange(3.0)
    one, other = jax.jit(jnp.sin), jax.jit(jnp.cos)
    compile_together(Call(other, (x,)), cache=cache)
    sine, cosine = compile_together(Call(one, (x,)), Call(other, (x,)), cache=cache)
    np.testing.assert_array_equal(sine(x), one(x))
    np.testing.assert_array_equal(cosine(x), other(x))


@pytest.mark.slow
def test_a_step_comes_back_with_its_trees_its_places_and_its_donation(tmp_path):
    config = SMALL
    mesh = make_mesh(2, config.sequences)
    cache = ProgramCache(tmp_path, mesh.devices.flat)
    program = make_program(config, mesh)
    shape = (config.sequences, config.sequence_length)
    tokens = jax.device_put(np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % 7, split_sequences(mesh))
    results = []
    for _ in range(2):
        calls = Call(program.train_step, (program.state, tokens, tokens)), Call(program.init, (jnp.uint32(0),))
        step, init = compile_together(*calls, cache=cache)
        state = init(jnp.uint32(0))
        results.append(step(state, tokens, tokens))
        assert state.params["head"].is_deleted()
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for first, second in zip(*map(jax.tree.leaves, results), strict=True):
        assert first.sharding == second.sharding
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_another_process_finds_it(tmp_path):
    code = f"""
import sys, jax, jax.numpy as jnp
from pathlib import Path
from jax_speedrun.run.compilation import Call, compile_together
from jax_speedrun.run.program_cache import ProgramCache
def cube(x):
    print("traced")
    return x ** 3
x = jnp.arange(3.0)
print(compile_together(Call(jax.jit(cube), (x,)), cache=ProgramCache(Path({str(tmp_path)!r}), jax.devices()))[0](x))
"""
    run = [sys.executable, "-c", code]
    outputs = [subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert outputs == ["traced\n[0. 1. 8.]\n", "[0. 1. 8.]\n"]


def test_what_jaxs_own_cache_gave_is_not_written_again(tmp_path):
    code = f"""
import jax, jax.numpy as jnp
from pathlib import Path
from jax_speedrun.run.compilation import Call, compile_together
from jax_speedrun.run.program_cache import ProgramCache
jax.config.update("jax_compilation_cache_dir", {str(tmp_path / "jax")!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
cache = ProgramCache(Path({str(tmp_path)!r}), jax.devices())
x = jnp.arange(3.0)
for cache_key in "ab":
    # Two functions, or JAX remembers the first one's program without asking its cache.
    program = compile_together(Call(jax.jit(lambda x: x**3 + jnp.sin(x)), (x,)), cache=cache, cache_key=cache_key)[0]
    print(program(x), len(list(cache.folder.glob("*.program"))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.endswith(" 1")


class TestKey:
    """Anything that a program depends on makes it another one."""

    name, cache_key, x = "f", "recipe", np.zeros((8, 2), np.float32)

    @pytest.fixture
    def filled(self, tmp_path):
        mesh = make_mesh(2, 2)
        cache, x = ProgramCache(tmp_path, mesh.devices.flat), jax.device_put(self.x, replicate(mesh))
        cache.save(self.name, self.cache_key, (x,), jax.jit(jnp.sin).lower(x).compile())
        assert cache.load(self.name, self.cache_key, (x,)) is not None
        assert cache.load(self.name, self.cache_key, (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),))
        return cache, x

    def test_name_and_recipe(self, filled):
        cache, x = filled
        assert cache.load("g", self.cache_key, (x,)) is None
        assert cache.load(self.name, "another", (x,)) is None

    def test_arguments(self, filled):
        cache, x = filled
        mesh = make_mesh(2, 2)
        for other in (
            x[:4],
            x.astype(jnp.int32),
            jax.device_put(self.x, split_sequences(mesh)),
            jax.device_put(self.x, jax.devices()[0]),
            jax.device_put(self.x, NamedSharding(make_mesh(4, 4), PartitionSpec())),
        ):
            assert cache.load(self.name, self.cache_key, (other,)) is None
        assert cache.load(self.name, self.cache_key, ((x,),)) is None
        assert cache.load(self.name, self.cache_key, (x, x)) is None

    def test_devices(self, filled):
        cache, x = filled
        for devices in (jax.devices()[1:3], jax.devices()[:1]):
            assert ProgramCache(cache.folder, devices).load(self.name, self.cache_key, (x,)) is None

    def test_options(self, filled, monkeypatch):
        cache, x = filled
        monkeypatch.setenv("XLA_FLAGS", "--xla_something")
        assert cache.load(self.name, self.cache_key, (x,)) is None
        monkeypatch.undo()
        with jax.default_matmul_precision("tensorfloat32"):  # the default, or what another test has left
            assert cache.load(self.name, self.cache_key, (x,)) is None

    def test_code(self, filled, tmp_path, monkeypatch):
        cache, x = filled
        (tmp_path / "package").mkdir()
        code = tmp_path / "package" / "step.py"
        monkeypatch.setattr(jax_speedrun, "__file__", str(tmp_path / "package" / "__init__.py"))
        digests = set()
        for text in ("a = 1", "a = 2"):
            code.write_text(text)
            program_cache._source_digest.cache_clear()
            digests.add(program_cache._source_digest())
            assert cache.load(self.name, self.cache_key, (x,)) is None
        assert len(digests) == 2
        monkeypatch.undo()
        program_cache._source_digest.cache_clear()
        assert cache.load(self.name, self.cache_key, (x,)) is not None

    def test_all_of_the_code(self, monkeypatch):
        read, original = set(), Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: (read.add(path.resolve()), original(path))[1])
        program_cache._source_digest.cache_clear()
        program_cache._source_digest()
        assert read == {path for folder in ("jax_speedrun", "kernels") for path in (ROOT / folder).rglob("*.py")}


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:100] + b"x" + b[101:]])
def test_a_damaged_file_is_compiled_anew(cache, capsys, damage):
    x = jnp.arange(3.0)
    compile_together(Call(jax.jit(jnp.sin), (x,)), cache=cache)
    (path,) = cache.folder.glob("sin-*.program")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    (program,) = compile_together(Call(jax.jit(jnp.sin), (x,)), cache=cache)
    np.testing.assert_array_equal(program(x), jnp.sin(x))
    assert f"{path}: damaged, so sin is compiled anew" in capsys.readouterr().err
    assert len(path.read_bytes()) > 1000


def test_a_program_that_does_not_load_is_compiled_anew(cache, capsys, monkeypatch):
    x = jnp.arange(3.0)
    compile_together(Call(jax.jit(jnp.sin), (x,)), cache=cache)

    def refuse(*_, **__):
        raise RuntimeError("another driver")

    monkeypatch.setattr("jax.experimental.serialize_executable.deserialize_and_load", refuse)
    (program,) = compile_together(Call(jax.jit(jnp.sin), (x,)), cache=cache)
    np.testing.assert_array_equal(program(x), jnp.sin(x))
    assert "not loaded (another driver), so sin is compiled anew" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_a_line(tmp_path, capsys, monkeypatch):
    cache = ProgramCache(tmp_path, jax.devices()[:1])
    x = jnp.arange(3.0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    (program,) = compile_together(Call(jax.jit(jnp.sin), (x,)), cache=cache)
    np.testing.assert_array_equal(program(x), jnp.sin(x))
    assert "No space left on device), so the next run compiles sin again" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_longest_unused_go(cache):
    program = jax.jit(jnp.sin).lower(x := jnp.arange(3.0)).compile()
    for number in range(KEPT + 2):
        if number == KEPT:  # the first is used again
            assert cache.load("sin", "0", (x,)) is not None
        cache.save("sin", str(number), (x,), program)
    found = [number for number in range(KEPT + 2) if cache.load("sin", str(number), (x,)) is not None]
    assert found == [0, *range(3, KEPT + 2)]


def test_who_has_a_store(tmp_path, monkeypatch):
    class Mesh:
        def __init__(self, platform):
            self.devices = np.array([type("Device", (), {"platform": platform})()])

    assert cache_for(Mesh("gpu"), tmp_path).folder == tmp_path
    assert cache_for(Mesh("cpu"), tmp_path) is None
    assert cache_for(Mesh("gpu"), None) is None
    assert cache_for(Mesh("gpu"), tmp_path / "missing") is None
    monkeypatch.setattr("jax_speedrun.run.distributed.several", lambda: True)
    assert cache_for(Mesh("gpu"), tmp_path) is None
