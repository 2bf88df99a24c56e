"""From the residual stream to the heads that attention takes: products, norms, rotary angles, value mixing.

For every token and head, with z the head's channels of x W^T and r = 1 / rms(x) the token's scale:

    q = rotate(norm(r z_q))     k = rotate(norm(r z_k))     v = lambda_0 r z_v + lambda_1 value embedding

r is what lets the norm before the product stay out of memory: see residual.py. Rotary angles turn half of a head's
channels: with R = K / 4, channel i < R turns with i + K / 2, and the others stay as they are.

In plain JAX the merged product (T, 3 C) is written, and passes over it make q, k and v; backward there are as many. The
fast path has r, norms, angles and the mixing done by the kernels that multiply, and never writes a product:

    forward     q = rotate(norm(r x W_q^T))                       kernel     k alike
                v = r x (lambda_0 W_v)^T + lambda_1 embedding     kernel
    backward    d_qkv, of the products, from q, k and v           one pass
                dx = d_qkv W + dx past + (part through r) x       kernel     dW = d_qkv^T x    cuBLAS

W_v is multiplied by lambda_0 before it is rounded to bfloat16. So the gradient of lambda_0 is the inner product of two
matrices as large as W_v, and no array of T tokens is read for it.

Source: NanoGPT speedrun record of 16 January 2025, with PyTorch's RMS norm; the fusion is our own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from .paths import KernelPath, on_hopper
from .residual import known_inverse_rms, linear, weight_gradient

type Heads = tuple[Array, Array, Array]


def project_heads(
    x_TD: Array,
    scale_T: Array,
    qkv_3CD: Array,
    value_embedding_TC: Array | None,
    lambdas: Array,
    cos_TR: Array,
    sin_TR: Array,
    *,
    heads: int,
    epsilon: float,
    implementation: KernelPath = "plain",
    interpret: bool = False,
) -> tuple[Array, Heads]:
    """x itself, and q, k and v, each (T, H, K) in x's dtype, in which everything is multiplied.

    Use the x that is returned for what goes past attention: then backward, one kernel forms the sum of both gradients.

    Args:
      x_TD: the residual stream.
      scale_T: r, float32: `residual.inverse_rms` of x, known. Its gradient is part of x's.
      qkv_3CD: W of q, k and v, each stored (out, in), C = H K; its gradient has its dtype.
      value_embedding_TC: what is mixed into the values; None for nothing.
      lambdas: (2,) float32, the weights of value and value embedding.
      cos_TR, sin_TR: float32, of the rotary angles, R <= K / 2: channel i < R of a head is paired with i + K / 2.
        Constants: no gradient goes to them.
      heads: H.
      epsilon: added to the mean square of a head's q or k.
      implementation: `fast` is for bfloat16, K = 128, R = 32, T a multiple of 128, D and C of 256.
      interpret: run the kernels in Pallas' interpreter (any device, slow; for tests). It needs a CPU thread for each of
        a program's three warpgroups: set `jax_num_cpu_devices` to 8 on a small machine.

    Returns:
      Differentiable in x, W, value embedding and lambdas. Inside `shard_map`, switch off `check_vma` for `fast`:
      Pallas' GPU kernels do not carry it.

    Raises:
      ValueError: for shapes that do not fit together, or if `fast` does not support the dtype or a size.
    """
    if value_embedding_TC is not None:
        value_embedding_TC = value_embedding_TC.astype(x_TD.dtype)
    inputs = Inputs(x_TD, scale_T, qkv_3CD, value_embedding_TC, lambdas, *lax.stop_gradient((cos_TR, sin_TR)))
    _check(inputs, heads)
    if implementation == "plain":
        return x_TD, _plain(inputs, heads, epsilon)
    channels, width = qkv_3CD.shape[1:]
    reason = _not_fast(x_TD.dtype, x_TD.shape[0], width, channels, channels // heads, cos_TR.shape[1])
    if reason is not None:
        raise ValueError(f"the fast project_heads needs {reason}; use implementation='plain'")
    return _fast(inputs, epsilon, interpret)


def fast_heads_supported(
    device: jax.Device, dtype: DTypeLike, *, tokens: int, width: int, heads: int, head_width: int
) -> bool:
    """Whether `project_heads` takes `implementation="fast"` on `device` for these sizes, with R = K / 4."""
    return (
        on_hopper(device) and _not_fast(dtype, tokens, width, heads * head_width, head_width, head_width // 4) is None
    )


class Inputs(NamedTuple):
    """The arrays that `project_heads` takes."""

    x_TD: Array
    scale_T: Array
    qkv_3CD: Array
    value_embedding_TC: Array | None
    lambdas: Array
    cos_TR: Array
    sin_TR: Array


def _plain(inputs: Inputs, heads: int, epsilon: float) -> Heads:
    x_TD, scale_T, qkv_3CD, value_embedding_TC, lambdas, cos_TR, sin_TR = inputs
    length, dtype, rotated = x_TD.shape[0], x_TD.dtype, cos_TR.shape[1]
    qkv_TM = linear(x_TD, qkv_3CD.reshape(-1, x_TD.shape[1]))
    scaled_TM = qkv_TM.astype(jnp.float32) * known_inverse_rms(x_TD, scale_T)[:, None]
    q_THK, k_THK, v_THK = (y_TC.reshape(length, heads, -1) for y_TC in jnp.split(scaled_TM, 3, axis=1))
    cos, sin = cos_TR[:, None], sin_TR[:, None]

    def normed_and_rotated(y_THK: Array) -> Array:
        n_THK = y_THK * lax.rsqrt(jnp.mean(y_THK * y_THK, axis=-1, keepdims=True) + epsilon)
        (a, first), (b, second) = (jnp.split(half, [rotated], axis=-1) for half in jnp.split(n_THK, 2, axis=-1))
        return jnp.concatenate([a * cos + b * sin, first, b * cos - a * sin, second], axis=-1)

    v_THK = lambdas[0] * v_THK
    if value_embedding_TC is not None:
        v_THK = v_THK + lambdas[1] * value_embedding_TC.astype(jnp.float32).reshape(v_THK.shape)
    return normed_and_rotated(q_THK).astype(dtype), normed_and_rotated(k_THK).astype(dtype), v_THK.astype(dtype)


class Saved(NamedTuple):
    inputs: Inputs
    heads: Heads
    factors: tuple[Array, Array]  # of q and k, (H, T): r / rms(y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _fast(inputs: Inputs, epsilon: float, interpret: bool) -> tuple[Array, Heads]:
    return _fast_forward(inputs, epsilon, interpret)[0]


def _fast_forward(inputs: Inputs, epsilon: float, interpret: bool) -> tuple[tuple[Array, Heads], Saved]:
    # Imported when used: Pallas' GPU backend is not part of every jaxlib.
    from .qkv_hopper import HEAD_WIDTH, rotary_product
    from .residual_hopper import sum_product

    x_TD, scale_T, qkv_3CD, value_embedding_TC, lambdas, *angles = inputs
    q_CD, k_CD, v_CD = _weights(qkv_3CD, lambdas, x_TD.dtype)
    q_TC, q_factor_HT = rotary_product(x_TD, q_CD, scale_T, *angles, epsilon=epsilon, interpret=interpret)
    k_TC, k_factor_HT = rotary_product(x_TD, k_CD, scale_T, *angles, epsilon=epsilon, interpret=interpret)
    mixing = () if value_embedding_TC is None else ((jnp.broadcast_to(lambdas[1], scale_T.shape), value_embedding_TC),)
    v_TC, _ = sum_product(x_TD, v_CD, mixing, scale_T, interpret=interpret)
    q_THK, k_THK, v_THK = (y_TC.reshape(y_TC.shape[0], -1, HEAD_WIDTH) for y_TC in (q_TC, k_TC, v_TC))
    heads = q_THK, k_THK, v_THK
    return (x_TD, heads), Saved(inputs, heads, (q_factor_HT, k_factor_HT))


def _fast_backward(epsilon: float, interpret: bool, saved: Saved, gradients: tuple[Array, Heads]) -> tuple[Inputs]:
    from .qkv_hopper import backward
    from .residual_hopper import sum_product

    x_TD, scale_T, qkv_3CD, *rest = saved.inputs
    lambdas = saved.inputs.lambdas
    dx_past_TD, d_heads = gradients
    found = backward(
        d_heads, saved.heads, saved.factors, scale_T, *rest, width=x_TD.shape[1], epsilon=epsilon, interpret=interpret
    )
    weight_DM = _weights(qkv_3CD, lambdas, x_TD.dtype).reshape(-1, x_TD.shape[1]).T
    terms = (None, dx_past_TD), (found.along_x_T, x_TD)
    dx_TD, _ = sum_product(found.qkv_TM, weight_DM, terms, interpret=interpret)
    # In v's third of lambda_0 W_v, not yet of W_v.
    d_weights_3CD = weight_gradient(found.qkv_TM, x_TD, jnp.float32).reshape(qkv_3CD.shape)
    d_lambdas = jnp.stack([
        jnp.sum(d_weights_3CD[2] * qkv_3CD[2].astype(jnp.float32)),
        jnp.float32(0) if found.embedding_T is None else jnp.sum(found.embedding_T),
    ])  # fmt: skip
    constant = jnp.zeros_like(saved.inputs.cos_TR)
    return (
        Inputs(
            x_TD=dx_TD,
            scale_T=jnp.zeros_like(scale_T),
            qkv_3CD=(_per_matrix(lambdas) * d_weights_3CD).astype(qkv_3CD.dtype),
            value_embedding_TC=found.value_embedding_TC,
            lambdas=d_lambdas,
            cos_TR=constant,
            sin_TR=constant,
        ),
    )


_fast.defvjp(_fast_forward, _fast_backward)


def _per_matrix(lambdas: Array) -> Array:
    """1, 1 and lambda_0, to multiply a (3, C, D) array."""
    return jnp.ones(3, jnp.float32).at[2].set(lambdas[0])[:, None, None]


def _weights(qkv_3CD: Array, lambdas: Array, dtype: DTypeLike) -> Array:
    """W_q, W_k and lambda_0 W_v, rounded once."""
    return (_per_matrix(lambdas) * qkv_3CD.astype(jnp.float32)).astype(dtype)


def _not_fast(dtype: DTypeLike, tokens: int, width: int, channels: int, head_width: int, rotated: int) -> str | None:
    """What keeps the fast path from these inputs, if anything does."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"bfloat16, got {jnp.dtype(dtype)}"
    from .qkv_hopper import unsupported_shape

    return unsupported_shape(tokens, width, channels, head_width, rotated)


