"""From the merged QKV product to the heads that attention takes: norms, rotary angles, value mixing.

For every token and head, with z the token's channels of x W^T and r the scale of the token:

    q = rotate(norm(r z_q))     k = rotate(norm(r z_k))     v = lambda_0 r z_v + lambda_1 value embedding

The scale is what lets the norm before the product stay out of memory: norm(x) W^T = r (x W^T) with
r = 1 / rms(x), one number a token. So x itself is multiplied, r is applied here, and so is its gradient.

Source: NanoGPT speedrun record of 16 January 2025, with PyTorch's RMS norm; the fusion is our own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from .paths import KernelPath, on_hopper

type Heads = tuple[Array, Array, Array]


def qkv_to_heads(
    qkv_TM: Array,
    scale_T: Array,
    value_embedding_TC: Array | None,
    lambdas: Array,
    cos_TR: Array,
    sin_TR: Array,
    *,
    heads: int,
    epsilon: float,
    implementation: KernelPath = "plain",
    interpret: bool = False,
) -> Heads:
    """q, k and v, each (T, H, K) in the dtype of `qkv_TM`, computed in float32 and rounded once.

    Args:
      qkv_TM: x W^T, M = 3 H K channels: all heads of q, then of k, then of v.
      scale_T: float32 factor of each token's channels; see `inverse_rms`.
      value_embedding_TC: what is mixed into the values, C = H K; None for nothing.
      lambdas: (2,) float32, the weights of value and value embedding.
      cos_TR, sin_TR: float32, of the rotary angles, R = K / 2: channel i of a head is paired with i + R.
        Constants: no gradient goes to them.
      heads: H.
      epsilon: added to the mean square of a head's q or k.
      implementation: `fast` is for bfloat16, K of 64 or 128, and T a multiple of 32.
      interpret: run the kernels in Pallas' interpreter (any device, slow; for tests).

    Returns:
      Differentiable in all arguments but cos and sin. Inside `shard_map`, switch off `check_vma` for `fast`:
      Pallas' GPU kernels do not carry it.

    Raises:
      ValueError: for shapes that do not fit together, or if `fast` does not support the dtype or a size.
    """
    _check(qkv_TM, scale_T, value_embedding_TC, lambdas, cos_TR, sin_TR, heads)
    cos_TR, sin_TR = lax.stop_gradient((cos_TR, sin_TR))
    if implementation == "plain":
        return _plain(qkv_TM, scale_T, value_embedding_TC, lambdas, cos_TR, sin_TR, heads, epsilon)
    reason = _not_fast(qkv_TM.dtype, qkv_TM.shape[0], 2 * cos_TR.shape[1])
    if reason is not None:
        raise ValueError(f"the fast qkv_to_heads needs {reason}; use implementation='plain'")
    if value_embedding_TC is not None:
        value_embedding_TC = value_embedding_TC.astype(qkv_TM.dtype)
    return _fast(qkv_TM, scale_T, value_embedding_TC, lambdas, cos_TR, sin_TR, heads, epsilon, interpret)


def fast_qkv_supported(device: jax.Device, dtype: DTypeLike, *, tokens: int, head_width: int) -> bool:
    """Whether `qkv_to_heads` takes `implementation="fast"` on `device` for these sizes."""
    return on_hopper(device) and _not_fast(dtype, tokens, head_width) is None


def _plain(
    qkv_TM: Array,
    scale_T: Array,
    value_embedding_TC: Array | None,
    lambdas: Array,
    cos_TR: Array,
    sin_TR: Array,
    heads: int,
    epsilon: float,
) -> Heads:
    length, dtype = qkv_TM.shape[0], qkv_TM.dtype
    scaled_TM = qkv_TM.astype(jnp.float32) * scale_T[:, None]
    q_THK, k_THK, v_THK = (x_TC.reshape(length, heads, -1) for x_TC in jnp.split(scaled_TM, 3, axis=1))
    cos, sin = cos_TR[:, None], sin_TR[:, None]

    def normed_and_rotated(y_THK: Array) -> Array:
        n_THK = y_THK * lax.rsqrt(jnp.mean(y_THK * y_THK, axis=-1, keepdims=True) + epsilon)
        first, second = jnp.split(n_THK, 2, axis=-1)
        return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)

    v_THK = lambdas[0] * v_THK
    if value_embedding_TC is not None:
        v_THK = v_THK + lambdas[1] * value_embedding_TC.astype(jnp.float32).reshape(v_THK.shape)
    return normed_and_rotated(q_THK).astype(dtype), normed_and_rotated(k_THK).astype(dtype), v_THK.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _fast(
    qkv_TM: Array,
    scale_T: Array,
    value_embedding_TC: Array | None,
    lambdas: Array,
    cos_TR: Array,
    sin_TR: Array,
    heads: int,
    epsilon: float,
    interpret: bool,
) -> Heads:
    # Imported when used: Pallas' GPU backend is not part of every jaxlib.
    from .qkv_hopper import forward

    return forward(
        qkv_TM, scale_T, value_embedding_TC, lambdas, cos_TR, sin_TR, heads=heads, epsilon=epsilon, interpret=interpret
    )


type Saved = tuple[Array, Array, Array | None, Array, Array, Array]


def _fast_forward(
    qkv_TM: Array,
    scale_T: Array,
    value_embedding_TC: Array | None,
    lambdas: Array,
    cos_TR: Array,
    sin_TR: Array,
    heads: int,
    epsilon: float,
    interpret: bool,
) -> tuple[Heads, Saved]:
    inputs = (qkv_TM, scale_T, value_embedding_TC, lambdas, cos_TR, sin_TR)
    return _fast(*inputs, heads, epsilon, interpret), inputs


def _fast_backward(
    heads: int, epsilon: float, interpret: bool, saved: Saved, d_heads: Heads
) -> tuple[Array, Array, Array | None, Array, None, None]:
    from .qkv_hopper import backward

    del heads
    dq_THK, dk_THK, dv_THK = d_heads
    gradients = backward(dq_THK, dk_THK, dv_THK, *saved, epsilon=epsilon, interpret=interpret)
    parts_T = gradients.value_T, gradients.embedding_T
    d_lambdas = jnp.stack([jnp.float32(0) if part_T is None else jnp.sum(part_T) for part_T in parts_T])
    return gradients.qkv_TM, gradients.scale_T, gradients.value_embedding_TC, d_lambdas, None, None


_fast.defvjp(_fast_forward, _fast_backward)


def _not_fast(dtype: DTypeLike, tokens: int, head_width: int) -> str | None:
    """What keeps the fast path from these inputs, if anything does."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"bfloat16, got {jnp.dtype(dtype)}"
    from .qkv_hopper import unsupported_shape

    return unsupported_shape(tokens, head_width)


def _check(
    qkv_TM: Array,
    scale_T: Array,
    value_embedding_TC: Array | None,
    lambdas: Array,
    cos_TR: Array,
    sin_TR: Array,
    heads: int,
) -> None:
    length, channels = qkv_TM.shape[0], qkv_TM.shape[1] // 3
    if heads < 1 or qkv_TM.shape[1] % (6 * heads):
        raise ValueError(f"qkv must be (T, 3 H K) with K even, got {qkv_TM.shape} for {heads} heads; check `heads`")
    angles = (length, channels // heads // 2)
    for name, array, shape, dtype in (
        ("scale", scale_T, (length,), jnp.float32),
        ("value_embedding", value_embedding_TC, (length, channels), None),
        ("lambdas", lambdas, (2,), jnp.float32),
        ("cos", cos_TR, angles, jnp.float32),
        ("sin", sin_TR, angles, jnp.float32),
    ):
        if array is not None and (array.shape != shape or dtype not in (None, array.dtype)):
            wanted = f"{shape} {jnp.dtype(dtype)}" if dtype else f"{shape}"
            raise ValueError(
                f"{name} must be {wanted} for qkv {qkv_TM.shape} and {heads} heads, got {array.shape} {array.dtype}"
            )
