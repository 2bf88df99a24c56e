"""Self-attention against float64: xla's heads with bounds from their roundings, the whole by xla and by hopper.

hopper runs in Pallas' interpreter.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_speedrun.kernels.block_mask import BLOCK_SIZE, BlockMask
from jax_speedrun.kernels.implementation import choose, compiling_for_hopper, interpret_kernels
from jax_speedrun.kernels.layer.residual import rstd
from jax_speedrun.kernels.layer.self_attention import (
    Inputs,
    project_heads,
    self_attention,
    unsupported,
)
from jax_speedrun.kernels.masks import causal, same_document
from jax_speedrun.model import rotary
from tests.devices import B200, H100
from tests.marks import slow
from tests.numpy_attention import random_mask

EPSILON = 2.0**-23
SCALE = 0.12
BF16, F32 = 2.0**-8, 2.0**-24  # largest relative error of one rounding


class Sizes(NamedTuple):
    tokens: int = 128
    width: int = 256
    heads: int = 2
    head_width: int = 128
    rotated: int = 32


def inputs(case, sizes, dtype):
    """The arguments of `project_heads`, and gradients of x, q, k and v; the weights' values are bfloat16.

    Gradients have a part along what they are of: otherwise sums of their products would vanish among their terms.
    """
    tokens, width, heads, head_width, rotated = sizes
    rng = np.random.default_rng(len(case))

    def normal(*shape):
        return rng.standard_normal(shape)

    channels = heads * head_width
    x, embedding = normal(tokens, width), normal(tokens, channels)
    weights, lambdas = normal(3, channels, width) * width**-0.5, [0.7, -0.4]
    r = np.exp(0.5 * normal(tokens))
    angles = 100 * rng.random((tokens, rotated))
    if case == "lambda_0 = 0":
        lambdas[0] = 0
    if case == "huge":
        x, r = 1e15 * x, 1e-15 * r
    if case == "near epsilon":
        weights[:2] *= 3e-4
    if case == "tiny":
        x, r = 1e-12 * x, EPSILON**-0.5 * r
    if case == "zeros":
        x[::3], weights[0, :head_width], r[5] = 0, 0, 0
    x, weights, embedding = (jnp.asarray(a, dtype) for a in (x, weights, embedding))
    r, lambdas, cos, sin = (jnp.asarray(a, jnp.float32) for a in (r, lambdas, np.cos(angles), np.sin(angles)))
    weights = weights.astype(jnp.float32)
    embedding = None if case == "no value embedding" else embedding
    arguments = x, r, weights, embedding, lambdas, cos, sin
    results = formula(*float64(arguments), heads=heads)
    along = 0 if case == "zeros" else 0.5
    gradients = [normal(*a.shape) + along * a / np.sqrt(np.mean(a**2)) for a in (float64([x])[0], *results)]
    if case == "huge":
        gradients[0] *= 1e-15
    if case == "zeros":
        gradients[2][7] = 0
    return arguments, [jnp.asarray(a, dtype) for a in gradients]


def float64(arrays):
    return [None if a is None else np.asarray(a, np.float64) for a in arrays]


def formula(x, r, weights, embedding, lambdas, cos, sin, *, heads, xp=np):
    """q, k, v by the textbook: a pair of channels is a complex number, which rotary multiplies by exp(-i angle)."""
    turn = (cos - 1j * sin)[:, None]
    q, k, v = ((x @ w.T * r[:, None]).reshape(len(x), heads, -1) for w in weights)

    def normed_and_rotated(y):
        half, rotated = y.shape[-1] // 2, turn.shape[-1]
        y = y / xp.sqrt((y**2).mean(-1, keepdims=True) + EPSILON)
        pairs = y[..., :half] + 1j * y[..., half:]
        pairs = xp.concatenate([pairs[..., :rotated] * turn, pairs[..., rotated:]], axis=-1)
        return xp.concatenate([pairs.real, pairs.imag], axis=-1)

    mixed = lambdas[0] * v
    if embedding is not None:
        mixed = mixed + lambdas[1] * embedding.reshape(v.shape)
    return normed_and_rotated(q), normed_and_rotated(k), mixed


def truth(arguments, gradients, heads):
    """q, k, v, and the gradients of x, r, W, embedding and lambdas, in float64.

    r is the number that is given, and has the slope in x of 1 / sqrt(mean(x^2) + epsilon): -r^3 x / D.
    """
    with jax.enable_x64(True):
        x, r, *rest, cos, sin = (None if a is None else jnp.asarray(a) for a in float64(arguments))
        past, *d_heads = (jnp.asarray(a) for a in float64(gradients))

        def function(x, *rest):
            change = jnp.sum(x**2, axis=1) - jax.lax.stop_gradient(jnp.sum(x**2, axis=1))
            scale = r - r**3 * change / (2 * x.shape[1])
            return formula(x, scale, *rest, cos, sin, heads=heads, xp=jnp)

        @jax.jit
        def run(d_heads, *arguments):
            results, pull = jax.vjp(function, *arguments)
            return results, pull(d_heads)

        results, (dx, *d_rest) = run(tuple(d_heads), x, *rest)
        return float64(results), float64([dx + past, jnp.zeros_like(r), *d_rest])


def bounds(arguments, gradients, heads):
    """How far each result may be off: sums in float32, and in bfloat16 all that is rounded on the way."""
    x, r, weights, embedding, lambdas, _, _ = float64(arguments)
    past, *d_heads = (np.abs(a) for a in float64(gradients))
    rounding = BF16 if arguments[0].dtype == jnp.bfloat16 else F32
    tokens, width = x.shape
    r, (l0, l1) = r[:, None, None], np.abs(lambdas)
    size_x, size_w = np.abs(x), np.abs(weights)

    def by_head(a):
        return a.reshape(tokens, heads, -1)

    def pair(a):
        """The size of the pair that a channel may turn in."""
        return np.hypot(a, np.roll(a, a.shape[-1] // 2, axis=-1))

    def mean(a):
        return a.mean(-1, keepdims=True)

    results, d_z, d_z_off, along = [], [], [], 0
    for part, g in enumerate(d_heads[:2]):
        z, terms = by_head(x @ weights[part].T), by_head(size_x @ size_w[part].T)
        y, y_off = r * z, r * (width * F32 * terms + rounding * np.abs(z))  # xla rounds z
        s = 1 / np.sqrt(mean(y**2) + EPSILON)
        n = s * np.abs(y)
        s_off = s * mean(n * y_off) + 8 * F32  # relative
        n_off = s * y_off + n * s_off
        head_off = pair(n_off) + 8 * F32 * pair(n)
        results.append(head_off + rounding * pair(n))
        n, g, head_off = pair(n), pair(g), results[-1]
        gn, gn_off = mean(g * n), mean(g * head_off) + 64 * F32 * mean(g * n)
        d_z.append(r * s * (g + n * gn))
        d_z_off.append(d_z[-1] * (s_off + rounding + 16 * F32) + r * s * pair(head_off * gn + n * gn_off))
        # xla gets epsilon's part as the difference of two sums.
        along = along + (EPSILON * (r * s) ** 2 * (gn + gn_off) * n.shape[-1] * 2 * s_off).sum((1, 2))
        along = along + (EPSILON * (r * s) ** 2 * gn_off * n.shape[-1]).sum((1, 2))
        along = along + 64 * F32 * (r**2 * s * g * np.abs(y)).sum((1, 2))
    g = d_heads[2]
    z, terms = by_head(x @ weights[2].T), by_head(size_x @ size_w[2].T)
    z_off = width * F32 * terms + rounding * (terms + np.abs(z))  # hopper rounds lambda_0 W
    v_off, v = r * z_off * l0 + 8 * F32 * r * l0 * np.abs(z), r * l0 * np.abs(z)
    if embedding is not None:
        size = by_head(np.abs(embedding)) * l1
        v_off, v = v_off + 3 * rounding * size, v + size
    results.append(v_off + 2 * rounding * v)
    along = along + (r**2 * g * (results[-1] + 64 * F32 * v)).sum((1, 2))
    d_z.append(r * g)
    d_z_off.append(rounding * r * g)

    (d_z, d_z_off), factors = ([a.reshape(tokens, -1) for a in b] for b in (d_z, d_z_off)), (1, 1, l0)
    past_off = rounding * 2 * past
    # Along x: r^2 g v is what the value of it may be, as its rounding to bfloat16 is relative.
    along = (along + 4 * rounding * (r**2 * g * v).sum((1, 2)))[:, None] / width * size_x
    d_x = past_off + along
    for a, off, w, factor in zip(d_z, d_z_off, size_w, factors, strict=True):
        d_x = d_x + factor * (off @ w + (2 * rounding + 3 * a.shape[1] * F32) * (a @ w))
    d_w = [
        factor * (off.T @ size_x + (tokens * F32) * (a.T @ size_x))
        for a, off, factor in zip(d_z, d_z_off, factors, strict=True)
    ]
    d_lambdas = [(r * g * (z_off + (rounding + tokens * F32) * terms)).sum(), 0.0]
    d_embedding = None
    if embedding is not None:
        d_embedding = (2 * rounding * l1 * g).reshape(tokens, -1)
        d_lambdas[1] = 256 * F32 * (by_head(np.abs(embedding)) * g).sum()
    return results, [d_x, np.zeros(tokens), np.stack(d_w), d_embedding, np.asarray(d_lambdas)]


@functools.cache
def heads_runner(heads):
    def run(arguments, gradients):
        def function(*arguments):
            return project_heads(Inputs(*arguments), arguments[0].dtype, heads=heads, epsilon=EPSILON)

        results, pull = jax.vjp(function, *arguments)
        return results, pull(tuple(gradients))

    return jax.jit(run)


def assert_heads_close(case, sizes, dtype=jnp.bfloat16):
    arguments, (_, *gradients) = inputs(case, sizes, dtype)
    given = arguments, [jnp.zeros_like(arguments[0]), *gradients]
    heads, gradients_got = heads_runner(sizes.heads)(arguments, gradients)
    names = ("q", "k", "v"), ("dx", "d_scale", "d_weights", "d_embedding", "d_lambdas")
    # The bound lets every rounding err the same way. As they do not, they add up like their squares.
    share = 5**0.5 * BF16 if dtype == jnp.bfloat16 else 64 * F32
    expected = truth(*given, sizes.heads), bounds(*given, sizes.heads)
    for group in zip(names, (heads, gradients_got[:5]), *expected, strict=True):
        for name, result, want, off in zip(*group, strict=True):
            if want is None:
                assert result is None
                continue
            assert result.dtype == (jnp.float32 if name in ("d_scale", "d_weights", "d_lambdas") else dtype)
            error = np.abs(np.asarray(result, np.float64) - want)
            assert (error <= 1.05 * off + 1e-30).all(), (name, np.max(error / (off + 1e-30)))
            assert np.linalg.norm(error) <= share * np.linalg.norm(want), name


# The interpreter's first use changes a setting of JAX's, and then all is traced anew: a case that stands alone first.
CASES = ["no value embedding", "random", "lambda_0 = 0", "huge", "near epsilon", "tiny", "zeros"]


@pytest.mark.parametrize("case", CASES)
def test_heads_and_gradients_equal_float64(case):
    assert_heads_close(case, Sizes())


def attention_truth(arguments, gradients, visible, heads):
    """y and the gradients of x, W, embedding and lambdas, in float64, by JAX through the textbook's formulas."""
    with jax.enable_x64(True):
        x, r, *rest, cos, sin = (None if a is None else jnp.asarray(a) for a in float64(arguments))
        past, d_y = (jnp.asarray(a) for a in float64(gradients))

        def function(x, *rest):
            change = jnp.sum(x**2, axis=1) - jax.lax.stop_gradient(jnp.sum(x**2, axis=1))
            scale = r - r**3 * change / (2 * x.shape[1])
            q, k, v = formula(x, scale, *rest, cos, sin, heads=heads, xp=jnp)
            scores = jnp.where(visible, SCALE * jnp.einsum("thk,shk->hts", q, k), -1e30)
            weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0)  # a row that sees nothing gives 0
            return jnp.einsum("hts,shk->thk", weights, v).reshape(len(x), -1)

        y, pull = jax.jit(lambda *a: jax.vjp(function, *a))(x, *rest)
        dx, *d_rest = pull(d_y)
        return float64([y, dx + past, *d_rest])


