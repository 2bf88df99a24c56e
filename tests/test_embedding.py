"""Embedding lookup and its gradient against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.kernels.embedding import embed

V, D = 50, 4


def gradient(table, tokens, d_rows):
    return jax.jit(lambda table: jax.vjp(lambda t: embed(t, tokens), table)[1](d_rows)[0])(table)


@pytest.mark.parametrize("ids", ["random", "all one", "each once"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_against_numpy(ids, dtype):
    rng = np.random.default_rng(0)
    tokens = {"random": rng.integers(0, V, 500), "all one": np.full(500, 7), "each once": rng.permutation(V)}[ids]
    table = jnp.asarray(rng.standard_normal((V, D)), dtype)
    d_rows = jnp.asarray(rng.standard_normal((len(tokens), D)), dtype)
    np.testing.assert_array_equal(embed(table, jnp.asarray(tokens)), np.asarray(table)[tokens])
    want = np.zeros((V, D))
    np.add.at(want, tokens, np.asarray(d_rows, np.float64))
    got = gradient(table, jnp.asarray(tokens), d_rows)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=4e-3 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5
    )


def test_bfloat16_sums_do_not_stall():
    """4096 ones: a bfloat16 accumulator would stop at 256, where adding 1 rounds away."""
    tokens = jnp.zeros(4096, jnp.int32)
    got = gradient(jnp.zeros((V, D), jnp.bfloat16), tokens, jnp.ones((4096, D), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(got[0], np.float32), 4096)
