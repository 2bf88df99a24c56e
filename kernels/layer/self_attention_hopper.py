"""The matmul that norms and rotates its heads in registers, on Hopper: hopper/matmul.py multiplies.

A warpgroup's tile of 256 columns is two heads, and a thread holds both channels of a pair, in two parts of 64: the sum
of a head's squares is all that threads tell each other.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..hopper.config import WARPGROUP_ROWS
from ..hopper.matmul import CONFIG, PART, ROWS, Config, Epilogue, Values, matmul
from ..hopper.primitives import rows
from ..hopper.rotary import HEAD_WIDTH, ROTATED, rotate


def unsupported(tokens: int, width: int, channels: int, head_width: int, rotated: int) -> str | None:
    """Return what the kernels need of a shape, None where they have it."""
    for what, size, multiple in (("T", tokens, ROWS), ("D", width, CONFIG.columns), ("C", channels, CONFIG.columns)):
        if size % multiple or not size:
            return f"{what} a multiple of {multiple}, got {size}"
    for what, size, only in (("K", head_width, HEAD_WIDTH), ("R", rotated, ROTATED)):
        if size != only:
            return f"{what} = {only}, got {size}"
    return None


@functools.partial(jax.jit, static_argnames=("epsilon", "config"))  # lowered once, not once a layer
def matmul_norm_rotary(
    x_TD: Array, w_CD: Array, rstd_T: Array, cos_TR: Array, sin_TR: Array,
    *, epsilon: float, config: Config = CONFIG,
) -> tuple[Array, Array]:  # fmt: skip
    """Return rotate(norm(y)) of the heads of y = r x W^T, (T, C) bf16, and r / rms(y), (H, T) float32.

    Args:
      x_TD, w_CD: bf16; shapes as `unsupported` says.
      rstd_T: r, float32.
      cos_TR, sin_TR: float32, R = K / 4.
      epsilon: added to the mean square of y.
    """

    def finish(z: Values, scale: Values, angles: Values, _: Values) -> tuple[Values, Values]:
        (r,), (cos, sin) = scale, angles
        squares = (z[0] * z[0] + z[1] * z[1]).sum(axis=1)
        factor = r * lax.rsqrt(r * r * squares * (1 / HEAD_WIDTH) + epsilon)
        n = [part * rows(factor, (WARPGROUP_ROWS, PART)) for part in z]
        turned = rotate([part[:, :ROTATED] for part in n], cos, sin)
        return [jnp.concatenate([t, part[:, ROTATED:]], axis=1) for t, part in zip(turned, n, strict=True)], [factor]

    epilogue = Epilogue(finish, rows=[rstd_T], narrow=[cos_TR, sin_TR], unit=HEAD_WIDTH // PART, row_results=1)
    heads_TC, factor_HT = matmul("matmul_norm_rotary", x_TD, w_CD, epilogue, config=config)
    return heads_TC, factor_HT