@functools.cache
def runner(implementation, heads):
    options = {"heads": heads, "softmax_scale": SCALE, "epsilon": EPSILON, "implementation": implementation}

    def run(arguments, mask, gradients):
        function = functools.partial(self_attention, mask=mask, attention="xla", **options)
        results, pull = jax.vjp(function, *arguments)
        return results, pull(tuple(gradients))

    jitted = jax.jit(run)

    def interpreted(*arguments):
        with interpret_kernels():
            return jitted(*arguments)

    return interpreted


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        ("xla", "random"),
        ("hopper", "random"),
        *(slow(name, case) for name in ("xla", "hopper") for case in CASES if case != "random"),
    ],
)
def test_attention_and_gradients_equal_float64(implementation, case):
    sizes = Sizes(tokens=256)
    (x, r, *rest), (past, *_) = inputs(case, sizes, jnp.bfloat16)
    arguments = x, jnp.where(r == 0, 1, r), *rest  # an inverse RMS is positive
    rng = np.random.default_rng(3)
    mask, visible = random_mask(rng, sizes.tokens // BLOCK_SIZE, BLOCK_SIZE, 0.8)
    d_y = jnp.asarray(rng.standard_normal((sizes.tokens, sizes.heads * sizes.head_width)), jnp.bfloat16)
    (x, y), (dx, d_scale, d_weights, d_embedding, d_lambdas, d_cos, d_sin) = runner(implementation, sizes.heads)(
        arguments, mask, (past, d_y)
    )
    np.testing.assert_array_equal(x, arguments[0])
    for constant in (d_scale, d_cos, d_sin):
        assert not np.asarray(constant).any()
    want = attention_truth(arguments, (past, d_y), visible, sizes.heads)
    names = ("y", "dx", "d_weights", "d_embedding", "d_lambdas")
    for name, got, expected in zip(names, (y, dx, d_weights, d_embedding, d_lambdas), want, strict=True):
        if expected is None:
            assert got is None
            continue
        assert got.dtype == (jnp.float32 if name in ("d_weights", "d_lambdas") else jnp.bfloat16)
        error = np.linalg.norm(np.asarray(got, np.float64) - expected)
        # Some ten roundings in a row, each of 2^-8 at most; those of lambdas are sums of terms of both signs.
        share = 3e-2 if name == "d_lambdas" else 1.2e-2
        assert error <= share * np.linalg.norm(expected) + 1e-30, (name, error / np.linalg.norm(expected))


@pytest.mark.parametrize("implementation", ["xla", slow("hopper")])
def test_a_norm_sends_nothing_back_along_x(implementation):
    """However small attention's part of the gradient is beside what passes it by: see test_mlp.py.

    Each output is a mean of values, which are linear in the normed x. So for the gradient y, the values' part along x
    is |y|^2 in all, and the norm's takes it back.
    """
    sizes = Sizes(tokens=256)
    arguments, (past, *_) = inputs("random", sizes, jnp.bfloat16)
    x, _, weights, _, *rest = arguments
    arguments = x, rstd(x, EPSILON), weights, None, *rest
    mask, _ = random_mask(np.random.default_rng(3), sizes.tokens // BLOCK_SIZE, BLOCK_SIZE, 0.8)
    run = runner(implementation, sizes.heads)
    (_, y), _ = run(arguments, mask, (past, jnp.zeros((sizes.tokens, sizes.heads * sizes.head_width), jnp.bfloat16)))
    d_y = y * jnp.bfloat16(2.0**-9)
    (_, y), (dx, *_) = run(arguments, mask, (past, d_y))
    x, past, y, d_y, dx = float64((arguments[0], past, y, d_y, dx))
    rounding = BF16 * np.sqrt(np.mean(past**2) * np.sum(x**2))
    assert np.sum(d_y * y) > 20 * rounding
    assert abs(np.sum((dx - past) * x)) <= 3 * rounding


@pytest.mark.parametrize("rotated", [slow(0), 3, slow(4)])
def test_xla_takes_float32_narrow_heads_and_any_number_of_pairs(rotated):
    assert_heads_close("random", Sizes(24, 16, 3, 8, rotated), jnp.float32)


def test_the_model_turns_a_quarter_of_the_pairs_less_the_higher_their_channel():
    cos, sin = rotary(50, 128)
    angles = np.arange(50)[:, None] * 1024.0 ** (-np.arange(32) / 31)
    np.testing.assert_allclose(cos, np.cos(angles), atol=50 * 4 * F32)
    np.testing.assert_allclose(sin, np.sin(angles), atol=50 * 4 * F32)


def shapes(sizes, mixes=True):
    tokens, width, heads, head_width, rotated = sizes
    channels = heads * head_width
    arrays = [
        ((tokens, width), "bfloat16"),
        ((tokens,), "float32"),
        ((3, channels, width), "float32"),
        ((tokens, channels), "bfloat16"),
        ((2,), "float32"),
        *[((tokens, rotated), "float32")] * 2,
    ]
    arrays = [jax.ShapeDtypeStruct(*array) for array in arrays]
    return arrays if mixes else [*arrays[:3], None, *arrays[4:]]


def mask_shapes(tokens):
    blocks = tokens // BLOCK_SIZE
    counts, indices = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((blocks,), (blocks, blocks)))
    rule = jax.eval_shape(lambda ids: causal() & same_document(ids), jax.ShapeDtypeStruct((tokens,), jnp.int32))
    return BlockMask(counts, indices, counts, indices, rule, BLOCK_SIZE)


def call(*arguments, heads, implementation="hopper"):
    options = {"heads": heads, "softmax_scale": SCALE, "epsilon": EPSILON, "attention": "xla"}
    return self_attention(*arguments, implementation=implementation, **options)


def loss(*arguments, heads):
    return sum(a.astype(jnp.float32).sum() for a in call(*arguments, heads=heads))


@pytest.mark.slow
def test_hopper_lowers_for_cuda_at_full_size():
    """All but the last compiler, ptxas. Of the merged matmul and its gradient there is nothing."""
    run, arrays = functools.partial(loss, heads=6), [*shapes(Sizes(65536, 768, 6)), mask_shapes(65536)]
    gradient = jax.jit(jax.grad(run, (0, 2, 3, 4)))
    with compiling_for_hopper():
        text = gradient.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("matmul_norm_rotary", "matmul_add", "attention_dq", "attention_dkv"):
        assert kernel in text
    assert "tensor<65536x2304x" not in text


@pytest.mark.slow
def test_hopper_lowers_under_checkpoint_in_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def local_loss(*arguments):
        mask = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), mask_shapes(128))
        return jax.lax.psum(jax.checkpoint(functools.partial(loss, heads=2))(*arguments, mask), "data")

    def whole_loss(*arguments):
        specs = (P("data"), P("data"), P(), P(), P(), P("data"), P("data"))
        return jax.shard_map(local_loss, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(*arguments)

    gradient = jax.jit(jax.grad(whole_loss, (0, 2, 4)))
    with compiling_for_hopper():
        lowered = gradient.trace(*shapes(Sizes(256), mixes=False)).lower(lowering_platforms=("cuda",))
    assert "attention_dkv" in lowered.as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "hopper"])
