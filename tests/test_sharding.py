"""The sharded optimiser against the plain one, whole steps on any mesh, and checkpoints that fit all of them."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, PartitionSpec

from jax_speedrun.banks import banks, pack, unpack
from jax_speedrun.config import PRESETS, Config, OptimizerConfig
from jax_speedrun.data.batches import TINY_DATA, TokenBatches, find_shards
from jax_speedrun.optimizer import muon, recipe_optimizer, shared_state, state_specs, whole_state
from jax_speedrun.sharding import DATA_AXIS, compiler_options, make_mesh, replicate, shards_of
from jax_speedrun.step import Program, make_program
from tests.marks import slow
from tests.numpy_optimizer import normal

FLOAT32_RATES = OptimizerConfig(newton_schulz_dtype="float32", update_dtype="float32", momentum_warmup_steps=3)

# Every part of the recipe, few numbers: 49 table rows and 12 squares do not fill 8 devices evenly. The scalars stand
# still: noise decides their first step on any machine (docs/lab-book.md), and with it the losses' fourth digit.
SMALL = Config(
    "small",
    model=dataclasses.replace(
        PRESETS["tiny"].model,
        vocab_size=49,
        padded_vocab_size=56,
        layers=4,
        width=32,
        mlp_width=64,
        long_layers=(0, 3),
        attention_free_layers=(2,),
        value_embedding_tables=1,
    ),
    optimizer=dataclasses.replace(PRESETS["tiny"].optimizer, scalar_learning_rate=0.0),
    steps=50,
    sequence_length=128,
    attention="reference",
)


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """The same programs are compiled in several tests."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def mesh_of(devices: int) -> Mesh:
    return jax.make_mesh((devices,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


# --- Banks ------------------------------------------------------------------------

shapes = st.lists(
    st.tuples(st.sampled_from([(), (3,), (2, 2)]), st.sampled_from([(4, 4), (4, 8), (8, 4), (2, 8)])).map(
        lambda pair: pair[0] + pair[1]
    ),
    min_size=1,
    max_size=20,
)


@given(shapes, st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_banks_hold_every_matrix_once_and_devices_share_buckets_evenly(shapes, devices):
    layout = banks(shapes, devices)
    members = [member for bank in layout for bucket in bank.members for member in bucket]
    expected = [(leaf, i) for leaf, shape in enumerate(shapes) for i in range(int(np.prod(shape[:-2])))]
    assert sorted(members) == expected
    for bank in layout:
        assert all(size % devices == 0 for size in bank.sizes)
        assert all(size - devices < len(bucket) <= size for size, bucket in zip(bank.sizes, bank.members, strict=True))
        assert all(len(bucket) == size for size, bucket in list(zip(bank.sizes, bank.members, strict=True))[:-1])
        # Last leaf first: what the backward pass finishes first travels first.
        order = [leaf for bucket in bank.members for leaf, _ in bucket]
        assert order == sorted(order, reverse=True)


def test_the_record_fills_six_buckets_of_squares_and_three_of_rectangles():
    block = [(3, 768, 768), (768, 768), (3072, 768), (768, 3072)]
    layout = banks([s for layer in range(12) for s in (block if layer != 7 else block[2:])], 8)
    assert {(bank.short, bank.long): bank.sizes for bank in layout} == {(768, 3072): (8,) * 3, (768, 768): (8,) * 6}


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_unpack_undoes_pack(devices):
    tree = {str(i): jnp.asarray(normal(i, *shape)) for i, shape in enumerate([(3, 4, 4), (6, 4), (4, 6), (4, 4)])}
    buckets = pack(tree, devices)
    assert all(bucket.shape[0] % devices == 0 for bank in buckets for bucket in bank)
    jax.tree.map(np.testing.assert_array_equal, unpack(buckets, tree, devices), tree)


# --- The optimiser ----------------------------------------------------------------


def parameters(layers: int, width: int, rows: int) -> dict[str, Any]:
    names = {"qkv": (3, width, width), "out": (width, width), "fc": (2 * width, width), "proj": (width, 2 * width)}
    return {
        "embed": jnp.ones((rows, 4)),
        "head": jnp.ones((rows + 3, 4)),
        "blocks": {i: {name: jnp.ones(shape) for name, shape in names.items()} for i in range(layers)},
        "skip_weights": jnp.ones(3),
    }


def gradients_of(params: Any, devices: int, steps: int) -> list[Any]:
    """For each step a gradient for every device, on a leading axis."""
    leaves, structure = jax.tree.flatten(params)
    return [
        jax.tree.unflatten(
            structure,
            [jnp.asarray(normal(100 * t + i, devices, *leaf.shape), jnp.float32) for i, leaf in enumerate(leaves)],
        )
        for t in range(steps)
    ]


def train_shared(rates: OptimizerConfig, params: Any, gradients: list[Any], mesh: Mesh) -> tuple[Any, Any]:
    """Parameters and state after one sharded update a gradient."""
    shards = shards_of(mesh)
    optimizer = recipe_optimizer(rates, 10, shards)
    state = optimizer.init(params)
    specs = state_specs(state, shards)

    def update(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        own = jax.tree.map(lambda g: g[0], gradient)
        if shards is not None:
            own = own | {"skip_weights": jax.lax.pmean(own["skip_weights"], DATA_AXIS)}
        updates, state = optimizer.update(own, state, params)
        return optax.apply_updates(params, updates), state

    everywhere, split = PartitionSpec(), PartitionSpec(DATA_AXIS)
    shared = jax.shard_map(
        update, mesh=mesh, in_specs=(everywhere, specs, split), out_specs=(everywhere, specs), check_vma=False
    )
    step = jax.jit(shared)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


def train_plain(rates: OptimizerConfig, params: Any, gradients: list[Any]) -> tuple[Any, Any]:
    optimizer = recipe_optimizer(rates, 10)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        mean = jax.tree.map(lambda g: jnp.mean(g, 0), gradient)
        updates, state = update(mean, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    def check(path: Any, a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(check, actual, expected)


def check_shared_is_plain(devices: int, layers: int, width: int, rows: int) -> None:
    params = parameters(layers, width, rows)
    gradients = gradients_of(params, devices, 3)
    mesh = mesh_of(devices)
    got, state = train_shared(FLOAT32_RATES, params, gradients, mesh)
    want, plain = train_plain(FLOAT32_RATES, params, gradients)
    assert_close(got, want, 2e-6)
    shards = shards_of(mesh)
    if shards is None:
        return
    assert_close(whole_state(state, plain, shards), plain, 2e-6)
    # What fills up rows and buckets has stayed zero, and there is such filling.
    jax.tree.map(np.testing.assert_array_equal, shared_state(whole_state(state, plain, shards), shards), state)
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(state_specs(state, shards)), strict=True):
        assert leaf.sharding.spec == spec
        assert leaf.addressable_shards[0].data.size * (devices if spec else 1) == leaf.size


@pytest.mark.parametrize("devices", [slow(1), 8])
def test_sharded_updates_are_the_plain_ones(devices):
    check_shared_is_plain(devices, layers=2, width=8, rows=13)


@pytest.mark.slow
@given(st.sampled_from([2, 3, 4, 5, 8]), st.integers(1, 4), st.sampled_from([2, 5, 8]), st.integers(1, 20))
@settings(max_examples=3, deadline=None)
def test_sharded_updates_of_any_shapes_are_the_plain_ones(devices, layers, width, rows):
    check_shared_is_plain(devices, layers, width, rows)


@pytest.mark.slow
def test_updates_are_rounded_alike_on_one_device_and_on_two():
    """Adam's update is a bfloat16 number times the rate: on two devices it travelled as one."""
    rates = dataclasses.replace(FLOAT32_RATES, head_learning_rate=0.5, embedding_learning_rate=0.5)
    rates = dataclasses.replace(rates, update_dtype="bfloat16")
    zero = jax.tree.map(jnp.zeros_like, parameters(1, 2, 5))
    gradients = gradients_of(zero, 2, 2)
    (plain, _), (shared, _) = train_plain(rates, zero, gradients), train_shared(rates, zero, gradients, mesh_of(2))
    first, _ = train_plain(rates, zero, gradients[:1])
    for name in ("embed", "head"):
        np.testing.assert_array_equal(plain[name], shared[name])
        update = np.asarray(plain[name] - first[name])
        np.testing.assert_array_equal(update, update.astype(jnp.bfloat16).astype(np.float32))
        assert not np.all(np.isin(np.abs(update), [0, 0.5]))


@pytest.mark.slow
def test_muon_with_shards_composes_with_optax():
    mesh = mesh_of(2)
    params = {"w": jnp.zeros((3, 4, 4)), "v": jnp.zeros((6, 4))}
    (gradient,) = gradients_of(params, 2, 1)
    shared = optax.inject_hyperparams(
        functools.partial(muon, shards=shards_of(mesh)), static_args="newton_schulz_steps"
    )
    transform = shared(0.1, 0.9, dtype=jnp.dtype(jnp.float32))
    state = transform.init(params)
    specs = jax.tree.map(lambda leaf: PartitionSpec(DATA_AXIS) if leaf.ndim > 1 else PartitionSpec(), state)
    updates, _ = jax.jit(
        jax.shard_map(
            lambda g, s: transform.update(jax.tree.map(lambda x: x[0], g), s),
            mesh=mesh,
            in_specs=(PartitionSpec(DATA_AXIS), specs),
            out_specs=(PartitionSpec(), specs),
            check_vma=False,
        )
    )(gradient, state)
    plain = muon(0.1, 0.9, dtype=jnp.float32)
    mean = jax.tree.map(lambda g: jnp.mean(g, 0), gradient)
    assert_close(updates, plain.update(mean, plain.init(params))[0], 2e-6)


# --- Whole steps ------------------------------------------------------------------


def small_batches(steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    tokens = np.random.default_rng(0).zipf(1.3, (steps, 8, 129)) % 48
    tokens[:, :, 0] = 48
    return [(t[:, :-1].astype(np.int32), t[:, 1:].astype(np.int32)) for t in tokens]


@functools.cache
def small_program(devices: int) -> Program:
    return make_program(SMALL, mesh_of(devices))


def losses(program: Program, batches: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    state, seen = program.init(0), []
    for batch in batches:
        state, metrics = program.train_step(state, *batch)
        seen.append(metrics.loss)
    return np.asarray(seen)


@functools.cache
def small_losses(devices: int) -> np.ndarray:
    return losses(small_program(devices), small_batches(SMALL.steps))


def test_eight_devices_give_the_losses_of_one():
    got, want = small_losses(8), small_losses(1)
    assert want[-1] < want[0] - 0.3
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
def test_checkpoints_fit_any_number_of_devices():
    """2 -> 8 -> 1 devices, between them as on disk: every number of devices has the same arrays, bit for bit."""
    batches = small_batches(4)
    program = small_program(2)
    state = program.init(0)
    for batch in batches[:2]:
        state, _ = program.train_step(state, *batch)
    saved = program.to_checkpoint(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), saved) == jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(small_program(1).init, 0)
    )
    for devices in (8, 1):
        program = small_program(devices)
        on_disk = jax.tree.map(np.asarray, saved)
        whole = jax.tree.map(lambda x, d=devices: jax.device_put(x, replicate(mesh_of(d))), on_disk)
        state = program.from_checkpoint(whole)
        for leaf, fresh in zip(jax.tree.leaves(state), jax.tree.leaves(program.init(0)), strict=True):
            assert leaf.sharding == fresh.sharding
        saved = program.to_checkpoint(state)
        jax.tree.map(np.testing.assert_array_equal, saved, on_disk)
    for batch, loss in zip(batches[2:], small_losses(1)[2:4], strict=True):
        state, metrics = program.train_step(state, *batch)
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_program_knows_what_a_state_and_a_checkpoint_of_it_look_like(devices):
    program = small_program(devices)
    state = program.init(0)
    for arrays, known in ((state, program.state), (program.to_checkpoint(state), program.saved)):
        assert jax.tree.structure(arrays) == jax.tree.structure(known)
        for array, leaf in zip(*map(jax.tree.leaves, (arrays, known)), strict=True):
            assert (array.shape, array.dtype, array.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)


def test_compiler_options_only_where_the_backend_knows_them():
    assert compiler_options(mesh_of(1)) is None
    assert compiler_options(mesh_of(8)) is None  # CPU


@pytest.mark.parametrize("devices", [1, 8])
def test_xla_has_the_options_that_gpus_get(devices):
    gpus = SimpleNamespace(size=devices, devices=np.array([SimpleNamespace(platform="gpu")] * devices))
    options = compiler_options(gpus)
    assert ("xla_gpu_enable_latency_hiding_scheduler" in options) == (devices > 1)
    # XLA refuses names that it does not know on any backend, and then ignores what is meant for another.
    jax.jit(jnp.negative, compiler_options=options)(jnp.ones(3))
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(jnp.negative, compiler_options=options | {"xla_gpu_unheard_of": True})(jnp.ones(3))


@functools.cache
def tiny_losses(devices: int, steps: int, *, all_move: bool) -> np.ndarray:
    """`tiny` does Newton-Schulz and updates in float32. Unless `all_move`, scalars and tables stand still (T = 128)."""
    config = dataclasses.replace(PRESETS["tiny"], steps=50, epochs=3, attention="xla")
    if not all_move:
        rates = dataclasses.replace(config.optimizer, scalar_learning_rate=0.0, embedding_learning_rate=0.0)
        config = dataclasses.replace(config, optimizer=rates, sequence_length=128)
    batches = TokenBatches(find_shards(TINY_DATA, "train"), 8, config.sequence_length, epochs=3)
    return losses(make_program(config, make_mesh(devices, 8)), [next(batches) for _ in range(steps)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "all_move", "steps", "tolerance"),
    [(8, False, 50, 1e-5), (8, True, 8, 2e-4)],
)
def test_first_losses_of_tiny(devices, all_move, steps, tolerance):
    """Where a gradient is about as small as its rounding, Adam makes a whole step of the noise: docs/scaling.md."""
    got, want = (tiny_losses(n, steps, all_move=all_move) for n in (devices, 1))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got, want, rtol=tolerance)
