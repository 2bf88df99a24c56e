"""Norms applied after the matmul, against the textbook order in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.kernels.hopper.matmul import Config
from jax_speedrun.kernels.implementation import compiling_for_hopper, interpret_kernels
from jax_speedrun.kernels.layer.mlp import relu_squared
from jax_speedrun.kernels.layer.residual import add_linear, known_rstd, rstd
from jax_speedrun.kernels.layer.residual_hopper import matmul_add
from tests.marks import slow

T, D, F, EPSILON = 48, 32, 80, 2.0**-23
SIZES = [1.0, 1e12, 1e-14, 0.0]
BF16, F32 = 2.0**-8, 2.0**-24  # largest relative error of one rounding


def inputs(case):
    rng = np.random.default_rng(len(case))
    x, w, d_out = rng.standard_normal((T, D)), rng.standard_normal((F, D)) / np.sqrt(D), rng.standard_normal((T, F))
    factors = {"random": 1.0, "huge": 1e10, "tiny": 1e-6, "each token its own": 10.0 ** rng.integers(-5, 6, (T, 1))}
    x = x * factors.get(case, 1.0)
    if case == "zeros":
        x[::2] = 0
        w[::3] = 0
    return [np.asarray(a, np.float32) for a in (x, w, d_out)]


def norm_then_matmul(x, w):
    """The MLP's first half as the formula has it."""
    n = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPSILON)
    z = n @ w.T
    return n, z, np.maximum(z, 0) ** 2


def gradients(x, w, d_out):
    """Of the sum of d_out relu(norm(x) W^T)^2 in x and w, by the chain rule, float64."""
    n, z, _ = norm_then_matmul(x, w)
    d_z = 2 * d_out * np.maximum(z, 0)
    d_n = d_z @ w
    r = 1 / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPSILON)
    return r * (d_n - n * np.mean(d_n * n, axis=1, keepdims=True)), d_z.T @ n


def matmul_then_norm(x, w):
    return relu_squared(jnp.dot(x, w.T, precision="highest"), rstd(x, EPSILON))


def matmul_then_known_norm(x, w):
    """Of the inverse RMS only its value is told."""
    scale = known_rstd(x, jax.lax.stop_gradient(rstd(x, EPSILON)))
    return relu_squared(jnp.dot(x, w.T, precision="highest"), scale)


@pytest.mark.parametrize("case", ["random", "huge", "tiny", "each token its own", "zeros"])
@pytest.mark.parametrize("function", [matmul_then_norm, matmul_then_known_norm])
def test_norm_after_the_matmul_equals_norm_before_it(function, case):
    x, w, d_out = inputs(case)
    wide = [a.astype(np.float64) for a in (x, w, d_out)]
    out, pull = jax.vjp(jax.jit(function), x, w)
    n, _, want = norm_then_matmul(*wide[:2])
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
    r = rstd(z, EPSILON)
    assert r.dtype == jnp.float32
    np.testing.assert_allclose(r, 1 / np.sqrt(np.mean(np.asarray(z, np.float64) ** 2, axis=1) + EPSILON), rtol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "size"),
    [*(("xla", size) for size in SIZES), ("hopper", 1.0), *(slow("hopper", size) for size in SIZES[1:])],
)
def test_add_linear_equals_float64(implementation, size):
    tokens, width, channels = 384, 256, 128
    rng = np.random.default_rng(1)
    shapes = (tokens, width), (tokens, channels), (width, channels), (tokens, width)
    x, y, w, d_sum = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    x, w = x * jnp.bfloat16(size), (w * jnp.bfloat16(channels**-0.5)).astype(jnp.float32)

    def run(x, y, w):
        return add_linear(x, y, w, epsilon=EPSILON, implementation=implementation)

    with interpret_kernels():
        (total, scale), pull = jax.vjp(jax.jit(run), x, y, w)
        gradients = pull((d_sum, jnp.ones_like(scale)))  # the inverse RMS is a constant: what comes to it is lost
    assert [a.dtype for a in (total, scale, *gradients)] == [
        jnp.bfloat16,
        jnp.float32,
        *[jnp.bfloat16] * 2,
        jnp.float32,
    ]
    x, y, w, d_sum = (np.asarray(a, np.float64) for a in (x, y, w, d_sum))
    product = y @ w.T
    off = BF16 * np.abs(product) + 1.01 * BF16 * np.abs(x + product) + channels * F32 * (np.abs(y) @ np.abs(w).T)
    assert (np.abs(np.asarray(total, np.float64) - (x + product)) <= off).all()
    of_result = 1 / np.sqrt(np.mean(np.asarray(total, np.float64) ** 2, axis=1) + EPSILON)
    np.testing.assert_allclose(scale, of_result, rtol=BF16)  # of the sum before or after it was rounded
    np.testing.assert_array_equal(gradients[0], d_sum)
    for got, want, terms in (
        (gradients[1], d_sum @ w, np.abs(d_sum) @ np.abs(w)),
        (gradients[2], d_sum.T @ y, np.abs(d_sum).T @ np.abs(y)),
    ):
        error = np.abs(np.asarray(got, np.float64) - want)
        assert (error <= 1.01 * BF16 * np.abs(want) + tokens * F32 * terms).all()