def test_the_gradient_of_the_weights_has_their_dtype(implementation, dtype):
    arrays = [*shapes(Sizes()), mask_shapes(128)]
    arrays[2] = jax.ShapeDtypeStruct(arrays[2].shape, dtype)
    run = functools.partial(call, heads=2, implementation=implementation)
    gradient = jax.grad(lambda *a: run(*a)[1].astype(jnp.float32).sum(), 2)
    with compiling_for_hopper():
        assert jax.eval_shape(gradient, *arrays).dtype == jnp.dtype(dtype)


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({}, "float32", "bfloat16, got float32"),
        ({"tokens": 64}, "bfloat16", "T a multiple of 128, got 64"),
        ({"tokens": 0}, "bfloat16", "T a multiple of 128, got 0"),
        ({"width": 384}, "bfloat16", "D a multiple of 256, got 384"),
        ({"heads": 3}, "bfloat16", "C a multiple of 256, got 384"),
        ({"heads": 4, "head_width": 64}, "bfloat16", "K = 128, got 64"),
        ({"rotated": 64}, "bfloat16", "R = 32, got 64"),
    ],
)
def test_what_hopper_does_not_take_is_said(change, dtype, message):
    sizes = Sizes(**change)
    x, *rest = shapes(sizes)
    run = functools.partial(call, heads=sizes.heads)
    with (
        compiling_for_hopper(),
        pytest.raises(
            ValueError, match=f"self_attention: implementation 'hopper' needs {message}; use 'xla' or 'auto'"
        ),
    ):
        jax.eval_shape(run, jax.ShapeDtypeStruct(x.shape, dtype), *rest, mask_shapes(128))


