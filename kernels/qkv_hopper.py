"""The fast path of `qkv_to_heads` on Hopper GPUs: one pass over memory forward, one backward.

A program is one warpgroup that owns a few tokens and walks over the heads.
Threads share nothing but the sums of a row, so all stays in registers, without
shared memory or barriers. A head is read and written in halves, because rotary
pairs their channels: a pair then lies in one thread.

    a half, K = 128     token 0 | lane 0 | lane 1 | ... | lane 7 |     16 bytes a lane
                        token 1 | lane 8 | lane 9 | ...

Several programs on each multiprocessor, with several loads each on their way,
hide the memory's latency.

Backward, with y = r z (r the scale of the row), n = y s, s = 1 / rms(y), and g the gradient
of n (that of q or k, rotated back):

    A = sum_K g z        dz = r s (g - n mean_K(g n))       mean_K(g n) = r s A / K
                         dr = s A (1 - mean_K(n^2)) = eps s^3 A

In the last step mean_K(n^2) = 1 - eps s^2; so written, nothing cancels.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_ops import Ref

type Halves = Sequence[Array]  # two tiles (rows, K / 2)

HEAD_WIDTHS = (64, 128)
TOKENS = 32  # T must be a multiple of it; a program owns 16 or 32
WARPS, LANES = 4, 128
VECTOR = 8  # channels in the 16 bytes of a lane


class QkvGradients(NamedTuple):
    """What the backward pass writes; `value_T` and `embedding_T` are a token's part of the gradient of lambdas."""

    qkv_TM: Array
    scale_T: Array
    value_T: Array
    value_embedding_TC: Array | None = None
    embedding_T: Array | None = None


def unsupported_shape(tokens: int, head_width: int) -> str | None:
    """What keeps the kernels from a shape, if anything does."""
    if tokens % TOKENS:
        return f"T a multiple of {TOKENS}, got {tokens}"
    return None if head_width in HEAD_WIDTHS else f"K of {' or '.join(map(str, HEAD_WIDTHS))}, got {head_width}"


