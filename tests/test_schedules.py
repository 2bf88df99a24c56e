"""The schedules of a run against exact fractions, and against a search over all steps."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_speedrun.schedules import learning_rate_factor, momentum, step_of_window, window_blocks


@pytest.mark.parametrize("steps", [1385, 1393])
def test_learning_rate_factor(steps: int) -> None:
    traced = jax.jit(learning_rate_factor, static_argnums=1)
    for step in range(0, steps + 1, 7):
        t = 1 - Fraction(step, steps)
        w = min(t / Fraction(2, 5), Fraction(1))
        expected = float(w + (1 - w) / 10)
        assert float(learning_rate_factor(step, steps)) == pytest.approx(expected, rel=1e-5)
        assert float(traced(step, steps)) == pytest.approx(expected, rel=1e-5)
    assert float(learning_rate_factor(0, steps)) == 1
    assert float(learning_rate_factor(steps * 3 // 5, steps)) == pytest.approx(1, rel=1e-5)
    assert float(learning_rate_factor(steps, steps)) == pytest.approx(0.1, rel=1e-5)


def test_momentum() -> None:
    traced = jax.jit(lambda step: momentum(step, 300))
    for step, expected in [(0, 0.85), (3, 0.851), (150, 0.9), (300, 0.95), (1385, 0.95)]:
        assert float(momentum(step, 300)) == pytest.approx(expected, rel=1e-6)
        assert float(traced(step)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("steps", [1385, 1393])
def test_window_blocks_at_every_step(steps: int) -> None:
    every_step = jnp.arange(steps + 1)
    windows = jax.jit(window_blocks, static_argnums=(1, 2))(every_step, steps, 1728)
    assert windows.dtype == jnp.int32
    expected = [max(1, math.ceil(Fraction(1728 * step, steps) / 128)) for step in range(steps + 1)]
    np.testing.assert_array_equal(windows, expected)
    assert (expected[0], expected[-1]) == (1, 14)


def test_window_blocks_takes_python_and_traced_numbers_alike() -> None:
    traced = jax.jit(window_blocks)
    for step, steps in [(0, 1385), (1, 1385), (102, 1385), (103, 1385), (1385, 1385), (1_000_000, 1_000_000)]:
        plain = window_blocks(step, steps, 1728)
        assert plain.dtype == jnp.int32
        assert plain.shape == ()
        assert int(plain) == int(traced(step, steps, 1728)) == max(1, math.ceil(Fraction(27 * step, 2 * steps)))
    assert int(window_blocks(10, 10, final_window_tokens=512)) == 4


jitted_window = jax.jit(window_blocks)


@given(steps=st.integers(1, 1400), final_window_tokens=st.integers(1, 4000))
@settings(max_examples=60, deadline=None)
def test_step_of_window_is_the_first_with_it(steps: int, final_window_tokens: int) -> None:
    """Also where a window grows by several blocks a step, and skips some."""
    windows = np.asarray(jitted_window(jnp.arange(1401), steps, final_window_tokens))[: steps + 1].tolist()
    for window in range(-1, max(windows) + 3):
        if window in windows:
            assert step_of_window(window, steps, final_window_tokens) == windows.index(window)
        else:
            with pytest.raises(ValueError, match=f"a run of {steps} steps never has a window of {window} blocks"):
                step_of_window(window, steps, final_window_tokens)