def test_hopper_takes_blocks_of_128_only():
    ids = jax.ShapeDtypeStruct((128,), jnp.int32)
    mask = jax.eval_shape(lambda ids: BlockMask.from_mask(causal() & same_document(ids), 128, block_size=64), ids)
    with (
        compiling_for_hopper(),
        pytest.raises(
            ValueError, match="self_attention: implementation 'hopper' needs a mask in blocks of 128, got 64"
        ),
    ):
        jax.eval_shape(functools.partial(call, heads=2), *shapes(Sizes()), mask)


@pytest.mark.parametrize("implementation", ["xla", "hopper"])
@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        (0, (2, 128, 256), r"needs x \(T, D\) and weights \(3, C, D\), got \(2, 128, 256\)"),
        (1, (128, 1), r"rstd must be \(128,\) float32"),
        (2, (256, 256), r"needs x \(T, D\) and weights \(3, C, D\), got"),
        (2, (3, 257, 256), "C must be H K with K even, got C = 257 for 2 heads"),
        (3, (128, 128), r"value_embedding must be \(128, 256\)"),
        (4, (1,), r"lambdas must be \(2,\) float32"),
        (5, (128, 65), r"R <= K / 2, the pairs of a head, got \(128, 65\) for K = 128"),
        (5, (127, 32), r"cos must be \(128, 32\) float32"),
        (6, (128, 31), r"sin must be \(128, 32\) float32"),
    ],
)
def test_arrays_that_do_not_fit_together(implementation, argument, shape, message):
    arrays = shapes(Sizes())
    arrays[argument] = jax.ShapeDtypeStruct(shape, arrays[argument].dtype)
    run = functools.partial(call, heads=2, implementation=implementation)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, *arrays, mask_shapes(128))


