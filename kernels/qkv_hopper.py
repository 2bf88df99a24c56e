"""The fast path of `project_heads` on Hopper GPUs: products that norm and rotate in registers, one pass backward.

Forward, product_hopper.py multiplies. A warpgroup's tile of 256 columns is two heads, and a thread holds both channels
of a pair, in two parts of 64: the sum of a head's squares is all that threads tell each other.

Backward, with y = r z (r the scale of the row), n = y s, s = 1 / rms(y), q = rotate(n), and g the gradient of q:

    dz = r s rotate_back(g - q mean_K(g q))

as rotation leaves inner products alone. So z is not needed: r s comes from the forward pass, a number a head and token.
The gradient of r goes along x, where powers of r cancel:

    dr = sum_heads s^2 epsilon g.q / r + (dv.v - lambda_1 dv.ve) / r
    dx = -dr r^3 x / D + ..
       = -(epsilon sum_heads (r s)^2 g.q + r^2 (dv.v - lambda_1 dv.ve)) x / D + ..

From a norm only epsilon's part is left, 1 - mean_K(n^2) = epsilon s^2; so written, nothing cancels there. v is known as
it was rounded: where the value embedding outweighs the product, so does its rounding.

In this pass a program is one warpgroup that owns 16 tokens and walks over the heads. Threads share nothing but the sums
of a row, so all stays in registers, without shared memory or barriers. A head is read and written in halves:

    a half      token 0 | lane 0 | lane 1 | ... | lane 7 |     16 bytes a lane
                token 1 | lane 8 | lane 9 | ...

Several programs on each multiprocessor, with several loads each on their way, hide the memory's latency.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .attention_hopper_ops import Ref, rows
from .product_hopper import CONFIG, HALF, PART, ROWS, Config, Epilogue, Values, product

type Halves = Sequence[Array]  # two tiles (rows, K / 2)

HEAD_WIDTH = 2 * PART
ROTATED = HEAD_WIDTH // 4  # pairs that rotate: channel i < 32 of a half with channel i of the other
WARPS, LANES = 4, 128
VECTOR = 8  # channels in the 16 bytes of a lane
TOKENS = LANES * VECTOR // PART  # that a program of the backward pass owns


class HeadGradients(NamedTuple):
    """What the backward pass writes.

    `qkv_TM`: of the products, M = 3 C: q, k, and v before its scale and after lambda_0. `along_x_T`: what of the
    gradient of x is a multiple of x. `embedding_T`: a token's part of the gradient of lambda_1.
    """

    qkv_TM: Array
    along_x_T: Array
    value_embedding_TC: Array | None = None
    embedding_T: Array | None = None


def unsupported_shape(tokens: int, width: int, channels: int, head_width: int, rotated: int) -> str | None:
    """What keeps the kernels from a shape, if anything does."""
    for what, size, multiple in (("T", tokens, ROWS), ("D", width, CONFIG.columns), ("C", channels, CONFIG.columns)):
        if size % multiple or not size:
            return f"{what} a multiple of {multiple}, got {size}"
    for what, size, only in (("K", head_width, HEAD_WIDTH), ("R", rotated, ROTATED)):
        if size != only:
            return f"{what} = {only}, got {size}"
    return None


@functools.partial(jax.jit, static_argnames=("epsilon", "config", "interpret"))  # lowered once, not once a layer
def rotary_product(
    x_TD: Array, w_CD: Array, scale_T: Array, cos_TR: Array, sin_TR: Array,
    *, epsilon: float, config: Config = CONFIG, interpret: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """rotate(norm(y)) of the heads of y = r x W^T, (T, C) bf16, and r / rms(y), (H, T) float32.

    Args:
      x_TD, w_CD: bf16; shapes as `unsupported_shape` says.
      scale_T: r, float32.
      cos_TR, sin_TR: float32, R = K / 4.
      epsilon: added to the mean square of y.
    """

    def finish(z: Values, scale: Values, angles: Values, _: Values) -> tuple[Values, Values]:
        (r,), (cos, sin) = scale, angles
        squares = (z[0] * z[0] + z[1] * z[1]).sum(axis=1)
        factor = r * lax.rsqrt(r * r * squares * (1 / HEAD_WIDTH) + epsilon)
        n = [part * rows(factor, (HALF, PART)) for part in z]
        turned = rotate([part[:, :ROTATED] for part in n], cos, sin)
        return [jnp.concatenate([t, part[:, ROTATED:]], axis=1) for t, part in zip(turned, n, strict=True)], [factor]

    epilogue = Epilogue(finish, rows=[scale_T], narrow=[cos_TR, sin_TR], unit=HEAD_WIDTH // PART, row_results=1)
    heads_TC, factor_HT = product("rotary_product", x_TD, w_CD, epilogue, config=config, interpret=interpret)
    return heads_TC, factor_HT


def rotate(x: Halves, cos: Array, sin: Array) -> list[Array]:
    """By the angle; with -sin, back."""
    return [x[0] * cos + x[1] * sin, x[1] * cos - x[0] * sin]


def store(ref: Ref, value: Array) -> None:
    """Newer JAX refuses parts of a cache line unless told that they are meant; 0.11 has no way to tell it."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


