"""The head's loss and gradients against float64 NumPy, in every precision."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_speedrun.kernels.head_loss import fp8_supported, head_logits, head_loss

T, D, V = 384, 16, 640


def inputs(seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((T, D))
    x /= np.sqrt((x * x).mean(1, keepdims=True))
    return x.astype(np.float32), (scale * rng.standard_normal((V, D))).astype(np.float32), rng.integers(0, V, T)


def numpy_loss(x, w, targets, *, x_round=lambda a: a, w_round=lambda a: a, z_round=lambda a: a, g_round=lambda a: a):
    """Loss, dx and dw in float64, with the given roundings applied to the operands of the three matmuls."""
    x, w = x_round(x.astype(np.float64)), w_round(w.astype(np.float64))
    z = z_round(x @ w.T)
    gate = 1 / (1 + np.exp(-z / 7.5))
    logits = 30 * gate
    top = logits.max(1, keepdims=True)
    log_total = top + np.log(np.exp(logits - top).sum(1, keepdims=True))
    rows = np.arange(T)
    gradient = np.exp(logits - log_total)
    gradient[rows, targets] -= 1
    gradient = g_round(gradient * 4 * gate * (1 - gate))
    return np.mean(log_total[:, 0] - logits[rows, targets]), gradient @ w / T, gradient.T @ x / T


def rounder(dtype, scale=1.0):
    return lambda a: (a * scale).astype(np.float32).astype(dtype).astype(np.float64) / scale


def run(x, w, targets, precision):
    loss, (dx, dw) = jax.jit(jax.value_and_grad(head_loss, argnums=(0, 1)), static_argnums=3)(
        jnp.asarray(x), jnp.asarray(w), jnp.asarray(targets, jnp.int32), precision
    )
    return np.asarray(loss), np.asarray(dx), np.asarray(dw)


def relative(got, want):
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


@pytest.mark.parametrize("seed", range(5))
def test_float32(seed):
    arguments = inputs(seed, scale=[0.0, 0.1, 0.3, 2.0, 20.0][seed])  # 20: most logits at the cap
    for got, want in zip(run(*arguments, "float32"), numpy_loss(*arguments), strict=True):
        assert relative(got, want) < 2e-5


@pytest.mark.parametrize("seed", range(3))
def test_fp8_rounds_as_the_recipe_says(seed):
    """x 2 and w 32 to e4m3, the gradient 2^13 a token to e5m2, z in bfloat16 between: the same values in NumPy."""
    x, w, targets = inputs(seed)
    want = numpy_loss(
        x,
        w,
        targets,
        x_round=lambda a: rounder(ml_dtypes.float8_e4m3fn, 2)(rounder(ml_dtypes.bfloat16)(a)),
        w_round=lambda a: rounder(ml_dtypes.float8_e4m3fn, 32)(rounder(ml_dtypes.bfloat16)(a)),
        z_round=rounder(ml_dtypes.bfloat16),
        g_round=lambda a: rounder(ml_dtypes.float8_e5m2, 2**13)(rounder(ml_dtypes.bfloat16)(a)),
    )
    exact = numpy_loss(x, w, targets)
    # A value that float32 puts on the other side of a rounding border moves by one step of 2^-3: few do.
    for got, expected, unrounded in zip(run(x, w, targets, "fp8_emulated"), want, exact, strict=True):
        assert relative(got, expected) < 5e-3
        assert relative(got, expected) < 0.2 * relative(got, unrounded)


def test_emulation_equals_fp8_operands():
    """XLA multiplies FP8 operands on the CPU as well; the emulation gives the same."""
    arguments = inputs(3)
    for native, emulated in zip(run(*arguments, "fp8"), run(*arguments, "fp8_emulated"), strict=True):
        np.testing.assert_allclose(native, emulated, rtol=2e-2, atol=2e-5)


def test_bfloat16_is_within_its_rounding():
    arguments = inputs(4)
    for got, want in zip(run(*arguments, "bfloat16"), numpy_loss(*arguments), strict=True):
        assert relative(got, want) < 1e-2


def test_loss_alone_equals_loss_with_gradient():
    x, w, targets = (jnp.asarray(a) for a in inputs(5))
    np.testing.assert_allclose(head_loss(x, w, targets, "float32"), run(x, w, targets, "float32")[0], rtol=1e-6)


def test_cotangent_scales_the_gradient():
    x, w, targets = (jnp.asarray(a) for a in inputs(6))
    once = jax.grad(lambda w: head_loss(x, w, targets, "float32"))(w)
    thrice = jax.grad(lambda w: 3 * head_loss(x, w, targets, "float32"))(w)
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def test_a_zero_head_is_uniform():
    x, w, targets = inputs(7)
    np.testing.assert_allclose(run(x, 0 * w, targets, "float32")[0], np.log(V), rtol=1e-6)


def test_logits():
    x, w, _ = inputs(8)
    want = 30 / (1 + np.exp(-(x @ w.T) / 7.5))
    np.testing.assert_allclose(head_logits(jnp.asarray(x), jnp.asarray(w), "float32"), want, rtol=1e-5)


def test_full_logits_never_exist():
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((4096, D), "float32"), ((V, D), "float32"), ((4096,), "int32"))]
    gradient = jax.jit(jax.grad(lambda x, w, t: head_loss(x, w, t, "float32"), argnums=(0, 1)))
    assert f"4096x{V}" not in gradient.lower(*shapes).as_text()


def test_a_cpu_has_no_fp8_units():
    assert not fp8_supported(jax.devices("cpu")[0])