def test_auto_is_hopper_where_it_runs_and_fits():
    record = {"tokens": 65536, "width": 768, "channels": 768, "head_width": 128, "rotated": 32}

    def automatic(device, dtype, **change):
        return choose("self_attention", "auto", lambda: unsupported(dtype, **record | change), device=device)

    assert automatic(H100, "bfloat16") == "hopper"
    assert automatic(H100, "float32") == "xla"
    for change in ({"tokens": 1}, {"channels": 640}, {"channels": 384, "head_width": 64}, {"block_size": 64}):
        assert automatic(H100, "bfloat16", **change) == "xla"
    assert automatic(B200, "bfloat16") == "xla"


def small(dtype):
    """The arguments of `self_attention` for two heads of 8, and a mask of blocks of 8."""
    rng = np.random.default_rng(6)
    shapes = (24, 16), (24,), (3, 16, 16), (24, 16), (2,), (24, 4), (24, 4)
    x, _, weights, embedding, lambdas, cos, sin = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    r = 1 / np.sqrt((x**2).mean(1) + EPSILON)
    return [x, r.astype(dtype), weights, embedding, lambdas, cos, sin], *random_mask(rng, 3, 8, 0.7)


OPTIONS = {"heads": 2, "softmax_scale": SCALE, "epsilon": EPSILON}


