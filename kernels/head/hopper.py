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
      targets_C: int32 ids; of a token with a negative one, loss and gradient are 0.
    """
    z_CV, totals = logits_and_totals(x_CD, w_VD, unscale=1 / (X_SCALE * W_SCALE))
    total_C, counts_C = totals.sum(axis=0), targets_C >= 0
    target_z_C = jnp.take_along_axis(z_CV, jnp.where(counts_C, targets_C, 0)[:, None], axis=1)[:, 0]
    loss_C = jnp.log(total_C) + CAP - CAP * jax.nn.sigmoid(target_z_C.astype(jnp.float32) / TEMPERATURE)
    # With an infinite total a token has no weights.
    log2_total_C = jnp.where(counts_C, jnp.log2(total_C), jnp.inf)
    return jnp.where(counts_C, loss_C, 0), *logit_gradient(z_CV, log2_total_C, targets_C)


def unsupported(tokens: int, vocab_size: int, width: int) -> str | None:
    """Return what the kernels need of a shape, None where they have it."""
    for what, size, multiple in (("T", tokens, TOKENS), ("V", vocab_size, VOCAB_TILE), ("D", width, CHANNELS)):
        if size % multiple or not size:
            return f"{what} a multiple of {multiple}, got {size}"
    return f"D at most {MAX_WIDTH}, got {width}" if width > MAX_WIDTH else None
