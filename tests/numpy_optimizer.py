"""Muon and Adam in float64 NumPy, one matrix at a time, and what the optimiser tests share."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

Float = NDArray[np.float64]


def polynomial(s: Float, steps: int) -> Float:
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def numpy_newton_schulz(g: Float, steps: int = 5) -> Float:
    """One matrix, by the definition: through the SVD, never through the iteration."""
    u, s, vt = np.linalg.svd(g / (np.linalg.norm(g) + 1e-7), full_matrices=False)
    return u @ np.diag(polynomial(s, steps)) @ vt


def numpy_muon(
    gradients: list[Float], learning_rate: Callable[[int], float], momentum: Callable[[int], float], nesterov: bool
) -> list[Float]:
    """The updates of one (rows, columns) matrix for a sequence of gradients."""
    buffer = np.zeros_like(gradients[0])
    rows, columns = buffer.shape
    updates = []
    for step, g in enumerate(gradients):
        m = momentum(step)
        buffer = buffer + (1 - m) * (g - buffer)
        direction = g + m * (buffer - g) if nesterov else buffer
        scale = learning_rate(step) * math.sqrt(max(1, rows / columns))
        updates.append(-scale * numpy_newton_schulz(direction))
    return updates


def numpy_adam(gradients: list[Float], learning_rate: float, b1: float, b2: float, eps: float) -> list[Float]:
    first, second = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
    updates = []
    for step, g in enumerate(gradients, start=1):
        first = b1 * first + (1 - b1) * g
        second = b2 * second + (1 - b2) * g**2
        corrected = np.sqrt(second / (1 - b2**step)) + eps
        updates.append(-learning_rate * first / (1 - b1**step) / corrected)
    return updates


def normal(seed: int, *shape: int) -> Float:
    return np.random.default_rng(seed).standard_normal(shape)


def relative_error(actual: Any, expected: Float) -> float:
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


def run(transform: optax.GradientTransformation, params: Any, gradients: list[Any]) -> list[Any]:
    update = jax.jit(transform.update)
    state = transform.init(params)
    updates = []
    for g in gradients:
        u, state = update(g, state, params)
        updates.append(u)
    return updates


def to_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
