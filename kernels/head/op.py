"""The language-model head and its loss: logits = 30 sigmoid(x W^T / 7.5), mean cross-entropy.

The logits of 65,536 tokens over a vocab of 50,304 fill 13 GB in float32, so they are
formed a chunk of tokens at a time and never kept. Training needs the gradient as
well, and everything it takes is at hand while a chunk's logits are: so the
forward pass forms it too, and the backward pass only scales it.

FP8: x and W are rounded to e4m3 (4 exponent bits, for precision) after scaling
by 2 and 32, the logit gradient to e5m2 (5 bits, for range). The scales are
static, from the record, which found them by looking at the distributions: x is
RMS-normalised, W stays small, and a token's logit gradient lies below 4. Its
scale is 2^13 per token, which is the record's 2^29 for a mean over 65,536.
"""

import functools
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from ..implementation import Implementation, check_ids, check_whole, choose, first_order, vary_together
from .numerics import CAP, GRADIENT_SCALE, TEMPERATURE, W_SCALE, X_SCALE, HeadPrecision

IGNORE_INDEX = -100
"""A target that asks for nothing, by PyTorch's convention: its token is in neither loss nor gradients."""

_CHUNK_TOKENS = {"cpu": 128}  # 26 MB of logits: near the size of a last-level cache
_CHUNK_TOKENS_ACCELERATOR = 8192  # 1.6 GB of logits in float32: few passes over the gradient's accumulator
_CHUNK_TOKENS_HOPPER = 32768  # half the additions to dW of 16384: 0.4 ms of 19.5 less, for 3.3 GB more


def fp8_supported(device: jax.Device) -> bool:
    """Whether `device` multiplies FP8 operands in hardware (NVIDIA, compute capability 8.9 or newer)."""
    capability = getattr(device, "compute_capability", None)
    return device.platform == "gpu" and capability is not None and float(capability) >= 8.9


def unsupported(precision: HeadPrecision, tokens: int, vocab_size: int, width: int) -> str | None:
    """Return what the Hopper kernels need of their arguments, None where they have it."""
    if precision != "fp8":
        return f"precision 'fp8', got {precision!r}"
    # Imported when used: Pallas' GPU backend is not part of every jaxlib.
    from . import hopper

    return hopper.unsupported(tokens, vocab_size, width)


def head_loss(
    x_TD: Array,
    head_VD: Array,
    targets_T: Array,
    precision: HeadPrecision,
    implementation: Implementation = "auto",
    *,
    chunk_tokens: int | None = None,
) -> Array:
    """Return the mean cross-entropy in nats of `targets_T` under the capped logits of x W^T.

    Args:
      x_TD: the normalised output of the last layer.
      head_VD: float32 weights, V padded.
      targets_T: ids in [0, V), or `IGNORE_INDEX`: the mean is over the other tokens, NaN over none.
      precision: see `HeadPrecision`.
      implementation: of the gradient; `hopper` is for `fp8` only. A loss that nobody differentiates is `xla`'s.
      chunk_tokens: at most so many tokens' logits exist at a time; by default what suits the device.

    Returns:
      A float32 scalar. Differentiable in `x_TD` and `head_VD`, with `hopper` once. A target that is neither makes it
      and its gradients NaN where only the device sees the targets. Inside `shard_map` it is the mean over a device's
      own tokens; the gradient of weights that devices share is summed over them, unless `check_vma` is off.

    Raises:
      ValueError: for shapes that do not fit together, no tokens, or targets that are neither ids nor `IGNORE_INDEX`;
        if `hopper` does not support the precision or a size, or does not run here.
    """
    x_TD, head_VD = jnp.asarray(x_TD), jnp.asarray(head_VD)
    _check_known(targets_T, head_VD.shape[0])
    targets_T = check_ids("head_loss", "targets", targets_T)
    _check(x_TD, head_VD, targets_T, precision)
    check_whole("head_loss", x_TD, head_VD, targets_T)
    sizes = x_TD.shape[0], *head_VD.shape
    implementation = choose(
        "head_loss", implementation, lambda: unsupported(precision, *sizes), arrays=(x_TD, head_VD, targets_T)
    )
    if chunk_tokens is None:
        chunk_tokens = _chunk_tokens(implementation)
    return _head_loss(*vary_together(x_TD, head_VD, targets_T), precision, implementation, chunk_tokens)


