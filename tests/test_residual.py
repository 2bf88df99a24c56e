"""Norms applied after the product, against the textbook order in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.kernels.mlp import relu_squared
from jax_speedrun.kernels.residual import inverse_rms
from tests.scripts import load_script

T, D, F, EPSILON = 48, 32, 80, 2.0**-23


def inputs(case):
    rng = np.random.default_rng(len(case))
    x, w, d_out = rng.standard_normal((T, D)), rng.standard_normal((F, D)) / np.sqrt(D), rng.standard_normal((T, F))
    factors = {"random": 1.0, "huge": 1e10, "tiny": 1e-6, "each token its own": 10.0 ** rng.integers(-5, 6, (T, 1))}
    x = x * factors.get(case, 1.0)
    if case == "zeros":
        x[::2] = 0
        w[::3] = 0
    return [np.asarray(a, np.float32) for a in (x, w, d_out)]


def norm_then_product(x, w):
    """The MLP's first half as the formula has it."""
    n = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPSILON)
    z = n @ w.T
    return n, z, np.maximum(z, 0) ** 2


def gradients(x, w, d_out):
    """Of the sum of d_out relu(norm(x) W^T)^2 in x and w, by the chain rule, float64."""
    n, z, _ = norm_then_product(x, w)
    d_z = 2 * d_out * np.maximum(z, 0)
    d_n = d_z @ w
    r = 1 / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPSILON)
    return r * (d_n - n * np.mean(d_n * n, axis=1, keepdims=True)), d_z.T @ n


@jax.jit
def product_then_norm(x, w):
    return relu_squared(jnp.dot(x, w.T, precision="highest"), inverse_rms(x, EPSILON))


@pytest.mark.parametrize("case", ["random", "huge", "tiny", "each token its own", "zeros"])
def test_norm_after_the_product_equals_norm_before_it(case):
    x, w, d_out = inputs(case)
    wide = [a.astype(np.float64) for a in (x, w, d_out)]
    out, pull = jax.vjp(product_then_norm, x, w)
    n, _, want = norm_then_product(*wide[:2])
    size = (np.abs(n) @ np.abs(wide[1]).T) ** 2  # of the terms that may cancel
    assert (np.abs(out - want) <= 1e-5 * size).all()
    for got, expected, axis in zip(pull(d_out), gradients(*wide), (1, None), strict=True):
        # Token by token in x: their gradients are as different in size as 1 / x.
        error = np.linalg.norm(got - expected, axis=axis)
        assert (error <= 1e-5 * np.linalg.norm(expected, axis=axis) + 1e-30).all()


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.standard_normal((T, F)), jnp.bfloat16)
    scale = rng.random(T).astype(np.float32)
    got = relu_squared(z, jnp.asarray(scale))
    assert got.dtype == jnp.bfloat16
    want = np.maximum(np.asarray(z, np.float64) * scale[:, None], 0) ** 2
    assert (np.abs(np.asarray(got, np.float64) - want) <= 1.001 * 2.0**-8 * want).all()
    r = inverse_rms(z, EPSILON)
    assert r.dtype == jnp.float32
    np.testing.assert_allclose(r, 1 / np.sqrt(np.mean(np.asarray(z, np.float64) ** 2, axis=1) + EPSILON), rtol=1e-6)


def test_bench_runs_small_without_a_gpu(tmp_path, capsys):
    bench = load_script("bench_elementwise")
    sizes = ["--width", "64", "--head-width", "64", "--out", str(tmp_path)]
    assert bench.main(["--tokens", "32", *sizes]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "elementwise.json").read_text())["rows"]}
    assert 0 < rows["heads: fast"]["error_of_bound"] <= 1
    # qkv and heads in bfloat16; scale, lambdas, cos and sin in float32.
    assert rows["heads: fast"]["megabytes"] == pytest.approx((32 * (6 * 64 * 2 + 4 + 2 * 32 * 4) + 8) / 1e6)
    assert bench.main(["--tokens", "33", *sizes]) == 2
    assert "T a multiple of 32, got 33" in capsys.readouterr().err