def _check(inputs: Inputs, heads: int) -> None:
    x_TD, scale_T, qkv_3CD, value_embedding_TC, lambdas, cos_TR, sin_TR = inputs
    if x_TD.ndim != 2 or qkv_3CD.ndim != 3 or qkv_3CD.shape[::2] != (3, x_TD.shape[1]):
        raise ValueError(
            f"project_heads needs x (T, D) and weights (3, C, D), got {x_TD.shape} and {qkv_3CD.shape}; "
            "for more sequences, vmap the plain one or join their tokens"
        )
    length, channels = x_TD.shape[0], qkv_3CD.shape[1]
    if heads < 1 or channels % (2 * heads):
        raise ValueError(f"C must be H K with K even, got C = {channels} for {heads} heads; check `heads`")
    if cos_TR.ndim != 2 or cos_TR.shape[1] > channels // heads // 2:
        raise ValueError(
            f"cos must be (T, R) with R <= K / 2, the pairs of a head, got {cos_TR.shape} for K = {channels // heads}"
        )
    for name, array, shape, dtype in (
        ("scale", scale_T, (length,), jnp.float32),
        ("value_embedding", value_embedding_TC, (length, channels), None),
        ("lambdas", lambdas, (2,), jnp.float32),
        ("cos", cos_TR, (length, cos_TR.shape[1]), jnp.float32),
        ("sin", sin_TR, cos_TR.shape, jnp.float32),
    ):
        if array is not None and (array.shape != shape or dtype not in (None, array.dtype)):
            wanted = f"{shape} {jnp.dtype(dtype)}" if dtype else f"{shape}"
            raise ValueError(
                f"{name} must be {wanted} for x {x_TD.shape} and weights {qkv_3CD.shape}, "
                f"got {array.shape} {array.dtype}"
            )
