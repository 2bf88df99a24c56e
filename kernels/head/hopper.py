"""The head's loss and logit gradient on Hopper: two kernels with nothing but a few numbers per token between them."""

import jax
import jax.numpy as jnp
from jax import Array

from .hopper_gradient import logit_gradient
from .hopper_logits import CHANNELS, MAX_WIDTH, TOKENS, VOCAB_TILE, logits_and_totals
from .numerics import CAP, TEMPERATURE, W_SCALE, X_SCALE


def loss_and_logit_gradient(x_CD: Array, w_VD: Array, targets_C: Array) -> tuple[Array, Array, Array]:
    """Return each token's loss (C,) float32, and 2^13 times its gradient in z as e5m2, both (C, V) and (V, C).

    Args:
      x_CD, w_VD: e4m3, scaled by 2 and 32; C and V multiples of 128, D of 128 and at most 768.
      targets_C: int32 ids.
    """
    z_CV, totals = logits_and_totals(x_CD, w_VD, unscale=1 / (X_SCALE * W_SCALE))
    total_C = totals.sum(axis=0)
    target_z_C = jnp.take_along_axis(z_CV, targets_C[:, None], axis=1)[:, 0].astype(jnp.float32)
    loss_C = jnp.log(total_C) + CAP - CAP * jax.nn.sigmoid(target_z_C / TEMPERATURE)
    return loss_C, *logit_gradient(z_CV, jnp.log2(total_C), targets_C)


def unsupported(tokens: int, vocab_size: int, width: int) -> str | None:
    """Return what the kernels need of a shape, None where they have it."""
    for what, size, multiple in (("T", tokens, TOKENS), ("V", vocab_size, VOCAB_TILE), ("D", width, CHANNELS)):
        if size % multiple:
            return f"{what} a multiple of {multiple}, got {size}"
    return f"D at most {MAX_WIDTH}, got {width}" if width > MAX_WIDTH else None