class _Rows:
    """The rows of one program of the backward pass: where they are, how registers hold them, how they move."""

    def __init__(self) -> None:
        # Tiles of a warp, in them a vector for each lane; the rest counts the dimensions that come of it from the end.
        tiling = plgpu.Tiling(((TOKENS, PART), (TOKENS // WARPS, PART), (VECTOR,)))
        self.layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
        self.row_layout = self.layout.reduce(1)
        self.own = pl.ds(lax.axis_index("program") * TOKENS, TOKENS)

    def load(self, ref: Ref, *index: Any) -> Array:
        return plgpu.load(ref.at[(self.own, *index)], layout=self.layout, optimized=False)

    def load_scalars(self, ref: Ref, *index: Any) -> Array:
        """One value a row."""
        return plgpu.load(ref.at[(*index, self.own)], layout=self.row_layout, optimized=False)

    def load_head(self, ref: Ref, *index: Any) -> list[Array]:
        """As it lies in memory: narrow, so that much can be on its way before any is used."""
        return [self.load(ref, *index, i) for i in range(2)]

    def store_head(self, ref: Ref, halves: Halves, *index: Any) -> None:
        for i, half in enumerate(halves):
            store(ref.at[(self.own, *index, i)], half.astype(ref.dtype))

    def store_scalars(self, ref: Ref, value: Array) -> None:
        store(ref.at[self.own], value)

    def zeros(self) -> Array:
        return plgpu.layout_cast(jnp.zeros(TOKENS, jnp.float32), self.row_layout)


def dot(a: Halves, b: Halves) -> Array:
    """The inner product of every row."""
    first, second = (x * y for x, y in zip(a, b, strict=True))
    return (first + second).sum(axis=1)


def wide(halves: Halves) -> list[Array]:
    return [half.astype(jnp.float32) for half in halves]


def times(halves: Halves, value: Array) -> list[Array]:
    """float32 halves times one value a row."""
    factor = rows(value, (TOKENS, PART))
    return [half * factor for half in halves]


@functools.partial(jax.jit, static_argnames=("width", "epsilon", "interpret"))
def backward(
    d_heads: Sequence[Array], heads: Sequence[Array], factors: Sequence[Array], scale_T: Array,
    value_embedding_TC: Array | None, lambdas: Array, cos_TR: Array, sin_TR: Array,
    *, width: int, epsilon: float, interpret: bool,
) -> HeadGradients:  # fmt: skip
    """Gradients of what the products give, and of the value embedding, in bf16; the rest in float32.

    Args:
      d_heads, heads: of q, k and v, and these, (T, H, K) bf16.
      factors: of q and k, (H, T): what `rotary_product` returns second.
      value_embedding_TC: bf16 or None.
      width: D.
    """
    length, count = heads[0].shape[:2]
    by_half = (length, count, 2, PART)
    embeddings = [] if value_embedding_TC is None else [value_embedding_TC.reshape(by_half)]
    mixes = len(embeddings)
    # A lane's vectors are either rotated or not; angles of 0 keep all of them alike.
    still = ((0, 0), (0, PART - ROTATED))
    angles = jnp.pad(cos_TR, still, constant_values=1), jnp.pad(sin_TR, still)

    def body(
        dq: Ref, dk: Ref, dv: Ref, q: Ref, k: Ref, v: Ref, q_factor: Ref, k_factor: Ref, scale: Ref, lambdas: Ref,
        cos: Ref, sin: Ref, *rest: Ref,
    ) -> None:  # fmt: skip
        embedding, (d_qkv, along_x, *d_mixing) = rest[:mixes], rest[mixes:]
        own = _Rows()
        r, cos_tile, back_tile = own.load_scalars(scale), own.load(cos), -own.load(sin)
        embedding_weight = lambdas[1]

        def head(head: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            norm_sum, value_sum, embedding_sum = sums
            # All loads before the first store, which none could overtake.
            tiles = [[own.load_head(ref, head) for ref in pair] for pair in ((dq, q), (dk, k), (dv, v))]
            head_factors = [own.load_scalars(ref, head) for ref in (q_factor, k_factor)]
            value_embedding = [own.load_head(ref, head) for ref in embedding]
            for part, factor in enumerate(head_factors):
                g, n = map(wide, tiles[part])
                gn = dot(g, n)
                across = [a - b for a, b in zip(g, times(n, gn * (1 / HEAD_WIDTH)), strict=True)]
                own.store_head(d_qkv, times(rotate(across, cos_tile, back_tile), factor), part, head)
                norm_sum += factor * factor * gn
            g, value = map(wide, tiles[2])
            value_sum += dot(g, value)
            own.store_head(d_qkv, times(g, r), 2, head)
            if mixes:
                embedding_sum += dot(g, wide(value_embedding[0]))
                own.store_head(d_mixing[0], [embedding_weight * x for x in g], head)
            return norm_sum, value_sum, embedding_sum

        norm_sum, value_sum, embedding_sum = lax.fori_loop(0, count, head, (own.zeros(),) * 3)
        if mixes:
            value_sum -= embedding_weight * embedding_sum
            own.store_scalars(d_mixing[1], embedding_sum)
        own.store_scalars(along_x, (epsilon * norm_sum + r * r * value_sum) * (-1 / width))

    token = jax.ShapeDtypeStruct((length,), jnp.float32)
    out = [jax.ShapeDtypeStruct((length, 3, count, 2, PART), jnp.bfloat16), token]
    out += [jax.ShapeDtypeStruct(by_half, jnp.bfloat16), token] * mixes
    d_qkv, along_x_T, *mixing = plgpu.kernel(
        body,
        out_type=tuple(out),
        grid=(length // TOKENS,),
        grid_names=("program",),
        kernel_name="heads_backward",
        # Nothing is read after it was written, and nothing is in shared memory: no barrier is needed.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*(x.reshape(by_half) for x in (*d_heads, *heads)), *factors, scale_T, lambdas, *angles, *embeddings)
    if mixes:
        mixing = [mixing[0].reshape(length, -1), mixing[1]]
    return HeadGradients(d_qkv.reshape(length, -1), along_x_T, *mixing)
