"""Embedding lookup and its gradients, plain and from sorted tokens, against float64 NumPy.

The Hopper kernel runs in Pallas' interpreter, and is lowered for CUDA at full size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_speedrun.kernels.embedding.hopper import NOTHING, TOKENS, hopper_gradient, make_plan
from jax_speedrun.kernels.embedding.op import embed, plain_gradient, sort_tokens, unsupported
from jax_speedrun.kernels.implementation import choose, compiling_for_hopper, interpret_kernels
from tests.devices import B200, H100
from tests.marks import slow

T = 512  # eight programs of 64
V = 600
FULL_V, FULL_T, FULL_D = 50257, 65536, 768


@functools.partial(jax.jit, static_argnames=("name", "vocab_size", "dtype"))
def jitted_gradient(name, d_rows, tokens, dtype, vocab_size=V):
    if name == "xla":
        return plain_gradient(d_rows, tokens, vocab_size, dtype)
    return hopper_gradient(d_rows, sort_tokens(tokens, vocab_size), dtype)


def gradient(*arguments):
    with interpret_kernels():
        return jitted_gradient(*arguments)


IDS = {
    "Zipf": lambda rng, t, v: (rng.zipf(1.2, t) - 1) % v,
    "the first only": lambda rng, t, v: np.zeros(t, int),
    "each once": lambda rng, t, v: rng.permutation(v)[:t],
    "first and last": lambda rng, t, v: rng.choice([0, v - 1], t),
    "one over each border": lambda rng, t, v: np.repeat(np.arange(t // 64 + 1), [63, *[64] * (t // 64 - 1), 1]),
    "whole programs": lambda rng, t, v: np.repeat([5, 6, 9, 9], t // 4),
    "random": lambda rng, t, v: rng.integers(0, v, t),
    "the last only": lambda rng, t, v: np.full(t, v - 1),
    "ascending": lambda rng, t, v: np.arange(t),
    "descending": lambda rng, t, v: v - 1 - np.arange(t),
}


def assert_sums(got, d_rows, tokens, vocab_size=V):
    """n float32 additions are off by n 2^-24 of the sum of magnitudes at most, then one rounding to the dtype."""
    rows, tokens = np.asarray(d_rows, np.float64), np.asarray(tokens)
    want, magnitude = np.zeros((2, vocab_size, rows.shape[1]))
    np.add.at(want, tokens, rows)
    np.add.at(magnitude, tokens, np.abs(rows))
    counts = np.bincount(tokens, minlength=vocab_size)[:, None]
    last_rounding = 2.0**-8 if got.dtype == jnp.bfloat16 else 2.0**-24
    bound = counts * 2.0**-24 * magnitude * (1 + last_rounding) + last_rounding * np.abs(want)
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= bound)


def rows(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def check(name, ids, dtype, length, vocab_size, width=128):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(IDS[ids](rng, length, vocab_size), jnp.int32)
    d_rows = rows(rng, (length, width), dtype)
    got = gradient(name, d_rows, tokens, dtype, vocab_size)
    assert got.dtype == dtype
    assert_sums(got, d_rows, tokens, vocab_size)
    return got, lambda: gradient(name, d_rows, tokens, dtype, vocab_size)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_sums_of_every_kind_of_ids(dtype):
    for ids in IDS:
        check("xla", ids, dtype, T, V)


# The interpreter takes a second or two a run.
@pytest.mark.parametrize("ids", ["one over each border", *(slow(ids) for ids in IDS if ids != "one over each border")])
def test_kernel_sums_of_every_kind_of_ids(ids):
    check("hopper", ids, jnp.bfloat16, 256, 300)


@pytest.mark.slow
def test_kernel_sums_float32():
    check("hopper", "Zipf", jnp.float32, 128, 150)


@pytest.mark.slow
def test_kernel_repeats_to_the_bit():
    got, again = check("hopper", "first and last", jnp.bfloat16, 128, 150)
    np.testing.assert_array_equal(got, again())


@pytest.mark.slow
def test_kernel_at_the_width_of_the_record():
    check("hopper", "Zipf", jnp.bfloat16, 128, 150, 768)


def replayed(d_rows, order, plan):
    """What the kernels do, in NumPy; asserts that no row is written twice and that all are written."""
    target, later, place = map(np.asarray, plan)
    programs = len(later)
    table, parts = np.full((V + programs, d_rows.shape[1]), np.nan), np.full((2, programs, d_rows.shape[1]), np.nan)
    table[:V][np.asarray(order.first_V) == T] = 0
    total = 0.0
    for token, row in enumerate(np.asarray(d_rows, np.float64)[order.permutation_T]):
        total = total + row
        if target[token] != NOTHING:
            written = table[target[token]] if target[token] < V else parts[target[token] - V, token // TOKENS]
            assert np.isnan(written).all()
            written[:], total = total, 0.0
        assert (token + 1) % TOKENS or not np.any(total), "left over at a program's end"
    for program in np.flatnonzero(later):
        assert np.isnan(table[place[program]]).all()
        table[place[program]] = parts[1, program] + parts[0, program + 1 : program + 1 + later[program]].sum(axis=0)
    return table[:V]


@settings(max_examples=100, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, V - 1), st.integers(1, 300)), min_size=1, max_size=40), seed=st.integers(0)
)
def test_random_runs(runs, seed):
    """Ids with counts of all sizes, shuffled: every way in which ids can lie over the borders."""
    rng = np.random.default_rng(seed)
    tokens = np.resize(np.concatenate([np.full(count, token) for token, count in runs]), T)
    tokens = jnp.asarray(rng.permutation(tokens), jnp.int32)
    d_rows = rows(rng, (T, 2), jnp.bfloat16)
    order, plan = ordered_and_planned(tokens)
    assert_sums(replayed(d_rows, order, plan), d_rows, tokens)


@jax.jit
def ordered_and_planned(tokens):
    order = sort_tokens(tokens, V)
    return order, make_plan(order)


@pytest.mark.parametrize("name", ["xla", "hopper"])
def test_bfloat16_sums_do_not_stall(name):
    """384 ones: a bfloat16 accumulator would stop at 256, where adding 1 rounds away."""
    got = gradient(name, jnp.ones((384, 128), jnp.bfloat16), jnp.full(384, 3), jnp.bfloat16, 4)
    np.testing.assert_array_equal(np.asarray(got[3], np.float32), 384)


@settings(deadline=None)
@given(seed=st.integers(0), high=st.integers(1, V))
def test_order_is_the_stable_sort(seed, high):
    tokens = np.random.default_rng(seed).integers(0, high, T)
    order = sort_tokens(jnp.asarray(tokens), V)
    permutation = np.argsort(tokens, stable=True)
    np.testing.assert_array_equal(order.permutation_T, permutation)
    np.testing.assert_array_equal(order.sorted_T, tokens[permutation])
    first = np.searchsorted(tokens[permutation], np.arange(V))
    np.testing.assert_array_equal(order.first_V, np.where(np.isin(np.arange(V), tokens), first, T))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("sort", [False, True])
def test_embed_looks_up_and_differentiates(sort, dtype):
    length, vocab_size, width = (128, 150, 128) if sort else (T, V, 64)
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(0, vocab_size, length), jnp.int32)
    table, d_rows = rows(rng, (vocab_size, width), dtype), rows(rng, (length, width), dtype)

    @jax.jit
    def run(table, tokens, d_rows):
        order = sort_tokens(tokens, vocab_size) if sort else None
        output, pull = jax.vjp(lambda t: embed(t, tokens, order, "hopper" if sort else "xla"), table)
        return output, pull(d_rows)[0]

    with interpret_kernels():
        output, d_table = run(table, tokens, d_rows)
    np.testing.assert_array_equal(output, np.asarray(table)[tokens])
    assert d_table.dtype == dtype
    assert_sums(d_table, d_rows, tokens, vocab_size)


def lowered_for_cuda(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_hopper_lowers_for_cuda_at_full_size(dtype):
    """All but the last compiler, ptxas, and for all tables once."""

    def run(tokens, *d_rows):
        order = sort_tokens(tokens, FULL_V)
        return [hopper_gradient(d, order, dtype) for d in d_rows]

    text = lowered_for_cuda(run, ((FULL_T,), jnp.int32), *[((FULL_T, FULL_D), dtype)] * 4)
    for kernel in ("embedding_gradient_rows", "embedding_gradient_parts"):
        assert text.count(f"func.func private @_sum_{kernel.rsplit('_', 1)[1]}") == 1
        assert kernel in text
    assert text.count("stablehlo.sort") == 1


def test_hopper_lowers_in_scan_vmap_and_shard_map():
    def one(args):
        return hopper_gradient(args[1], sort_tokens(args[0], V), jnp.bfloat16)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    for many in (functools.partial(jax.lax.map, one), jax.vmap(one)):
        sharded = jax.shard_map(many, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        text = lowered_for_cuda(lambda *args, f=sharded: f(args), ((4, T), jnp.int32), ((4, T, FULL_D), jnp.bfloat16))
        assert "embedding_gradient_rows" in text


@pytest.mark.parametrize(
    ("shape", "message"), [((100, 128), "T a multiple of 64, got 100"), ((T, 64), "D a multiple of 128, got 64")]
)
def test_what_hopper_does_not_take_is_said(shape, message):
    tokens, table = jnp.zeros(shape[0], jnp.int32), jnp.zeros((V, shape[1]))
    whole = f"^embed: implementation 'hopper' needs {message}; use 'xla' or 'auto'$"
    with compiling_for_hopper(), pytest.raises(ValueError, match=whole):
        embed(table, tokens, implementation="hopper")


def test_auto_is_hopper_where_it_runs_and_fits():
    def automatic(device, *sizes):
        return choose("embed", "auto", lambda: unsupported(*sizes), device=device)

    assert automatic(H100, T, 768) == "hopper"
    assert automatic(H100, T + 1, 768) == automatic(H100, T, 96) == "xla"
    assert automatic(B200, T, 768) == "xla"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_numpy_tokens_of_any_integers(dtype):
    rng = np.random.default_rng(4)
    table, tokens = rng.standard_normal((V, 8)).astype(np.float32), rng.integers(0, 200, 20).astype(dtype)
    np.testing.assert_array_equal(embed(table, tokens), table[tokens])
    gradient = jax.grad(lambda table: embed(table, tokens).sum())(table)
    np.testing.assert_array_equal(gradient[:, 0], np.bincount(tokens, minlength=V))


def test_ids_outside_are_not_taken_for_others():
    table, tokens = np.ones((V, 8), np.float32), np.array([0, -1, V, V - 1, 2**32 + 1, -(2**40)])
    output, pull = jax.vjp(lambda table: embed(table, tokens), table)
    inside = [0, 3]
    assert np.isnan(np.delete(output, inside, axis=0)).all()
    np.testing.assert_array_equal(output[jnp.array(inside)], 1)
    (d_table,) = pull(jnp.ones_like(output))
    np.testing.assert_array_equal(np.flatnonzero(d_table[:, 0]), [0, V - 1])


def test_float64_is_summed_in_float64():
    with jax.enable_x64(True):
        table, rows = jnp.zeros((3, 2), jnp.float64), jnp.full((40, 2), 0.1, jnp.float64)
        (got,) = jax.vjp(lambda table: embed(table, jnp.zeros(40, jnp.int32)), table)[1](rows)
        np.testing.assert_allclose(got[0], 4, rtol=1e-14)


@pytest.mark.parametrize(
    ("table", "tokens", "message"),
    [
        (np.ones((5, 3)), np.zeros((2, 3), int), r"embed: tokens must be integers of shape \(T,\), got int64 \(2, 3\)"),
        (np.ones((5, 3)), np.zeros(3), "embed: tokens must be integers"),
        (np.ones(5), np.zeros(3, int), r"embed: the table must be floats of shape \(V, D\)"),
        (np.ones((5, 3), int), np.zeros(3, int), "embed: the table must be floats"),
    ],
)
def test_arguments_that_do_not_fit(table, tokens, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        embed(table, tokens)


def test_no_tokens():
    assert embed(np.ones((5, 3), np.float32), np.zeros(0, int)).shape == (0, 3)
    with pytest.raises(ValueError, match="sort_tokens: tokens must be at least one"):
        sort_tokens(jnp.zeros(0, jnp.int32), 5)
    with compiling_for_hopper(), pytest.raises(ValueError, match="T a multiple of 64, got 0"):
        embed(np.ones((5, 128), np.float32), np.zeros(0, int), implementation="hopper")
