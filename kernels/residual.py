"""The residual stream's part of a norm: one number a token, applied after the matrix product instead of before it.

An RMS norm without weights only scales each token, so it commutes with the product that follows:

    norm(x) W^T = r (x W^T)        r = 1 / rms(x)

Then the normalised x need not exist. Written first, it costs a pass of its own, because a row must be read to its
end before its first channel can be scaled; r comes out of the pass that writes x, and is applied in the one that reads
x W^T anyway. The same holds backward: the gradient of r is a sum over what that pass has at hand, and what comes back
to x is a constant a token times x, which joins the sum of gradients in the pass that forms it.

So an operation that begins with a norm takes x and r. It is handed r as known, since whoever wrote x last has had the
row in hand, but r stays a function of x: its gradient is returned as part of x's.

A norm's gradient has no part along x. Here that is the difference of two, what comes through the product and what comes
through r, and beside both stands what passes the norm by, often a thousand times larger. Added to that one after the
other in bfloat16 they would be lost: not now up, now down, but wherever it is too large for them, and one more often
than the other. What is then left along x is a gradient that nothing asked for, of the factors on the residual stream:
it has been half of theirs. So all three are summed in float32, and the sum is rounded once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from .paths import KernelPath


def inverse_rms(x_TD: Array, epsilon: float) -> Array:
    """1 / sqrt(mean of a token's squares + `epsilon`), (T,) float32."""
    wide_TD = x_TD.astype(jnp.float32)
    return lax.rsqrt(jnp.mean(wide_TD * wide_TD, axis=-1) + epsilon)


@jax.custom_vjp
def known_inverse_rms(x_TD: Array, scale_T: Array) -> Array:
    """`scale_T`, which must be `inverse_rms(x_TD)`, as a function of x: its gradient goes to x."""
    del x_TD
    return scale_T


def _known_forward(x_TD: Array, scale_T: Array) -> tuple[Array, tuple[Array, Array]]:
    return scale_T, (x_TD, scale_T)


def _known_backward(saved: tuple[Array, Array], d_scale_T: Array) -> tuple[Array, Array]:
    x_TD, scale_T = saved
    # d scale / dx = -scale^3 x / D: epsilon cancels.
    along_x_T = d_scale_T * scale_T * scale_T * scale_T * (-1 / x_TD.shape[1])
    return (along_x_T[:, None] * x_TD.astype(jnp.float32)).astype(x_TD.dtype), jnp.zeros_like(scale_T)


known_inverse_rms.defvjp(_known_forward, _known_backward)


def linear(x: Array, weight: Array) -> Array:
    """x W^T with W stored (out, in), in x's dtype."""
    return lax.dot_general(x, weight.astype(x.dtype), (((1,), (1,)), ((), ())))


def weight_gradient(d_y_TM: Array, x_TN: Array, dtype: DTypeLike) -> Array:
    """dy^T x, (M, N): the gradient of `linear`'s weight, rounded once, to `dtype`."""
    return lax.dot_general(d_y_TM, x_TN, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def add_linear(
    x_TD: Array,
    y_TC: Array,
    weight_DC: Array,
    *,
    epsilon: float,
    implementation: KernelPath = "plain",
    interpret: bool = False,
) -> tuple[Array, Array]:
    """x + y W^T, (T, D) in x's dtype, and its `inverse_rms`, (T,) float32.

    Args:
      x_TD, y_TC: the residual stream and what is projected onto it.
      weight_DC: W, stored (out, in); its gradient has its dtype.
      epsilon: of the inverse RMS.
      implementation: `fast` rounds the sum once, and is for bfloat16, T a multiple of 128, D of 256 and C of 64.
      interpret: run the kernel in Pallas' interpreter (any device, slow; for tests). It needs a CPU thread for each of
        six warpgroups: set `jax_num_cpu_devices` to 8 on a small machine.

    Returns:
      Differentiable in all arrays through the sum. The inverse RMS counts as a constant: see `known_inverse_rms`.
      Inside `shard_map`, switch off `check_vma` for `fast`: Pallas' GPU kernels do not carry it.

    Raises:
      ValueError: for shapes that do not fit together, or if `fast` does not support the dtype or a size.
    """
    if x_TD.ndim != 2 or y_TC.ndim != 2 or weight_DC.shape != (x_TD.shape[1], y_TC.shape[1]):
        raise ValueError(
            f"add_linear needs x (T, D), y (T, C) and a weight (D, C), "
            f"got {x_TD.shape}, {y_TC.shape} and {weight_DC.shape}"
        )
    if implementation == "plain":
        sum_TD = x_TD + linear(y_TC, weight_DC)
        return sum_TD, lax.stop_gradient(inverse_rms(sum_TD, epsilon))
    reason = not_fast(x_TD.dtype, x_TD.shape[0], (y_TC.shape[1], x_TD.shape[1]))
    if reason is not None:
        raise ValueError(f"the fast add_linear needs {reason}; use implementation='plain'")
    return _fast(x_TD, y_TC, weight_DC, epsilon, interpret)


def not_fast(dtype: DTypeLike, tokens: int, *products: tuple[int, int]) -> str | None:
    """What keeps products of `tokens` rows, (channels in, out) each, from product_hopper.py, if anything does."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"bfloat16, got {jnp.dtype(dtype)}"
    from .product_hopper import unsupported_shape

    reasons = (unsupported_shape(tokens, *sizes) for sizes in products)
    return next((reason for reason in reasons if reason is not None), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fast(x_TD: Array, y_TC: Array, weight_DC: Array, epsilon: float, interpret: bool) -> tuple[Array, Array]:
    # Imported when used: Pallas' GPU backend is not part of every jaxlib.
    from .residual_hopper import sum_product

    weight = weight_DC.astype(x_TD.dtype)
    sum_TD, squares_PT = sum_product(y_TC, weight, (None, x_TD), squares=True, interpret=interpret)
    assert squares_PT is not None
    return sum_TD, lax.rsqrt(jnp.sum(squares_PT, axis=0) / x_TD.shape[1] + epsilon)


def _fast_forward(
    x_TD: Array, y_TC: Array, weight_DC: Array, epsilon: float, interpret: bool
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return _fast(x_TD, y_TC, weight_DC, epsilon, interpret), (y_TC, weight_DC)


def _fast_backward(
    epsilon: float, interpret: bool, saved: tuple[Array, Array], gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    del epsilon, interpret
    (y_TC, weight_DC), (dx_TD, _) = saved, gradients
    dy_TC = lax.dot_general(dx_TD, weight_DC.astype(dx_TD.dtype), (((1,), (0,)), ((), ())))
    return dx_TD, dy_TC, weight_gradient(dx_TD, y_TC, weight_DC.dtype)


_fast.defvjp(_fast_forward, _fast_backward)