@pytest.mark.slow
def test_float64_is_computed_in_float64():
    arguments, mask, visible = small(np.float64)
    with jax.enable_x64(True):
        (_, y), pull = jax.vjp(lambda *a: self_attention(*a, mask, **OPTIONS), *arguments)
        d_y = np.random.default_rng(0).standard_normal(y.shape)
        gradients = pull((jnp.zeros_like(arguments[0]), jnp.asarray(d_y)))
    want = attention_truth(arguments, (0 * arguments[0], d_y), visible, 2)
    for got, expected in zip((y, gradients[0], *gradients[2:5]), want, strict=True):
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10)


def test_numpy_arrays_outside_jit():
    arguments, mask, _ = small(np.float32)
    got = self_attention(*arguments, jax.tree.map(np.asarray, mask), **OPTIONS)
    want = self_attention(*map(jnp.asarray, arguments), mask, **OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("implementation", ["xla", "hopper"])
@pytest.mark.parametrize("name", ["softmax_scale", "epsilon"])
def test_traced_numbers_are_refused_alike(implementation, name):
    def run(number, *arguments):
        options = {"heads": 2, "softmax_scale": SCALE, "epsilon": EPSILON} | {name: number}
        return self_attention(*arguments, implementation=implementation, **options)

    message = f"^self_attention: {name} must be a number that is known when it is traced"
    with compiling_for_hopper(), pytest.raises(ValueError, match=message):
        jax.eval_shape(run, 0.1, *shapes(Sizes()), mask_shapes(128))


@pytest.mark.parametrize("implementation", ["xla", "hopper"])
def test_names_and_masks_are_looked_at_whichever_path_is_taken(implementation):
    run = functools.partial(
        self_attention, heads=2, softmax_scale=SCALE, epsilon=EPSILON, implementation=implementation
    )
    with compiling_for_hopper(), pytest.raises(ValueError, match="attention: unknown implementation 'Fast'"):
        jax.eval_shape(functools.partial(run, attention="Fast"), *shapes(Sizes()), mask_shapes(128))
    with (
        compiling_for_hopper(),
        pytest.raises(ValueError, match=r"the mask is for \(256,\) queries and 256 keys, but x is \(128, 256\)"),
    ):
        jax.eval_shape(run, *shapes(Sizes()), mask_shapes(256))
