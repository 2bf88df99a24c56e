"""Self-attention of the residual stream, up to its output projection: matmuls, norms, rotary angles, mixing, softmax.

For every token and head, with z the head's channels of x W^T and r = 1 / rms(x) the token's scale:

    q = rotate(norm(r z_q))     k = rotate(norm(r z_k))     v = lambda_0 r z_v + lambda_1 value embedding
    y = softmax(scale q k^T where the mask lets the query see the key) v

r is what lets the norm before the matmul stay out of memory: see residual.py. Rotary angles turn half of a head's
channels: with R = K / 4, channel i < R turns with i + K / 2, and the others stay as they are.

In plain JAX the merged matmul (T, 3 C) is written, passes over it make q, k and v, and backward there are as many. The
Hopper path has all of that done by the kernels that multiply or attend, and never writes a matmul's result:

    forward     q = rotate(norm(r x W_q^T))                       kernel     k alike
                v = r x (lambda_0 W_v)^T + lambda_1 embedding     kernel
                y                                                 kernel
    backward    dz_q, dz_k, dz_v of the matmuls                   kernels of attention, as they end
                dx = dz W + dx past + (part through r) x          kernel     dW = dz^T x    cuBLAS

Backward, with y = r z, n = y s, s = 1 / rms(y), q = rotate(n), and g the gradient of q:

    dz_q = r s rotate_back(g - q mean_K(g q))     dz_v = r dv

as rotation leaves inner products alone. So z is not needed: r s comes from the forward pass, a number a head and token.
The gradient of r goes along x, where powers of r cancel:

    dr = sum_heads s^2 epsilon g.q / r + (dv.v - lambda_1 dv.embedding) / r          q stands for k as well
    dx = -dr r^3 x / D + ..
       = -(epsilon sum_heads (r s)^2 g.q + r^2 (dv.v - lambda_1 dv.embedding)) x / D + ..

From a norm only epsilon's part is left, 1 - mean_K(n^2) = epsilon s^2; so written, nothing cancels there. v is known as
it was rounded: where the value embedding outweighs the matmul, so does its rounding.

W_v is multiplied by lambda_0 before it is rounded to bfloat16. So the gradient of lambda_0 is the inner matmul of two
matrices as large as W_v, and no array of T tokens is read for it.

Source: NanoGPT speedrun record of 16 January 2025, with PyTorch's RMS norm; the fusion is our own.
"""

import functools
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from ..attention.op import block_sparse_attention, unsupported_mask
from ..attention.schedule import Schedule, build_schedule
from ..block_mask import BLOCK_SIZE, BlockMask
from ..implementation import (
    Implementation,
    check_name,
    check_whole,
    choose,
    first_order,
    known_number,
    vary_together,
)
from .residual import known_rstd, linear, weight_gradient, wide

type Heads = tuple[Array, Array, Array]


