"""The Hopper kernels without a GPU: schedules against brute force, kernel bodies in the interpreter, lowering for CUDA.

The interpreter takes a second or two for each run of the three kernels, so a few masks with many kinds of
rows go through it, and several hundred through the packed lists that decide what the kernels look at.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_speedrun.kernels.attention import block_sparse_attention, unsupported
from jax_speedrun.kernels.attention.hopper import hopper_attention
from jax_speedrun.kernels.attention.schedule import (
    DOCUMENTS_BIT,
    ENTRY_BITS,
    HEADER,
    POSITIONS_BIT,
    assign_tiles,
    build_schedule,
)
from jax_speedrun.kernels.block_mask import BLOCK_SIZE, BlockMask, long_short_masks
from jax_speedrun.kernels.hopper.config import WARPGROUP_ROWS
from jax_speedrun.kernels.implementation import choose, compiling_for_hopper, interpret_kernels
from jax_speedrun.kernels.masks import causal, same_document
from tests.devices import B200, H100
from tests.numpy_attention import dense_attention, random_mask, spread

SCALE = 0.12
KERNEL_CASES = int(os.environ.get("KERNEL_CASES", "8"))  # each takes a second or two in the interpreter
BLOCKS, HEADS, WIDTH = 2, 2, 64  # four tiles: three in rounds to one program, one to another


traces: list[tuple[int, ...]] = []


@functools.partial(jax.jit, static_argnames="scale")
def output_and_gradients(q, k, v, d_output, mask, scale):
    traces.append(q.shape)  # runs when traced, so once a compilation
    output, pull = jax.vjp(lambda q, k, v: hopper_attention(q, k, v, mask, scale=scale), q, k, v)
    return output, *pull(d_output)


def interpreted(q, k, v, d_output, mask, scale=SCALE):
    with interpret_kernels():
        return output_and_gradients(q, k, v, d_output, mask, scale)


def random_inputs(rng, *shape):
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(4)]


def assert_close(results, inputs, visible, scale=SCALE):
    """bf16 results, and products of bf16 probabilities: errors of some 2^-8 of the largest value."""
    for got, want in zip(results, dense_attention(*inputs, visible, scale), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.02 * max(1.0, np.abs(want).max()))
        error = np.linalg.norm(np.asarray(got, np.float64) - want)
        # Where few pairs are seen, the roundings of P and of P (dP - delta) do not average out: 2^-7 = 7.8e-3 and more.
        # Rows that see one key have a gradient of exactly 0, of which float32 leaves 2^-23 of dP's size.
        assert error <= 1e-2 * np.linalg.norm(want) + 1e-6 * np.sqrt(want.size)


def tokens_with_documents(rng, length, documents):
    tokens = np.full(length, 7)
    tokens[0] = 50256
    tokens[rng.integers(0, length, documents)] = 50256
    return jnp.asarray(tokens, jnp.int32)


def half_block(block, half):
    start = block * BLOCK_SIZE + half * WARPGROUP_ROWS
    return slice(start, start + WARPGROUP_ROWS)


def visited_pairs(table, documents, by_key):
    """The token-level pairs that the kernels use when they follow a schedule's table, in plain NumPy."""
    table, position = np.asarray(table), np.arange(len(documents))
    visible = np.zeros((len(documents),) * 2, bool)
    for row, count, *entries in table:
        for entry in entries[:count]:
            query_block, key_block = (entry >> ENTRY_BITS, row) if by_key else (row, entry >> ENTRY_BITS)
            for query_half in range(2):
                for key_half in range(2):
                    queries, keys = half_block(query_block, query_half), half_block(key_block, key_half)
                    seen = np.full((WARPGROUP_ROWS, WARPGROUP_ROWS), bool(entry >> (2 * query_half + key_half) & 1))
                    if entry >> DOCUMENTS_BIT & 1:
                        seen &= documents[queries, None] == documents[keys]
                    if entry >> POSITIONS_BIT & 1:
                        seen &= position[queries, None] >= position[keys]
                    assert not visible[queries, keys].any(), "visited twice"
                    visible[queries, keys] = seen
    return visible


jitted_schedule = jax.jit(build_schedule)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0, 1), boundary=st.sampled_from([0.0, 0.002, 0.02, 0.5]))
def test_a_schedule_holds_exactly_the_visible_pairs(seed, density, boundary):
    rng = np.random.default_rng(seed)
    mask, _ = random_mask(rng, blocks=4, block_size=BLOCK_SIZE, density=density)
    documents = np.cumsum(rng.random(4 * BLOCK_SIZE) < boundary)
    if seed % 3 == 0:  # the mask does not promise that ids only grow
        documents = rng.permutation(documents)
    mask = dataclasses.replace(mask, predicate=causal() & same_document(jnp.asarray(documents, jnp.int32)))
    schedule, want = jitted_schedule(mask), np.asarray(mask.dense())
    np.testing.assert_array_equal(visited_pairs(schedule.by_query, documents, by_key=False), want)
    np.testing.assert_array_equal(visited_pairs(schedule.by_key, documents, by_key=True), want)
    for table in (schedule.by_query, schedule.by_key):
        assert sorted(np.asarray(table)[:, 0]) == list(range(4))
        assert table.shape == (4, HEADER + 4 + 2)


