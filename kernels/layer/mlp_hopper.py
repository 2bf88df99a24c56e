"""The MLP's two matmuls that meet relu squared, on Hopper, each with its pointwise part done in registers.

    forward      r2 = relu(s x W^T)^2           x (T, D), W (F, D), s (T): a factor of each row
    backward     dz = (dy P^T) 2 s sqrt(r2)     dy (T, D), P (F, D)

hopper/matmul.py multiplies. Backward, the slope 2 s sqrt(r2) is what is made while the tensor cores are busy.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from ..hopper.config import WARPGROUP_ROWS
from ..hopper.matmul import CONFIG, PART, Config, Epilogue, Values, matmul, row_sums
from ..hopper.primitives import rows

SHAPE = (WARPGROUP_ROWS, PART)


@functools.partial(jax.jit, static_argnames="config")  # lowered once, not once a layer
def matmul_relu_squared(x_TD: Array, w_FD: Array, rstd_T: Array, *, config: Config = CONFIG) -> Array:
    """Return relu(s x W^T)^2, (T, F) bf16, computed in float32 and rounded once; shapes as `hopper.matmul` says."""

    def finish(z: Values, scale: Values, *_: Values) -> tuple[Values, Values]:
        r = jnp.maximum(z[0], 0) * rows(scale[0], SHAPE)
        return [r * r], []

    epilogue = Epilogue(finish, rows=[rstd_T])
    return matmul("matmul_relu_squared", x_TD, w_FD, epilogue, config=config)[0]


@functools.partial(jax.jit, static_argnames="config")
def matmul_slope(
    dy_TD: Array, proj_FD: Array, rstd_T: Array, r2_TF: Array, *, config: Config = CONFIG
) -> tuple[Array, Array]:
    """Return (dy P^T) 2 s sqrt(r2), (T, F) bf16: the gradient of z, given that of relu(s z)^2; 0 where r2 is.

    And parts of sum_F of the gradient of r2 times (2 s)^2 r2, (parts, T) float32: 2 s^3 times the gradient of s.
    """

    def slope(scale: Values, r2: Array) -> Array:
        return 2 * jnp.sqrt(r2.astype(jnp.float32)) * rows(scale[0], SHAPE)

    def finish(d_r2: Values, scale: Values, narrow: Values, slopes: Values) -> tuple[Values, Values]:
        del scale, narrow
        # Pairs of bf16, never unpacked.
        dz = [a.astype(jnp.bfloat16) * b for a, b in zip(d_r2, slopes, strict=True)]
        return dz, [row_sums((a * b).astype(jnp.float32) for a, b in zip(dz, slopes, strict=True))]

    epilogue = Epilogue(finish, rows=[rstd_T], tile=r2_TF, keep=slope, unit=config.columns // PART, row_results=1)
    dz_TF, sums_PT = matmul("matmul_slope", dy_TD, proj_FD, epilogue, config=config)
    return dz_TF, sums_PT