def self_attention(
    x_TD: Array,
    rstd_T: Array,
    qkv_3CD: Array,
    value_embedding_TC: Array | None,
    lambdas: Array,
    cos_TR: Array,
    sin_TR: Array,
    mask: BlockMask,
    *,
    heads: int,
    softmax_scale: float,
    epsilon: float,
    attention: Implementation = "auto",
    implementation: Implementation = "auto",
) -> tuple[Array, Array]:
    """x itself, and y (T, C) in x's dtype, in which everything is multiplied.

    Use the x that is returned for what goes past attention: then backward, one kernel forms the sum of both gradients.

    Args:
      x_TD: the residual stream.
      rstd_T: r, float32 and positive: `residual.rstd` of x, known. Its gradient is part of x's.
      qkv_3CD: W of q, k and v, each stored (out, in), C = H K; its gradient has its dtype.
      value_embedding_TC: what is mixed into the values; None for nothing.
      lambdas: (2,) float32, the weights of value and value embedding.
      cos_TR, sin_TR: float32, of the rotary angles, R <= K / 2: channel i < R of a head is paired with i + K / 2.
        Constants: no gradient goes to them.
      mask: the blocks to visit.
      heads: H.
      softmax_scale: factor on the scores.
      epsilon: added to the mean square of a head's q or k.
      attention: the `xla` path's, as in `block_sparse_attention`; `hopper` has its kernel of its own.
      implementation: `hopper` is for bfloat16, K = 128, R = 32, T a multiple of 128, D and C of 256, masks in blocks of
        128.

    Returns:
      Differentiable in x, W, value embedding and lambdas. With `hopper`, NaN and infinity also show where the mask
      hides them: `block_sparse_attention`, which holds them back, passes over q, k and v for it.

    Raises:
      ValueError: for shapes that do not fit together, or if `hopper` does not support the dtype or a size or does
        not run here.
    """
    arrays = jax.tree.map(jnp.asarray, (x_TD, rstd_T, qkv_3CD, value_embedding_TC, lambdas, cos_TR, sin_TR))
    x_TD, rstd_T, qkv_3CD, value_embedding_TC, lambdas, cos_TR, sin_TR = arrays
    if value_embedding_TC is not None:
        value_embedding_TC = value_embedding_TC.astype(x_TD.dtype)
    inputs = Inputs(x_TD, rstd_T, qkv_3CD, value_embedding_TC, lambdas, *lax.stop_gradient((cos_TR, sin_TR)))
    _check(inputs, heads)
    check_name("self_attention: attention", attention, get_args(Implementation))
    softmax_scale = known_number("self_attention", "softmax_scale", softmax_scale)
    epsilon = known_number("self_attention", "epsilon", epsilon)
    channels, width = qkv_3CD.shape[1:]
    sizes = x_TD.shape[0], width, channels, channels // heads, cos_TR.shape[1]
    check_whole("self_attention", *inputs)
    mask = mask.checked()
    name = choose(
        "self_attention",
        implementation,
        lambda: unsupported(x_TD.dtype, *sizes, mask.block_size) or unsupported_mask(mask),
        arrays=(x_TD, qkv_3CD),
    )
    if mask.batch or {mask.q_length, mask.kv_length} != {x_TD.shape[0]}:
        raise ValueError(
            f"self_attention: the mask is for {(*mask.batch, mask.q_length)} queries and {mask.kv_length} keys, "
            f"but x is {x_TD.shape}; build it from the same sequence"
        )
    if name == "hopper":
        with jax.named_scope("masks"):
            schedule = build_schedule(mask)
        return _hopper(softmax_scale, epsilon, *vary_together(inputs, mask.documents, schedule))
    wide_TD = x_TD.astype(wide(x_TD.dtype))  # in which its gradient's parts are summed: see residual.py
    q_THK, k_THK, v_THK = project_heads(inputs._replace(x_TD=wide_TD), x_TD.dtype, heads=heads, epsilon=epsilon)
    with jax.named_scope("attention"):
        y_THK = block_sparse_attention(q_THK, k_THK, v_THK, mask, scale=softmax_scale, implementation=attention)
    return wide_TD.astype(x_TD.dtype), y_THK.reshape(x_TD.shape[0], -1)


