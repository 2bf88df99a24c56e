"""What moves over a run: learning rates, Muon's momentum, the attention window. Each a function of the step alone.

Source: the "Sub-3 minute" NanoGPT speedrun record of 16 January 2025.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .kernels.block_mask import BLOCK_SIZE


def learning_rate_factor(
    step: ArrayLike, steps: ArrayLike, cooldown_fraction: float = 0.4, final: float = 0.1
) -> Array:
    """Return the factor of every learning rate: 1, then linearly down to `final` over the last `cooldown_fraction`."""
    remaining = 1 - jnp.asarray(step) / steps
    weight = jnp.clip(remaining / cooldown_fraction, 0, 1)
    return weight + (1 - weight) * final


def momentum(step: ArrayLike, warmup_steps: int) -> Array:
    """Return Muon's momentum: linearly from 0.85 to 0.95 over `warmup_steps`, then constant."""
    fraction = jnp.minimum(jnp.asarray(step) / warmup_steps, 1)
    return 0.85 * (1 - fraction) + 0.95 * fraction


def window_blocks(step: ArrayLike, steps: ArrayLike, final_window_tokens: int) -> Array:
    """Return the long attention window at `step`, in blocks of 128 tokens: an int32 scalar, at least 1.

    The window is the next multiple of 128 at or above `final_window_tokens * step / steps`.
    Integer arithmetic, so exact, as long as `final_window_tokens * step` stays below 2^31.
    """
    step, steps = jnp.asarray(step, jnp.int32), jnp.asarray(steps, jnp.int32)
    blocks = -(-(final_window_tokens * step) // (BLOCK_SIZE * steps))
    return jnp.maximum(blocks, 1)


def step_of_window(window: int, steps: int, final_window_tokens: int) -> int:
    """Return the first step of a run at which the long window has `window` blocks: what `window_blocks` inverts.

    On the host alone, for tools that measure at a given window.

    Raises:
      ValueError: the window never grows to it.
    """
    # More than window - 1 blocks: final_window_tokens * step > (window - 1) * 128 * steps.
    step = (window - 1) * BLOCK_SIZE * steps // final_window_tokens + 1 if window > 1 else 0
    blocks = max(-(-(final_window_tokens * step) // (BLOCK_SIZE * steps)), 1)
    if window < 1 or step > steps or blocks != window:
        raise ValueError(f"a run of {steps} steps never has a window of {window} blocks")
    return step