EVERYTHING = (Config(), "weighted term", True)


@pytest.mark.parametrize(
    ("config", "term", "addend"),
    [
        EVERYTHING,
        *(
            slow(*case)
            for case in itertools.product(
                [Config(), Config(columns=128, stages=2), Config(columns=192, channels=32, stages=8)],
                [None, "term", "weighted term"],
                [False, True],
            )
            if case != EVERYTHING
        ),
    ],
)
def test_every_value_of_a_sum_lands_in_its_place(config, term, addend):
    """Tokens that pick one channel, factors that are powers of two, small integers: no rounding anywhere."""
    tokens, width, columns = 640, 192, 2 * config.columns
    rng = np.random.default_rng(len(term or ""))
    picks = rng.permutation(tokens) % width
    w = rng.integers(-4, 5, (columns, width)).astype(np.float32)
    factor, of_term, of_addend = (2.0 ** rng.integers(-1, 2, (3, tokens))).astype(np.float32)
    a, b = rng.integers(-4, 5, (2, tokens, columns)).astype(np.float32)
    one_hot = jnp.asarray(np.eye(width)[picks], jnp.bfloat16)
    with interpret_kernels():
        got, squares = matmul_add(
            one_hot,
            jnp.asarray(w, jnp.bfloat16),
            (jnp.asarray(of_term) if term == "weighted term" else None, jnp.asarray(a, jnp.bfloat16)) if term else None,
            jnp.asarray(factor),
            addend=(jnp.asarray(b, jnp.bfloat16), jnp.asarray(of_addend)) if addend else None,
            squares=True,
            config=config,
        )
    want = w[:, picks].T + (of_addend[:, None] * b if addend else 0)
    want = factor[:, None] * want + {None: 0, "term": a, "weighted term": of_term[:, None] * a}[term]
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)
    np.testing.assert_array_equal(np.asarray(squares).sum(axis=0), (want**2).sum(axis=1))


def test_a_ring_of_one_slot_is_refused():
    x = jnp.zeros((128, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="stages must be at least 2, got 1"):
        matmul_add(x, jnp.zeros((256, 64), jnp.bfloat16), config=Config(stages=1))


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({}, "float32", "bfloat16, got float32"),
        ({"tokens": 64}, "bfloat16", "T a multiple of 128, got 64"),
        ({"channels": 96}, "bfloat16", "channels into each matmul a multiple of 64, got 96"),
        ({"width": 128}, "bfloat16", "channels out of each matmul a multiple of 256, got 128"),
    ],
)
def test_what_hopper_does_not_take_is_said(change, dtype, message):
    sizes = {"tokens": 128, "width": 256, "channels": 64} | change
    x, y = (jnp.zeros((sizes["tokens"], sizes[name]), dtype) for name in ("width", "channels"))
    weight = jnp.zeros((sizes["width"], sizes["channels"]))
    with (
        compiling_for_hopper(),
        pytest.raises(ValueError, match=f"add_linear: implementation 'hopper' needs {message}; use 'xla' or 'auto'$"),
    ):
        add_linear(x, y, weight, epsilon=EPSILON, implementation="hopper")


def test_arrays_of_a_sum_that_do_not_fit_together():
    x, y, w = (jnp.zeros(shape, jnp.bfloat16) for shape in ((128, 256), (128, 64), (256, 64)))
    for arguments in ((x, y, w.T), (x[None], y, w), (y, x, w)):
        with pytest.raises(ValueError, match=r"add_linear needs x \(T, D\), y \(T, C\) and a weight \(D, C\), got"):
            add_linear(*arguments, epsilon=EPSILON)


def test_float64_and_numpy():
    rng = np.random.default_rng(5)
    x, y, w = (rng.standard_normal(shape) for shape in ((6, 8), (6, 5), (8, 5)))
    with jax.enable_x64(True):
        total, scale = add_linear(x, y, w, epsilon=np.float32(EPSILON))
        assert total.dtype == scale.dtype == jnp.float64
    want = x + y @ w.T
    np.testing.assert_allclose(total, want, rtol=1e-14)
    np.testing.assert_allclose(scale, 1 / np.sqrt((want**2).mean(1) + EPSILON), rtol=1e-14)


def test_a_traced_epsilon_is_refused_alike():
    x, y, w = (jnp.zeros(shape, jnp.bfloat16) for shape in ((128, 256), (128, 64), (256, 64)))
    for name in ("xla", "hopper"):
        run = functools.partial(add_linear, x, y, w, implementation=name)
        with (
            compiling_for_hopper(),
            pytest.raises(ValueError, match=r"^add_linear: epsilon must be a number that is known"),
        ):
            jax.jit(lambda epsilon, run=run: run(epsilon=epsilon))(1e-6)
