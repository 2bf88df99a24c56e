"""The MLP's two products that meet relu squared, on Hopper, each with its pointwise part done in registers.

    forward      r2 = relu(s x W^T)^2           x (T, D), W (F, D), s (T): a factor of each row
    backward     dz = (dy P^T) 2 s sqrt(r2)     dy (T, D), P (F, D)

product_hopper.py multiplies. Backward, the slope 2 s sqrt(r2) is what is made while the tensor cores are busy.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from .attention_hopper_ops import rows
from .product_hopper import CONFIG, HALF, PART, Config, Epilogue, Values, product, row_sums

SHAPE = (HALF, PART)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))  # lowered once, not once a layer
def relu_squared_product(
    x_TD: Array, w_FD: Array, scale_T: Array, *, config: Config = CONFIG, interpret: bool
) -> Array:
    """relu(s x W^T)^2, (T, F) bf16, computed in float32 and rounded once; shapes as `product_hopper` says."""

    def finish(z: Values, scale: Values, *_: Values) -> tuple[Values, Values]:
        r = jnp.maximum(z[0], 0) * rows(scale[0], SHAPE)
        return [r * r], []

    epilogue = Epilogue(finish, rows=[scale_T])
    return product("mlp_relu_squared", x_TD, w_FD, epilogue, config=config, interpret=interpret)[0]


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def slope_product(
    dy_TD: Array, proj_FD: Array, scale_T: Array, r2_TF: Array, *, config: Config = CONFIG, interpret: bool
) -> tuple[Array, Array]:
    """(dy P^T) 2 s sqrt(r2), (T, F) bf16: the gradient of z, given that of relu(s z)^2 as a product; 0 where r2 is.

    And parts of sum_F of the gradient of r2 times (2 s)^2 r2, (parts, T) float32: 2 s^3 times the gradient of s.
    """

    def slope(scale: Values, r2: Array) -> Array:
        return 2 * jnp.sqrt(r2.astype(jnp.float32)) * rows(scale[0], SHAPE)

    def finish(d_r2: Values, scale: Values, narrow: Values, slopes: Values) -> tuple[Values, Values]:
        del scale, narrow
        # Pairs of bf16, never unpacked.
        dz = [a.astype(jnp.bfloat16) * b for a, b in zip(d_r2, slopes, strict=True)]
        return dz, [row_sums((a * b).astype(jnp.float32) for a, b in zip(dz, slopes, strict=True))]

    epilogue = Epilogue(finish, rows=[scale_T], tile=r2_TF, keep=slope, unit=config.columns // PART, row_results=1)
    dz_TF, sums_PT = product("mlp_slope", dy_TD, proj_FD, epilogue, config=config, interpret=interpret)
    return dz_TF, sums_PT
