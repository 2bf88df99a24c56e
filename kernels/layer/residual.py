"""The residual stream's part of a norm: one number a token, applied after the matmul instead of before it.

An RMS norm without weights only scales each token, so it commutes with the matmul that follows:

    norm(x) W^T = r (x W^T)        r = 1 / rms(x)

Then the normalised x need not exist. Written first, it costs a pass of its own, because a row must be read to its
end before its first channel can be scaled; r comes out of the pass that writes x, and is applied in the one that reads
x W^T anyway. The same holds backward: the gradient of r is a sum over what that pass has at hand, and what comes back
to x is a constant a token times x, which joins the sum of gradients in the pass that forms it.

So an operation that begins with a norm takes x and r. It is handed r as known, since whoever wrote x last has had the
row in hand, but r stays a function of x: its gradient is returned as part of x's.

A norm's gradient has no part along x. Here that is the difference of two, what comes through the matmul and what comes
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

from ..implementation import Implementation, check_whole, choose, first_order, known_number, vary_together


def wide(dtype: DTypeLike) -> jnp.dtype:
    """Return the type in which sums are taken: float32, or float64 for it."""
    return jnp.promote_types(dtype, jnp.float32)


def rstd(x_TD: Array, epsilon: float) -> Array:
    """Return 1 / sqrt(mean of a token's squares + `epsilon`), (T,) float32, or float64 if x is."""
    wide_TD = x_TD.astype(wide(x_TD.dtype))
    return lax.rsqrt(jnp.mean(wide_TD * wide_TD, axis=-1) + epsilon)


def known_rstd(x_TD: Array, rstd_T: Array) -> Array:
    """Return `rstd_T`, which must be `rstd(x_TD)`, as a function of x: its gradient goes to x."""
    return _known_rstd(*vary_together(x_TD, rstd_T))


@jax.custom_vjp
def _known_rstd(x_TD: Array, rstd_T: Array) -> Array:
    del x_TD
    return rstd_T


def _known_forward(x_TD: Array, rstd_T: Array) -> tuple[Array, tuple[Array, Array]]:
    return _known_rstd(x_TD, rstd_T), (x_TD, rstd_T)  # what differentiates this knows it too


def _known_backward(saved: tuple[Array, Array], d_rstd_T: Array) -> tuple[Array, Array]:
    x_TD, rstd_T = saved
    rstd_T = _known_rstd(x_TD, rstd_T)
    # d rstd / dx = -rstd^3 x / D: epsilon cancels.
    along_x_T = d_rstd_T * rstd_T * rstd_T * rstd_T * (-1 / x_TD.shape[1])
    return (along_x_T[:, None] * x_TD.astype(wide(x_TD.dtype))).astype(x_TD.dtype), jnp.zeros_like(rstd_T)


_known_rstd.defvjp(_known_forward, _known_backward)


def linear(x: Array, weight: Array) -> Array:
    """Return x W^T with W stored (out, in), in x's dtype."""
    return lax.dot_general(x, weight.astype(x.dtype), (((1,), (1,)), ((), ())))


def weight_gradient(d_y_TM: Array, x_TN: Array, dtype: DTypeLike) -> Array:
    """Return dy^T x, (M, N): the gradient of `linear`'s weight, rounded once, to `dtype`."""
    return lax.dot_general(d_y_TM, x_TN, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def add_linear(
    x_TD: Array,
    y_TC: Array,
    weight_DC: Array,
    *,
    epsilon: float,
    implementation: Implementation = "auto",
) -> tuple[Array, Array]:
    """Return x + y W^T, (T, D) in x's dtype, and its `rstd`, (T,) float32.

    Args:
      x_TD, y_TC: the residual stream and what is projected onto it.
      weight_DC: W, stored (out, in); its gradient has its dtype.
      epsilon: of the inverse RMS.
      implementation: `hopper` rounds the sum once, and is for bfloat16, T a multiple of 128, D of 256 and C of 64.

    Returns:
      Differentiable in all arrays through the sum. The inverse RMS counts as a constant: see `known_rstd`.

    Raises:
      ValueError: for shapes that do not fit together, or if `hopper` does not support the dtype or a size or does not
        run here.
    """
    x_TD, y_TC, weight_DC = map(jnp.asarray, (x_TD, y_TC, weight_DC))
    epsilon = known_number("add_linear", "epsilon", epsilon)
    if x_TD.ndim != 2 or y_TC.ndim != 2 or weight_DC.shape != (x_TD.shape[1], y_TC.shape[1]):
        raise ValueError(
            f"add_linear needs x (T, D), y (T, C) and a weight (D, C), "
            f"got {x_TD.shape}, {y_TC.shape} and {weight_DC.shape}"
        )
    check_whole("add_linear", weight_DC, by_token=(x_TD, y_TC))
    name = choose(
        "add_linear",
        implementation,
        lambda: unsupported(x_TD.dtype, x_TD.shape[0], (y_TC.shape[1], x_TD.shape[1])),
        arrays=(x_TD, y_TC, weight_DC),
    )
    if name == "hopper":
        return _hopper(*vary_together(x_TD, y_TC, weight_DC), epsilon)
    sum_TD = x_TD + linear(y_TC, weight_DC)
    return sum_TD, lax.stop_gradient(rstd(sum_TD, epsilon))


def unsupported(dtype: DTypeLike, tokens: int, *matmuls: tuple[int, int]) -> str | None:
    """Return what the Hopper kernels need of matmuls of `tokens` rows, (channels in, out) each; None: they have it."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"bfloat16, got {jnp.dtype(dtype)}"
    # Imported when used, here as below: Pallas' GPU backend is not part of every jaxlib.
    from ..hopper import matmul

    reasons = (matmul.unsupported(tokens, *sizes) for sizes in matmuls)
    return next((reason for reason in reasons if reason is not None), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _hopper(x_TD: Array, y_TC: Array, weight_DC: Array, epsilon: float) -> tuple[Array, Array]:
    from .residual_hopper import matmul_add

    weight = weight_DC.astype(x_TD.dtype)
    sum_TD, squares_PT = matmul_add(y_TC, weight, (None, x_TD), squares=True)
    assert squares_PT is not None
    return sum_TD, lax.rsqrt(jnp.sum(squares_PT, axis=0) / x_TD.shape[1] + epsilon)


def _hopper_forward(
    x_TD: Array, y_TC: Array, weight_DC: Array, epsilon: float
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    x_TD, y_TC, weight_DC = first_order("add_linear", (x_TD, y_TC, weight_DC))
    return _hopper(x_TD, y_TC, weight_DC, epsilon), (y_TC, weight_DC)


def _hopper_backward(
    epsilon: float, saved: tuple[Array, Array], gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    del epsilon
    (y_TC, weight_DC), (dx_TD, _) = first_order("add_linear", (saved, gradients))
    dy_TC = lax.dot_general(dx_TD, weight_DC.astype(dx_TD.dtype), (((1,), (0,)), ((), ())))
    return dx_TD, dy_TC, weight_gradient(dx_TD, y_TC, weight_DC.dtype)


_hopper.defvjp(_hopper_forward, _hopper_backward)