def head_logits(x_TD: Array, head_VD: Array, precision: HeadPrecision) -> Array:
    """Return the capped logits themselves, (T, V) float32. For sampling and tests: small T only."""
    x_TD, head_VD = jnp.asarray(x_TD), jnp.asarray(head_VD)
    _check_precision("head_logits", precision)
    z_TV = _logits(_operand(x_TD, precision, X_SCALE), _operand(head_VD, precision, W_SCALE), precision)
    return CAP * jax.nn.sigmoid(z_TV / TEMPERATURE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _head_loss(
    x_TD: Array,
    head_VD: Array,
    targets_T: Array,
    precision: HeadPrecision,
    implementation: Implementation,
    chunk_tokens: int,
) -> Array:
    del implementation
    chunks = _chunks(x_TD, targets_T, chunk_tokens)
    w_VD = _operand(head_VD, precision, W_SCALE)

    def chunk_loss(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        x_CD, targets_C = _counted(*chunk)
        z_CV = _logits(_operand(x_CD, precision, X_SCALE), w_VD, precision)
        return total + jnp.sum(_cross_entropy(z_CV, targets_C)[0]), None

    total, _ = lax.scan(chunk_loss, _zero_like(w_VD, *chunks), chunks)
    return total / x_TD.shape[0] * _of_counted(targets_T, head_VD.shape[0])


def _forward(
    x_TD: Array,
    head_VD: Array,
    targets_T: Array,
    precision: HeadPrecision,
    implementation: Implementation,
    chunk_tokens: int,
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    tokens, of_counted = x_TD.shape[0], _of_counted(targets_T, head_VD.shape[0])
    w_VD = _operand(head_VD, precision, W_SCALE)
    scales = (X_SCALE, W_SCALE, GRADIENT_SCALE) if precision.startswith("fp8") else (1.0, 1.0, 1.0)
    x_scale, w_scale, gradient_scale = scales
    differentiate, multiple = _differentiation(precision, implementation)

    def chunk_step(carry: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        total, d_head_VD = carry
        x_CD, targets_C = _counted(*chunk)
        x_CD = _operand(x_CD, precision, X_SCALE)
        loss_C, d_z_CV, d_z_VC = differentiate(x_CD, w_VD, targets_C)
        d_x_CD = _gradient_dot(d_z_CV, w_VD, precision, x_TD.dtype)
        d_head_VD = d_head_VD + _gradient_dot(d_z_VC, x_CD, precision, jnp.float32)
        return (total + jnp.sum(loss_C), d_head_VD), d_x_CD

    chunks = _chunks(x_TD, targets_T, chunk_tokens, multiple)
    zero = _zero_like(w_VD, *chunks)
    start = (zero, jnp.broadcast_to(zero, head_VD.shape))
    # A loop has the gradient of W in a place of its own, but cuBLAS adds its products up out of place: a copy a turn.
    few = chunks[1].shape[0] <= 2
    (total, d_head_VD), d_x = lax.scan(chunk_step, start, chunks, unroll=few)
    d_head_VD = d_head_VD / (gradient_scale * x_scale * tokens)
    # The scales are powers of two, so that this rounds nothing; T may be none.
    d_x_TD = d_x.reshape(x_TD.shape) / (gradient_scale * w_scale)
    return total / tokens * of_counted, (d_x_TD, d_head_VD.astype(head_VD.dtype), targets_T, of_counted)


def _backward(
    precision: HeadPrecision,
    implementation: Implementation,
    chunk_tokens: int,
    residuals: tuple[Array, Array, Array, Array],
    d_loss: Array,
) -> tuple[Array, Array, np.ndarray]:
    d_x_TD, d_head_VD, targets_T, of_counted = residuals  # gradients of the sum over tokens, and of their mean
    d_loss = d_loss * of_counted
    d_x_TD = (d_loss / d_x_TD.shape[0] * d_x_TD.astype(jnp.float32)).astype(d_x_TD.dtype)
    return d_x_TD, (d_loss * d_head_VD).astype(d_head_VD.dtype), np.zeros(targets_T.shape, jax.dtypes.float0)


_head_loss.defvjp(_forward, _backward)


def _differentiation(
    precision: HeadPrecision, implementation: Implementation
) -> tuple[Callable[[Array, Array, Array], tuple[Array, Array, Array]], int]:
    """Return what makes a chunk's losses and logit gradient, as (C, V) and (V, C), and what divides its chunks."""
    if implementation == "hopper":
        from .hopper import TOKENS, loss_and_logit_gradient

        def by_kernels(x_CD: Array, w_VD: Array, targets_C: Array) -> tuple[Array, Array, Array]:
            x_CD, w_VD = first_order("head_loss", (x_CD, w_VD))
            return loss_and_logit_gradient(x_CD, w_VD, targets_C)

        return by_kernels, TOKENS

    def differentiate(x_CD: Array, w_VD: Array, targets_C: Array) -> tuple[Array, Array, Array]:
        loss_C, d_z_CV = _cross_entropy(_logits(x_CD, w_VD, precision), targets_C)
        d_z_CV = _gradient_operand(d_z_CV, precision)
        return loss_C, d_z_CV, d_z_CV.T

    return differentiate, 1


def _cross_entropy(z_CV: Array, targets_C: Array) -> tuple[Array, Array]:
    """Return the loss of each token (C,) and its gradient in z (C, V), both float32, from uncapped logits."""

    def gate(z: Array) -> Array:
        return jax.nn.sigmoid(z.astype(jnp.float32) / TEMPERATURE)

    gate_CV = gate(z_CV)
    # Capped logits lie in (0, 30): exp(logit - 30) neither overflows nor vanishes, so no row maximum is needed.
    weights_CV = jnp.exp(CAP * gate_CV - CAP)
    total_C1 = jnp.sum(weights_CV, axis=-1, keepdims=True)
    # Picking the target's z by index saves a pass over the vocabulary.
    counts_C = targets_C >= 0
    target_z_C = jnp.take_along_axis(z_CV, jnp.where(counts_C, targets_C, 0)[:, None], axis=1)[:, 0]
    loss_C = jnp.where(counts_C, jnp.log(total_C1[:, 0]) + CAP - CAP * gate(target_z_C), 0)
    target_CV = jnp.arange(z_CV.shape[-1]) == targets_C[:, None]
    # As in the kernels: with an infinite total, a token that does not count has no weights, and no target.
    total_C1 = jnp.where(counts_C[:, None], total_C1, jnp.inf)
    d_logits_CV = weights_CV * (1 / total_C1) - target_CV
    return loss_C, d_logits_CV * (CAP / TEMPERATURE) * gate_CV * (1 - gate_CV)


def _of_counted(targets_T: Array, vocab_size: int) -> Array:
    """Return all tokens' share of those that count, of which means are: 1 if all do, NaN if a target is impossible."""
    tokens = targets_T.shape[0]
    count = jnp.sum(targets_T != IGNORE_INDEX)
    possible = jnp.all((targets_T == IGNORE_INDEX) | ((targets_T >= 0) & (targets_T < vocab_size)))
    share = jnp.where(count == tokens, 1.0, tokens / count.astype(jnp.float32))
    return jnp.where(possible & (count > 0), share, jnp.nan)


def _counted(x_CD: Array, targets_C: Array) -> tuple[Array, Array]:
    """Take out the x of tokens that do not count: their gradients are 0, and 0 x NaN would be NaN."""
    return jnp.where(targets_C[:, None] == IGNORE_INDEX, 0, x_CD), targets_C


def _zero_like(*arrays: Array) -> Array:
    """Return 0 as a float32 that varies over a mesh as all of these do: what a sum over chunks starts from."""
    return sum((jnp.sum(array[:0].astype(jnp.float32)) for array in arrays), jnp.float32(0))


def _check(x_TD: Array, head_VD: Array, targets_T: Array, precision: HeadPrecision) -> None:
    _check_precision("head_loss", precision)
    if x_TD.ndim != 2 or head_VD.ndim != 2 or x_TD.shape != (targets_T.shape[0], head_VD.shape[1]) or not x_TD.size:
        raise ValueError(
            f"head_loss needs x (T, D), weights (V, D) and targets (T,) with T at least 1, "
            f"got {x_TD.shape}, {head_VD.shape} and {targets_T.shape}"
        )


def _check_precision(op: str, precision: HeadPrecision) -> None:
    if precision not in get_args(HeadPrecision):
        raise ValueError(f"{op}: unknown precision {precision!r}; choose one of {', '.join(get_args(HeadPrecision))}")


def _check_known(targets_T: Array, vocab_size: int) -> None:
    """Refuse impossible targets where their values are here to be seen."""
    if isinstance(targets_T, jax.core.Tracer) or not getattr(targets_T, "is_fully_addressable", True):
        return
    values = np.asarray(targets_T)
    bad = values[(values != IGNORE_INDEX) & ((values < 0) | (values >= vocab_size))]
    if bad.size:
        raise ValueError(
            f"head_loss: targets must be ids in [0, {vocab_size}) or IGNORE_INDEX ({IGNORE_INDEX}), got {bad.flat[0]}"
        )


def _operand(values: Array, precision: HeadPrecision, scale: float) -> Array:
    if precision.startswith("fp8"):
        # From what `values` are. Through bfloat16, 3 % of float32 weights would fall on the other side of a tie.
        return (values * scale).astype(jnp.float8_e4m3fn)
    return values.astype(precision)


def _gradient_operand(d_z_CV: Array, precision: HeadPrecision) -> Array:
    if precision.startswith("fp8"):
        return (d_z_CV.astype(jnp.bfloat16) * GRADIENT_SCALE).astype(jnp.float8_e5m2)
    return d_z_CV.astype(precision)


def _logits(x_CD: Array, w_VD: Array, precision: HeadPrecision) -> Array:
    """Return x W^T with the scales taken out: bfloat16, as in the record, or float32 if `precision` is."""
    dtype = jnp.float32 if precision == "float32" else jnp.bfloat16
    z_CV = _dot(x_CD, w_VD, 1, precision, dtype, fast_accumulation=True)
    return z_CV / (X_SCALE * W_SCALE) if precision.startswith("fp8") else z_CV


def _gradient_dot(a: Array, b: Array, precision: HeadPrecision, dtype: DTypeLike) -> Array:
    return _dot(a, b, 0, precision, dtype, fast_accumulation=False)


def _dot(
    a: Array, b: Array, axis: int, precision: HeadPrecision, dtype: DTypeLike, *, fast_accumulation: bool
) -> Array:
    """Multiply operands already rounded, into `dtype`; a's second axis against `axis` of b.

    Tensor cores add FP8 products up in 14 bits or so. Without `fast_accumulation` these sums go to float32 every few
    products: a word's gradient is one large term for each time it is the target, and tens of thousands of small ones
    which 14 bits would lose. cuBLASLt does so where the highest precision is asked for. By its name
    (`DotAlgorithmPreset.ANY_F8_ANY_F8_F32`) it cannot be asked for: that name is lost where XLA partitions a program
    for several devices (jax 0.11.2), and sums are fast again.
    """
    a, b = _multiplicands(a, b, precision)
    return lax.dot_general(
        a,
        b,
        dimension_numbers=(((1,), (axis,)), ((), ())),
        precision=None if fast_accumulation and precision != "float32" else "highest",
        preferred_element_type=dtype,
    )


def _multiplicands(a: Array, b: Array, precision: HeadPrecision) -> tuple[Array, Array]:
    return (a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)) if precision == "fp8_emulated" else (a, b)


def _chunk_tokens(implementation: Implementation) -> int:
    if implementation == "hopper":
        return _CHUNK_TOKENS_HOPPER
    return _CHUNK_TOKENS.get(jax.default_backend(), _CHUNK_TOKENS_ACCELERATOR)


def _chunks(x_TD: Array, targets_T: Array, limit: int, multiple: int = 1) -> tuple[Array, Array]:
    """Cut tokens into equal chunks of at most `limit` tokens, and of a multiple of `multiple`, which divides T."""
    units = x_TD.shape[0] // multiple
    size = multiple * next(n for n in range(min(max(limit // multiple, 1), units), 0, -1) if units % n == 0)
    return x_TD.reshape(-1, size, x_TD.shape[1]), targets_T.reshape(-1, size)