def unsupported(
    dtype: DTypeLike,
    tokens: int,
    width: int,
    channels: int,
    head_width: int,
    rotated: int,
    block_size: int = BLOCK_SIZE,
) -> str | None:
    """Return what the Hopper kernels need of their arguments, None where they have it."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"bfloat16, got {jnp.dtype(dtype)}"
    if block_size != BLOCK_SIZE:
        return f"a mask in blocks of {BLOCK_SIZE}, got {block_size}"
    # Imported when used, here as below: Pallas' GPU backend is not part of every jaxlib.
    from . import self_attention_hopper

    return self_attention_hopper.unsupported(tokens, width, channels, head_width, rotated)


class Inputs(NamedTuple):
    """The arrays of which q, k and v are made: see `self_attention`."""

    x_TD: Array
    rstd_T: Array
    qkv_3CD: Array
    value_embedding_TC: Array | None
    lambdas: Array
    cos_TR: Array
    sin_TR: Array


def project_heads(inputs: Inputs, dtype: DTypeLike, *, heads: int, epsilon: float) -> Heads:
    """Return q, k and v, each (T, H, K), in plain JAX; multiplied in `dtype`, and in it."""
    x_TD, rstd_T, qkv_3CD, value_embedding_TC, lambdas, cos_TR, sin_TR = inputs
    length, rotated = x_TD.shape[0], cos_TR.shape[1]
    qkv_TM = linear(x_TD.astype(dtype), qkv_3CD.reshape(-1, x_TD.shape[1]))
    scaled_TM = qkv_TM.astype(wide(dtype)) * known_rstd(x_TD, rstd_T)[:, None]
    q_THK, k_THK, v_THK = (y_TC.reshape(length, heads, -1) for y_TC in jnp.split(scaled_TM, 3, axis=1))
    cos, sin = cos_TR[:, None], sin_TR[:, None]

    def normed_and_rotated(y_THK: Array) -> Array:
        n_THK = y_THK * lax.rsqrt(jnp.mean(y_THK * y_THK, axis=-1, keepdims=True) + epsilon)
        (a, first), (b, second) = (jnp.split(half, [rotated], axis=-1) for half in jnp.split(n_THK, 2, axis=-1))
        return jnp.concatenate([a * cos + b * sin, first, b * cos - a * sin, second], axis=-1)

    v_THK = lambdas[0] * v_THK
    if value_embedding_TC is not None:
        v_THK = v_THK + lambdas[1] * value_embedding_TC.astype(wide(dtype)).reshape(v_THK.shape)
    return normed_and_rotated(q_THK).astype(dtype), normed_and_rotated(k_THK).astype(dtype), v_THK.astype(dtype)


class Saved(NamedTuple):
    inputs: Inputs
    heads: Heads
    factors: tuple[Array, Array]  # of q and k, (H, T): r s
    y_THK: Array
    lse_HT: Array
    documents_T: Array
    schedule: Schedule


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _hopper(
    softmax_scale: float, epsilon: float, inputs: Inputs, documents_T: Array, schedule: Schedule
) -> tuple[Array, Array]:
    return _hopper_forward(softmax_scale, epsilon, inputs, documents_T, schedule)[0]


def _hopper_forward(
    softmax_scale: float, epsilon: float, inputs: Inputs, documents_T: Array, schedule: Schedule
) -> tuple[tuple[Array, Array], Saved]:
    from ..attention.hopper_forward import forward
    from ..hopper.rotary import HEAD_WIDTH
    from .residual_hopper import matmul_add
    from .self_attention_hopper import matmul_norm_rotary

    x_TD, rstd_T, qkv_3CD, value_embedding_TC, lambdas, *angles = first_order("self_attention", inputs)
    q_CD, k_CD, v_CD = _weights(qkv_3CD, lambdas, x_TD.dtype)
    q_TC, q_factor_HT = matmul_norm_rotary(x_TD, q_CD, rstd_T, *angles, epsilon=epsilon)
    k_TC, k_factor_HT = matmul_norm_rotary(x_TD, k_CD, rstd_T, *angles, epsilon=epsilon)
    mixing = None
    if value_embedding_TC is not None:
        mixing = jnp.broadcast_to(lambdas[1], rstd_T.shape), value_embedding_TC
    v_TC, _ = matmul_add(x_TD, v_CD, mixing, rstd_T)
    q_THK, k_THK, v_THK = (a_TC.reshape(a_TC.shape[0], -1, HEAD_WIDTH) for a_TC in (q_TC, k_TC, v_TC))
    heads = q_THK, k_THK, v_THK
    with jax.named_scope("attention"):
        y_THK, lse_HT = forward(*heads, documents_T, schedule.by_query, scale=softmax_scale)
    saved = Saved(inputs, heads, (q_factor_HT, k_factor_HT), y_THK, lse_HT, documents_T, schedule)
    return (x_TD, y_THK.reshape(x_TD.shape[0], -1)), saved


def _hopper_backward(
    softmax_scale: float, epsilon: float, saved: Saved, gradients: tuple[Array, Array]
) -> tuple[Inputs, None, None]:
    from ..attention.hopper_backward import Origin, backward_dkv, backward_dq
    from .residual_hopper import matmul_add

    saved, gradients = first_order("self_attention", (saved, gradients))
    x_TD, rstd_T, qkv_3CD, value_embedding_TC, lambdas, cos_TR, sin_TR = saved.inputs
    dx_past_TD, dy_TC = gradients
    dy_THK = dy_TC.reshape(saved.y_THK.shape)
    q_origin, k_origin = (Origin(cos_TR, sin_TR, factor_HT) for factor_HT in saved.factors)
    with jax.named_scope("attention"):
        dz_q_THK, delta_HT, q_dots_HT = backward_dq(
            *saved.heads, saved.y_THK, dy_THK, saved.lse_HT, saved.documents_T, saved.schedule.by_query, q_origin,
            scale=softmax_scale,
        )  # fmt: skip
        dz_k_THK, dz_v_THK, k_dots_HT, value_dots_HT = backward_dkv(
            *saved.heads, dy_THK, saved.lse_HT, delta_HT, saved.documents_T, saved.schedule.by_key, k_origin, rstd_T,
            scale=softmax_scale,
        )  # fmt: skip
    dz_q_TC, dz_k_TC, dz_v_TC = (dz_THK.reshape(dy_TC.shape) for dz_THK in (dz_q_THK, dz_k_THK, dz_v_THK))

    through_values_T = jnp.sum(value_dots_HT, axis=0)
    d_embedding_TC, d_embedding_weight = None, jnp.float32(0)
    if value_embedding_TC is not None:
        dv_TC = dz_v_TC.astype(jnp.float32) / rstd_T[:, None]
        d_embedding_TC = (lambdas[1] * dv_TC).astype(value_embedding_TC.dtype)
        embedding_dots_T = jnp.sum(dv_TC * value_embedding_TC.astype(jnp.float32), axis=1)
        through_values_T -= lambdas[1] * embedding_dots_T
        d_embedding_weight = jnp.sum(embedding_dots_T)
    through_norms_T = sum(
        jnp.sum(factor_HT**2 * dots_HT, axis=0)
        for factor_HT, dots_HT in zip(saved.factors, (q_dots_HT, k_dots_HT), strict=True)
    )
    along_x_T = (epsilon * through_norms_T + rstd_T**2 * through_values_T) * (-1 / x_TD.shape[1])

    weight_DM = _weights(qkv_3CD, lambdas, x_TD.dtype).reshape(-1, x_TD.shape[1]).T
    dz_TC = dz_q_TC, dz_k_TC, dz_v_TC
    dx_TD, _ = matmul_add(dz_TC, weight_DM, (None, dx_past_TD), addend=(x_TD, along_x_T))
    # In v's third of lambda_0 W_v, not yet of W_v.
    d_weights = [weight_gradient(dz, x_TD, jnp.float32) for dz in dz_TC]
    d_value_weight = jnp.sum(d_weights[2] * qkv_3CD[2].astype(jnp.float32))
    d_weights[2] *= lambdas[0]
    constant = jnp.zeros_like(cos_TR)
    d_inputs = Inputs(
        x_TD=dx_TD,
        rstd_T=jnp.zeros_like(rstd_T),
        qkv_3CD=jnp.stack(d_weights).astype(qkv_3CD.dtype),
        value_embedding_TC=d_embedding_TC,
        lambdas=jnp.stack([d_value_weight, d_embedding_weight]),
        cos_TR=constant,
        sin_TR=constant,
    )
    return d_inputs, None, None


_hopper.defvjp(_hopper_forward, _hopper_backward)


def _weights(qkv_3CD: Array, lambdas: Array, dtype: DTypeLike) -> Array:
    """W_q, W_k and lambda_0 W_v, rounded once."""
    factors = jnp.ones(3, jnp.float32).at[2].set(lambdas[0])[:, None, None]
    return (factors * qkv_3CD.astype(jnp.float32)).astype(dtype)


def _check(inputs: Inputs, heads: int) -> None:
    x_TD, rstd_T, qkv_3CD, value_embedding_TC, lambdas, cos_TR, sin_TR = inputs
    if x_TD.ndim != 2 or qkv_3CD.ndim != 3 or qkv_3CD.shape[::2] != (3, x_TD.shape[1]):
        raise ValueError(
            f"self_attention needs x (T, D) and weights (3, C, D), got {x_TD.shape} and {qkv_3CD.shape}; "
            "for more sequences, vmap it with implementation='xla' or join their tokens"
        )
    length, channels = x_TD.shape[0], qkv_3CD.shape[1]
    if heads < 1 or channels % (2 * heads):
        raise ValueError(f"C must be H K with K even, got C = {channels} for {heads} heads; check `heads`")
    if cos_TR.ndim != 2 or cos_TR.shape[1] > channels // heads // 2:
        raise ValueError(
            f"cos must be (T, R) with R <= K / 2, the pairs of a head, got {cos_TR.shape} for K = {channels // heads}"
        )
    number = wide(x_TD.dtype)
    for name, array, shape, dtype in (
        ("rstd", rstd_T, (length,), number),
        ("value_embedding", value_embedding_TC, (length, channels), None),
        ("lambdas", lambdas, (2,), number),
        ("cos", cos_TR, (length, cos_TR.shape[1]), number),
        ("sin", sin_TR, cos_TR.shape, number),
    ):
        if array is not None and (array.shape != shape or dtype not in (None, array.dtype)):
            wanted = f"{shape} {jnp.dtype(dtype)}" if dtype else f"{shape}"
            raise ValueError(
                f"{name} must be {wanted} for x {x_TD.shape} and weights {qkv_3CD.shape}, "
                f"got {array.shape} {array.dtype}"
            )
