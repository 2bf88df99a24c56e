"""The residual stream's part of a norm: one number a token, applied after the matrix product instead of before it.

An RMS norm without weights only scales each token, so it commutes with the product that follows:

    norm(x) W^T = r (x W^T)        r = 1 / rms(x)

Then the normalised x need not exist. Written first, it costs a pass of its own, because a row must be read to its
end before its first channel can be scaled; r comes out of the pass that writes x, and is applied in the one that reads
x W^T anyway. The same holds backward: the gradient of r is a sum over what that pass has at hand, and what comes back
to x is a constant a token times x, which joins the sum of gradients in the pass that forms it.

All of it is plain JAX, which XLA fuses to exactly these passes on a GPU. The price: a norm's gradient has no part along
x, and here that part is the difference of two that were rounded apart, so in bfloat16 it vanishes only to rounding.
"""

import jax.numpy as jnp
from jax import Array, lax


def inverse_rms(x_TD: Array, epsilon: float) -> Array:
    """1 / sqrt(mean of a token's squares + `epsilon`), (T,) float32."""
    wide_TD = x_TD.astype(jnp.float32)
    return lax.rsqrt(jnp.mean(wide_TD * wide_TD, axis=-1) + epsilon)
