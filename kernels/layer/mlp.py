"""The MLP of a block, joined to the residual stream: x + P relu(W norm(x))^2.

As in residual.py the norm before the matmul is applied after it: relu(norm(x) W^T) = relu(s x W^T), s = 1 / rms(x).

In plain JAX, XLA multiplies by cuBLAS and passes over the (T, F) arrays between matmuls: forward it reads z = x W^T to
write r2 = relu(s z)^2, backward it reads z and the gradient of r2 to write that of z; and over (T, D) arrays for the
residual sums. The Hopper path does all of it in the kernels that multiply, and never writes z:

    forward     r2 = relu(s x W^T)^2            kernel        y = x + r2 P^T                         kernel
    backward    dz = (dy P) 2 s sqrt(r2)        kernel        dx = dz W + dy + (part through s) x    kernel
                                                              dW = dz^T x, dP = dy^T r2              cuBLAS

The slope of relu(h)^2 is 2 relu(h), and relu(h) = sqrt(r2): a root halves relative errors, so of the 2^-8 that rounding
r2 to bfloat16 may cost, 2^-9 is left, half of what rounding h would. (Below 1e-19 relu(h) vanishes with its square.)

Source: NanoGPT speedrun record of 16 January 2025; relu squared from So et al. 2021, arXiv:2109.08668. The kernels are
our own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from ..implementation import Implementation, check_whole, choose, first_order, vary_together
from . import residual
from .residual import known_rstd, linear, weight_gradient, wide


def mlp(
    x_TD: Array,
    rstd_T: Array,
    fc_FD: Array,
    proj_DF: Array,
    implementation: Implementation = "auto",
) -> Array:
    """Return x + relu(s x W^T)^2 P^T, (T, D) in x's dtype, in which everything is multiplied.

    Args:
      x_TD: the residual stream.
      rstd_T: s, float32 (float64 for such an x): `residual.rstd` of x, known. Its gradient is part of x's.
      fc_FD, proj_DF: W and P, stored (out, in); their gradients have their dtypes.
      implementation: `hopper` is for bfloat16, T a multiple of 128, D and F of 256.

    Returns:
      Differentiable in x, fc and proj.

    Raises:
      ValueError: for shapes that do not fit together, or if `hopper` does not support the dtype or a size or does not
        run here.
    """
    x_TD, rstd_T, fc_FD, proj_DF = map(jnp.asarray, (x_TD, rstd_T, fc_FD, proj_DF))
    _check(x_TD, rstd_T, fc_FD, proj_DF)
    check_whole("mlp", fc_FD, proj_DF, by_token=(x_TD, rstd_T))
    sizes = x_TD.shape[0], *reversed(fc_FD.shape)
    name = choose("mlp", implementation, lambda: unsupported(x_TD.dtype, *sizes), arrays=(x_TD, fc_FD, proj_DF))
    if name == "hopper":
        return _hopper(*vary_together(x_TD, rstd_T, fc_FD, proj_DF))
    wide_TD = x_TD.astype(wide(x_TD.dtype))  # in which its gradient's parts are summed: see residual.py
    z_TF = linear(wide_TD.astype(x_TD.dtype), fc_FD)
    y_TD = linear(relu_squared(z_TF, known_rstd(wide_TD, rstd_T)), proj_DF)
    return (wide_TD + y_TD).astype(x_TD.dtype)


def unsupported(dtype: DTypeLike, tokens: int, width: int, hidden: int) -> str | None:
    """Return what the Hopper kernels need of their arguments, None where they have it."""
    return residual.unsupported(dtype, tokens, (width, hidden), (hidden, width))


def relu_squared(z_TF: Array, rstd_T: Array) -> Array:
    """Return relu(s z)^2 in the dtype of z, computed in float32 or wider."""
    root_TF = jnp.maximum(z_TF.astype(wide(z_TF.dtype)), 0) * rstd_T[:, None]
    return (root_TF * root_TF).astype(z_TF.dtype)


class Saved(NamedTuple):
    x_TD: Array
    rstd_T: Array
    fc_FD: Array
    proj_DF: Array
    r2_TF: Array


@jax.custom_vjp
def _hopper(x_TD: Array, rstd_T: Array, fc_FD: Array, proj_DF: Array) -> Array:
    return _hopper_forward(x_TD, rstd_T, fc_FD, proj_DF)[0]


def _hopper_forward(x_TD: Array, rstd_T: Array, fc_FD: Array, proj_DF: Array) -> tuple[Array, Saved]:
    # Imported when used: Pallas' GPU backend is not part of every jaxlib.
    from .mlp_hopper import matmul_relu_squared
    from .residual_hopper import matmul_add

    x_TD, rstd_T, fc_FD, proj_DF = first_order("mlp", (x_TD, rstd_T, fc_FD, proj_DF))
    r2_TF = matmul_relu_squared(x_TD, fc_FD.astype(x_TD.dtype), rstd_T)
    y_TD, _ = matmul_add(r2_TF, proj_DF.astype(x_TD.dtype), (None, x_TD))
    return y_TD, Saved(x_TD, rstd_T, fc_FD, proj_DF, r2_TF)


def _hopper_backward(saved: Saved, dy_TD: Array) -> tuple[Array, Array, Array, Array]:
    from .mlp_hopper import matmul_slope
    from .residual_hopper import matmul_add

    (x_TD, rstd_T, fc_FD, proj_DF, r2_TF), dy_TD = first_order("mlp", (saved, dy_TD))
    fc_DF, proj_FD = (weight.astype(x_TD.dtype).T for weight in (fc_FD, proj_DF))
    dz_TF, shares_PT = matmul_slope(dy_TD, proj_FD, rstd_T, r2_TF)
    # The shares sum to 2 s^3 times the gradient of s, which times -s^3 / D goes along x: powers of s cancel.
    along_x_T = jnp.sum(shares_PT, axis=0) * (-0.5 / x_TD.shape[1])
    dx_TD, _ = matmul_add(dz_TF, fc_DF, (None, dy_TD), addend=(x_TD, along_x_T))
    d_fc_FD, d_proj_DF = weight_gradient(dz_TF, x_TD, fc_FD.dtype), weight_gradient(dy_TD, r2_TF, proj_DF.dtype)
    return dx_TD, jnp.zeros_like(rstd_T), d_fc_FD, d_proj_DF


_hopper.defvjp(_hopper_forward, _hopper_backward)


def _check(x_TD: Array, rstd_T: Array, fc_FD: Array, proj_DF: Array) -> None:
    if x_TD.ndim != 2 or fc_FD.ndim != 2 or fc_FD.shape[1] != x_TD.shape[1] or proj_DF.shape != fc_FD.shape[::-1]:
        raise ValueError(
            f"mlp needs x (T, D), fc (F, D) and proj (D, F), got {x_TD.shape}, {fc_FD.shape} and {proj_DF.shape}; "
            "for more sequences, vmap it with implementation='xla' or join their tokens"
        )
    if rstd_T.shape != x_TD.shape[:1] or rstd_T.dtype != wide(x_TD.dtype):
        raise ValueError(
            f"rstd must be {x_TD.shape[:1]} {wide(x_TD.dtype)} for x {x_TD.shape}, got {rstd_T.shape} {rstd_T.dtype}"
        )