def store(ref: Ref, value: Array) -> None:
    """Newer JAX refuses parts of a cache line unless told that they are meant; 0.11 has no way to tell it."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


class _Rows:
    """The rows of one program: where they are, how registers hold them, how they move."""

    def __init__(self, half: int):
        self.width, self.half = 2 * half, half
        self.count = _rows_of_a_program(half)
        # Tiles of a warp, in them a vector for each lane; the rest counts the dimensions that come of it from the end.
        tiling = plgpu.Tiling(((self.count, half), (self.count // WARPS, half), (VECTOR,)))
        self.layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
        self.row_layout = self.layout.reduce(1)
        self.own = pl.ds(lax.axis_index("program") * self.count, self.count)

    def load(self, ref: Ref, *index: Any) -> Array:
        return plgpu.load(ref.at[(self.own, *index)], layout=self.layout, optimized=False)

    def load_scalars(self, ref: Ref) -> Array:
        """One value a row."""
        return plgpu.load(ref.at[self.own], layout=self.row_layout, optimized=False)

    def load_head(self, ref: Ref, *index: Any) -> list[Array]:
        """As it lies in memory: narrow, so that much can be on its way before any is used."""
        return [self.load(ref, *index, i) for i in range(2)]

    def store_head(self, ref: Ref, halves: Halves, *index: Any) -> None:
        for i, half in enumerate(halves):
            store(ref.at[(self.own, *index, i)], half.astype(ref.dtype))

    def store_scalars(self, ref: Ref, value: Array) -> None:
        store(ref.at[self.own], value)

    def zeros(self) -> Array:
        return plgpu.layout_cast(jnp.zeros(self.count, jnp.float32), self.row_layout)

    def spread(self, value: Array) -> Array:
        return lax.broadcast_in_dim(value, (self.count, self.half), [0])

    def times(self, halves: Halves, value: Array) -> list[Array]:
        """float32 halves times one value a row."""
        factor = self.spread(value)
        return [half * factor for half in halves]

    def inverse_rms(self, y: Halves, epsilon: float) -> Array:
        return lax.rsqrt(dot(y, y) * (1 / self.width) + epsilon)


def dot(a: Halves, b: Halves) -> Array:
    """The inner product of every row."""
    first, second = (x * y for x, y in zip(a, b, strict=True))
    return (first + second).sum(axis=1)


def wide(halves: Halves) -> list[Array]:
    return [half.astype(jnp.float32) for half in halves]


def rotate(x: Halves, cos: Array, sin: Array) -> list[Array]:
    """By the angle; with -sin, back."""
    return [x[0] * cos + x[1] * sin, x[1] * cos - x[0] * sin]


def _rows_of_a_program(half: int) -> int:
    return LANES * VECTOR // half


@functools.partial(jax.jit, static_argnames=("heads", "epsilon", "interpret"))  # lowered once, not once a layer
def forward(
    qkv_TM: Array, scale_T: Array, value_embedding_TC: Array | None, lambdas: Array, cos_TR: Array, sin_TR: Array,
    *, heads: int, epsilon: float, interpret: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """q, k and v, each (T, H, K) bf16."""
    length, half = qkv_TM.shape[0], cos_TR.shape[1]
    embeddings = [] if value_embedding_TC is None else [value_embedding_TC.reshape(length, heads, 2, half)]
    mixes = len(embeddings)

    def body(qkv: Ref, scale: Ref, lambdas: Ref, cos: Ref, sin: Ref, *rest: Ref) -> None:
        embedding, (q_out, k_out, v_out) = rest[:mixes], rest[mixes:]
        rows = _Rows(half)
        r, cos_tile, sin_tile = rows.load_scalars(scale), rows.load(cos), rows.load(sin)

        @pl.loop(0, heads)
        def _head(head: Array) -> None:
            # All loads before the first store, which none could overtake.
            *query_and_key, value = [rows.load_head(qkv, part, head) for part in range(3)]
            value_embedding = [rows.load_head(ref, head) for ref in embedding]
            for out, z in zip((q_out, k_out), query_and_key, strict=True):
                y = rows.times(wide(z), r)
                n = rows.times(y, rows.inverse_rms(y, epsilon))
                rows.store_head(out, rotate(n, cos_tile, sin_tile), head)
            v = rows.times(wide(value), r * lambdas[0])
            if mixes:
                weight = lambdas[1]
                v = [x + weight * y for x, y in zip(v, wide(value_embedding[0]), strict=True)]
            rows.store_head(v_out, v, head)

    out = (jax.ShapeDtypeStruct((length, heads, 2, half), qkv_TM.dtype),) * 3
    operands = (qkv_TM.reshape(length, 3, heads, 2, half), scale_T, lambdas, cos_TR, sin_TR, *embeddings)
    q, k, v = _launch(body, "qkv_to_heads_forward", out, length, half, interpret)(*operands)
    return q.reshape(length, heads, -1), k.reshape(length, heads, -1), v.reshape(length, heads, -1)


@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
def backward(
    dq_THK: Array, dk_THK: Array, dv_THK: Array, qkv_TM: Array, scale_T: Array, value_embedding_TC: Array | None,
    lambdas: Array, cos_TR: Array, sin_TR: Array, *, epsilon: float, interpret: bool,
) -> QkvGradients:  # fmt: skip
    """Gradients of `forward`, those of qkv and of the value embedding in bf16, the rest in float32."""
    length, heads, half = *dq_THK.shape[:2], cos_TR.shape[1]
    by_half = (length, heads, 2, half)
    embeddings = [] if value_embedding_TC is None else [value_embedding_TC.reshape(by_half)]
    mixes = len(embeddings)

    def body(
        dq: Ref, dk: Ref, dv: Ref, qkv: Ref, scale: Ref, lambdas: Ref, cos: Ref, sin: Ref, *rest: Ref
    ) -> None:  # fmt: skip
        embedding, (d_qkv, d_scale, d_value, *d_mixing) = rest[:mixes], rest[mixes:]
        rows = _Rows(half)
        r, cos_tile, back_tile = rows.load_scalars(scale), rows.load(cos), -rows.load(sin)
        value_weight, embedding_weight = r * lambdas[0], lambdas[1]

        def head(head: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_scale_sum, value_sum, embedding_sum = sums
            # All loads before the first store, which none could overtake.
            *query_and_key, value = [
                (rows.load_head(gradient, head), rows.load_head(qkv, part, head))
                for part, gradient in enumerate((dq, dk, dv))
            ]
            value_embedding = [rows.load_head(ref, head) for ref in embedding]
            for part, (g, z) in enumerate(query_and_key):
                g, z = rotate(wide(g), cos_tile, back_tile), wide(z)
                y = rows.times(z, r)
                s, gz = rows.inverse_rms(y, epsilon), dot(g, z)
                along = rows.spread(r * s * s * gz * (1 / rows.width))
                across = [a - b * along for a, b in zip(g, y, strict=True)]
                rows.store_head(d_qkv, rows.times(across, r * s), part, head)
                d_scale_sum += epsilon * s * s * s * gz
            g, z = wide(value[0]), value[1]
            value_sum += dot(g, wide(z))
            rows.store_head(d_qkv, rows.times(g, value_weight), 2, head)
            if mixes:
                embedding_sum += dot(g, wide(value_embedding[0]))
                rows.store_head(d_mixing[0], [embedding_weight * x for x in g], head)
            return d_scale_sum, value_sum, embedding_sum

        d_scale_sum, value_sum, embedding_sum = lax.fori_loop(0, heads, head, (rows.zeros(),) * 3)
        rows.store_scalars(d_scale, d_scale_sum + lambdas[0] * value_sum)
        rows.store_scalars(d_value, r * value_sum)
        if mixes:
            rows.store_scalars(d_mixing[1], embedding_sum)

    token = jax.ShapeDtypeStruct((length,), jnp.float32)
    out = [jax.ShapeDtypeStruct((length, 3, heads, 2, half), qkv_TM.dtype), token, token]
    out += [jax.ShapeDtypeStruct(by_half, qkv_TM.dtype), token] * mixes
    operands = [x.reshape(by_half) for x in (dq_THK, dk_THK, dv_THK)]
    operands += [qkv_TM.reshape(out[0].shape), scale_T, lambdas, cos_TR, sin_TR, *embeddings]
    run = _launch(body, "qkv_to_heads_backward", tuple(out), length, half, interpret)
    d_qkv, d_scale_T, value_T, *mixing = run(*operands)
    if mixes:
        mixing = [mixing[0].reshape(length, -1), mixing[1]]
    return QkvGradients(d_qkv.reshape(length, -1), d_scale_T, value_T, *mixing)


def _launch(body: Any, name: str, out_type: Any, length: int, half: int, interpret: bool) -> Any:
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(length // _rows_of_a_program(half),),
        grid_names=("program",),
        kernel_name=name,
        # Nothing is read after it was written, and nothing is in shared memory: no barrier is needed.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