@given(st.integers(1, 5000), st.integers(1, 200))
def test_every_tile_is_assigned_once(tiles, multiprocessors):
    taken = [first + stride * i for first, stride, count in assign_tiles(tiles, multiprocessors) for i in range(count)]
    assert sorted(taken) == list(range(tiles))


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])  # one for each core
@settings(max_examples=KERNEL_CASES // 2, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.2, 1))
def test_random_lists(half, seed, density):
    rng = np.random.default_rng(seed)
    mask, visible = random_mask(rng, BLOCKS, BLOCK_SIZE, density)
    inputs = random_inputs(rng, BLOCKS * BLOCK_SIZE, HEADS, WIDTH)
    assert_close(interpreted(*inputs, mask), inputs, visible)


def test_rows_that_see_nothing():
    """Block 0's queries list nothing; block 1's only see keys of another document, so nothing either, but a few."""
    rng = np.random.default_rng(0)
    none, one = jnp.zeros(BLOCKS, jnp.int32), jnp.array([0, 1], jnp.int32)
    first_key_block = jnp.zeros((BLOCKS, BLOCKS), jnp.int32)
    documents = jnp.where(jnp.arange(2 * BLOCK_SIZE) < 250, 0, 1) * (jnp.arange(2 * BLOCK_SIZE) >= BLOCK_SIZE)
    documents = documents.at[: BLOCK_SIZE // 2].set(3)  # queries 128..249 see keys 64..127, the last six see none
    mask = BlockMask(one, first_key_block, none, first_key_block, causal() & same_document(documents))
    inputs = random_inputs(rng, BLOCKS * BLOCK_SIZE, HEADS, WIDTH)
    output, dq, dk, dv = interpreted(*inputs, mask)
    assert_close((output, dq, dk, dv), inputs, np.asarray(mask.dense()))
    for blind in (slice(0, BLOCK_SIZE), slice(250, 256)):
        assert not np.asarray(output[blind]).any()
        assert not np.asarray(dq[blind]).any()
    assert not np.asarray(dk[BLOCK_SIZE:]).any()
    assert not np.asarray(dv[: BLOCK_SIZE // 2]).any()


@pytest.mark.parametrize("poisons", [{"q": np.nan, "k": np.inf}, {"v": np.nan, "do": -np.inf}])
def test_what_a_query_does_not_see_is_not_felt(poisons):
    """In a block that a list names only after its end, and masked in blocks that are visited. What is seen shows."""
    rng = np.random.default_rng(4)
    tokens = tokens_with_documents(rng, BLOCKS * BLOCK_SIZE, 4)
    mask, _ = long_short_masks(tokens, 2)
    # Block 1's queries visit block 1 alone; block 0 stands behind the end of both of its lists.
    behind = jnp.array([[0, 0], [1, 0]], jnp.int32)
    mask = dataclasses.replace(
        mask,
        partial_counts=jnp.ones(2, jnp.int32),
        partial_indices=behind,
        full_counts=jnp.zeros(2, jnp.int32),
        full_indices=behind[::-1],
    )
    visible = np.asarray(mask.dense())
    inputs = dict(zip(("q", "k", "v", "do"), random_inputs(rng, BLOCKS * BLOCK_SIZE, HEADS, WIDTH), strict=True))
    bad = {name: np.zeros((BLOCKS * BLOCK_SIZE, HEADS), bool) for name in inputs}
    clean, spoilt = dense_attention(*inputs.values(), visible, SCALE), dict(inputs)
    for head, (where, poison) in enumerate(poisons.items()):
        bad[where][[20, 100, 128, 200], head] = True
        spoilt[where] = inputs[where].at[..., 3].set(jnp.where(bad[where], poison, inputs[where][..., 3]))
    results = interpreted(*spoilt.values(), mask)
    for got, want, touched in zip(results, clean, spread(bad, visible), strict=True):
        got = np.asarray(got, np.float64)
        np.testing.assert_allclose(got[~touched], want[~touched], atol=0.02 * max(1.0, np.abs(want).max()))
        assert not np.isfinite(got[touched]).any()
        assert touched.any()
        assert not touched.all()


@pytest.mark.slow
def test_windows_compile_once_and_repeat_to_the_bit():
    rng = np.random.default_rng(2)
    tokens = tokens_with_documents(rng, BLOCKS * BLOCK_SIZE, 2)
    inputs = random_inputs(rng, BLOCKS * BLOCK_SIZE, HEADS, WIDTH)
    results, compiled = None, []
    for window in (1, 1, 2, 2):
        mask, _ = long_short_masks(tokens, window)
        previous, results = results, interpreted(*inputs, mask)
        assert_close(results, inputs, np.asarray(mask.dense()))
        compiled.append(len(traces))
    # The interpreter's first use changes a setting of JAX's, which costs a second trace; then there are no more.
    assert len(set(compiled[1:])) == 1
    for first, second in zip(previous, results, strict=True):
        np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))


@pytest.mark.slow
def test_head_width_128_and_another_scale():
    rng = np.random.default_rng(3)
    mask, _ = long_short_masks(tokens_with_documents(rng, 2 * BLOCK_SIZE, 3), 2)
    inputs = random_inputs(rng, 2 * BLOCK_SIZE, 1, 128)
    assert_close(interpreted(*inputs, mask, scale=0.05), inputs, np.asarray(mask.dense()), scale=0.05)


SUPPORTED = {"dtype": "bfloat16", "head_width": 64, "block_size": BLOCK_SIZE, "scale": SCALE}


def mask_of(length):
    blocks = length // BLOCK_SIZE
    counts, indices, documents = (
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((blocks,), (blocks, blocks), (length,))
    )
    rule = jax.eval_shape(lambda ids: causal() & same_document(ids), documents)
    return BlockMask(counts, indices, counts, indices, rule)


def test_lowers_for_cuda_at_full_size():
    """All but the last compiler, ptxas: layouts, shared memory, copies. Without a GPU JAX assumes compute 9.0."""
    inputs = [jax.ShapeDtypeStruct((65536, 6, 128), jnp.bfloat16)] * 4

    def run(q, k, v, d_output, mask):
        output, pull = jax.vjp(lambda q, k, v: hopper_attention(q, k, v, mask, scale=SCALE), q, k, v)
        return output, pull(d_output)

    text = jax.jit(run).trace(*inputs, mask_of(65536)).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("forward", "dq", "dkv"):
        assert f"block_sparse_attention_{kernel}" in text


def test_lowers_in_a_sharded_batch_with_rematerialisation():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def local_loss(q, k, v, tokens, window):
        def attend(one):
            q, k, v, tokens = one
            mask, _ = long_short_masks(tokens, window)
            return jax.checkpoint(lambda q, k, v: hopper_attention(q, k, v, mask, scale=SCALE))(q, k, v)

        return jax.lax.psum(jnp.sum(jax.lax.map(attend, (q, k, v, tokens)).astype(jnp.float32)), "data")

    def loss(*args):
        specs = (P("data"),) * 4 + (P(),)
        return jax.shard_map(local_loss, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(*args)

    q = jax.ShapeDtypeStruct((4, 2 * BLOCK_SIZE, 2, 64), jnp.bfloat16)
    tokens, window = jax.ShapeDtypeStruct((4, 2 * BLOCK_SIZE), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, q, q, tokens, window).lower(lowering_platforms=("cuda",))
    # The checkpoint runs the forward kernel again in the backward pass, whose first run then has no reader.
    assert "block_sparse_attention_dkv" in lowered.as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_width": 32}, "a head width of 64 or 128, got 32"),
        ({"dtype": jnp.float32}, "bfloat16 or float16 q, k and v, got float32"),
        ({"block_size": 64}, "a mask in blocks of 128, got blocks of 64"),
        ({"scale": -1.0}, r"scale > 0, got -1.0 \(negate q\)"),
    ],
)
def test_what_is_not_supported_is_said(change, message):
    case = SUPPORTED | change
    q = jax.ShapeDtypeStruct((256, 1, case["head_width"]), case["dtype"])
    blocks = 256 // case["block_size"]
    mask = jax.eval_shape(lambda: random_mask(np.random.default_rng(0), blocks, case["block_size"], 1.0)[0])

    def attend(q, mask):
        return block_sparse_attention(q, q, q, mask, scale=case["scale"], implementation="hopper")

    whole = f"^block_sparse_attention: implementation 'hopper' needs {message}; use 'xla' or 'auto'"
    with compiling_for_hopper(), pytest.raises(ValueError, match=whole):
        jax.eval_shape(attend, q, mask)


def test_auto_is_hopper_where_it_runs_and_fits():
    def automatic(device, **change):
        return choose("attention", "auto", lambda: unsupported(**SUPPORTED | change), device=device)

    assert automatic(H100) == automatic(H100, head_width=128) == "hopper"
    for change in ({"head_width": 96}, {"dtype": "float32"}, {"block_size": 64}, {"scale": 0.0}):
        assert automatic(H100, **change) == "xla"
    assert automatic(B200) == automatic(jax.devices("cpu")[0]) == "xla"
