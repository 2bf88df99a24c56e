"""`qkv_to_heads`, plain and fast, against a float64 formula and its derivative; the fast path in the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_speedrun.kernels.qkv import fast_qkv_supported, qkv_to_heads

T, H, EPSILON = 32, 2, 2.0**-23
BF16, F32 = 2.0**-8, 2.0**-24  # largest relative error of one rounding


def inputs(width=128, seed=0, z_scale=1.0, scale=1.0, mixes=True, dtype=jnp.bfloat16, lambdas=(0.7, -0.4)):
    """qkv, scale, value embedding, lambdas, cos, sin, and gradients of q, k, v."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape)

    angle = 100 * rng.random((T, width // 2))
    qkv = z_scale * normal(T, 3 * H * width)
    arrays = [jnp.asarray(a, dtype) for a in (qkv, normal(T, H * width), *normal(3, T, H, width))]
    r = scale * (0.5 + rng.random(T))
    float32 = [jnp.asarray(a, jnp.float32) for a in (r, lambdas, np.cos(angle), np.sin(angle))]
    return (arrays[0], float32[0], arrays[1] if mixes else None, *float32[1:]), arrays[2:]


def formula(qkv, scale, value_embedding, lambdas, cos, sin, xp=np):
    """q, k, v by the textbook: a pair of channels is a complex number, which rotary multiplies by exp(-i angle)."""
    turn = (cos - 1j * sin)[:, None]
    q, k, v = xp.moveaxis((qkv * scale[:, None]).reshape(T, 3, H, -1), 1, 0)

    def normed_and_rotated(y):
        half = y.shape[-1] // 2
        y = y / xp.sqrt((y**2).mean(-1, keepdims=True) + EPSILON)
        pairs = (y[..., :half] + 1j * y[..., half:]) * turn
        return xp.concatenate([pairs.real, pairs.imag], axis=-1)

    mixed = lambdas[0] * v
    if value_embedding is not None:
        mixed = mixed + lambdas[1] * value_embedding.reshape(v.shape)
    return normed_and_rotated(q), normed_and_rotated(k), mixed


def float64(arrays):
    return [None if a is None else np.asarray(a, np.float64) for a in arrays]


def truth(arguments, d_heads):
    """Heads and gradients in float64."""
    with jax.enable_x64(True):
        differentiable = [jnp.asarray(a) if a is not None else None for a in float64(arguments[:4])]
        cos, sin = (jnp.asarray(a) for a in float64(arguments[4:]))
        heads, pull = jax.vjp(lambda *a: formula(*a, cos, sin, xp=jnp), *differentiable)
        gradients = pull(tuple(jnp.asarray(a) for a in float64(d_heads)))
        return float64(heads), float64(gradients)


def float32_bounds(arguments, d_heads):
    """How far float32 sums may be off, from the sizes of their terms: heads, and gradients."""
    qkv, scale, embedding, lambdas, *_ = float64(arguments)
    q, k, v = np.moveaxis(np.abs(qkv).reshape(T, 3, H, -1), 1, 0)
    *g_qk, g = [np.abs(a) for a in float64(d_heads)]
    r, half = scale[:, None, None], q.shape[-1] // 2

    def pair(a):
        """The size of the pair that a channel turns in."""
        return np.hypot(a, np.roll(a, half, axis=-1))

    heads, d_z, d_scale = [], [], 32 * F32 * np.abs(lambdas[0]) * (v * g).sum((1, 2))
    for z, g_part in zip((q, k), map(pair, g_qk), strict=True):
        s = 1 / np.sqrt(((r * z) ** 2).mean(-1, keepdims=True) + EPSILON)
        n = s * r * z
        heads.append(16 * F32 * pair(n))
        d_z.append(32 * F32 * r * s * (g_part + n * (g_part * n).mean(-1, keepdims=True)))
        # Automatic differentiation subtracts two sums of this size; the kernel's one term is far smaller.
        d_scale = d_scale + 32 * F32 * (z * s * g_part).sum((1, 2))
    d_z.append(8 * F32 * np.abs(lambdas[0]) * r * g)
    gradients = [np.stack(d_z, 1).reshape(T, -1), d_scale, None, np.array([64 * F32 * (r * v * g).sum(), 0.0])]
    heads.append(8 * F32 * np.abs(lambdas[0]) * r * v)
    if embedding is not None:
        mixed = np.abs(embedding).reshape(g.shape)
        heads[2] = heads[2] + 8 * F32 * np.abs(lambdas[1]) * mixed
        gradients[2] = 8 * F32 * np.abs(lambdas[1]) * g.reshape(T, -1)
        gradients[3][1] = 64 * F32 * (mixed * g).sum()
    return heads, gradients


def assert_close(results, arguments, d_heads):
    """One rounding of every result, and the error of float32 sums before it."""
    allowed = float32_bounds(arguments, d_heads)
    for got_group, want_group, bound_group in zip(results, truth(arguments, d_heads), allowed, strict=True):
        for got, want, bound in zip(got_group, want_group, bound_group, strict=True):
            if want is None:
                assert got is None
                continue
            rounding = {jnp.bfloat16: BF16, jnp.float32: F32}[got.dtype.type]
            limit = 1.01 * rounding * np.abs(want) + bound + 2.0**-125  # below it, results may be flushed to 0
            error = np.abs(np.asarray(got, np.float64) - want)
            assert (error <= limit).all(), f"{np.max(error / limit)} of the bound"


@functools.cache
def runner(implementation):
    options = {"heads": H, "epsilon": EPSILON, "implementation": implementation, "interpret": True}

    def run(arguments, d_heads):
        heads, pull = jax.vjp(lambda *a: qkv_to_heads(*a, *arguments[4:], **options), *arguments[:4])
        return heads, pull(tuple(d_heads))

    return jax.jit(run)


CASES = {
    "random": {},
    "64 wide": {"width": 64},
    "no value embedding": {"mixes": False},
    "lambdas 0": {"lambdas": (0.0, 0.0)},
    "huge": {"z_scale": 1e10},
    "huge, scaled back": {"z_scale": 1e15, "scale": 1e-15},
    "near epsilon": {"z_scale": 3e-4},
    "tiny": {"z_scale": 1e-12},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["plain", "fast"])
def test_equals_float64(implementation, case):
    arguments, d_heads = inputs(seed=len(case), **CASES[case])
    assert_close(runner(implementation)(arguments, d_heads), arguments, d_heads)


@pytest.mark.parametrize("implementation", ["plain", "fast"])
def test_zeros(implementation):
    """Tokens and heads of zeros, and a token whose scale is 0, give finite gradients: those of the formula."""
    (qkv, scale, *rest), d_heads = inputs(seed=1)
    heads = qkv.reshape(T, 3, H, -1).at[::3].set(0).at[1::3, 0, 1].set(0).at[:, 1, 0, :8].set(0)
    arguments = (heads.reshape(qkv.shape), scale.at[5].set(0), *rest)
    d_heads[1] = d_heads[1].at[7].set(0)
    results = runner(implementation)(arguments, d_heads)
    assert all(np.isfinite(np.asarray(a, np.float64)).all() for a in jax.tree.leaves(results))
    assert_close(results, arguments, d_heads)


def test_plain_takes_float32_and_narrow_heads():
    arguments, d_heads = inputs(8, dtype=jnp.float32)
    assert_close(runner("plain")(arguments, d_heads), arguments, d_heads)


def test_no_gradient_goes_to_the_angles():
    (*arguments, cos, sin), _ = inputs()
    for implementation in ("plain", "fast"):
        gradient = jax.grad(lambda *a, i=implementation: heads_of(*arguments, *a, implementation=i)[0].sum(), (0, 1))
        assert not any(np.any(g) for g in gradient(cos, sin))


def heads_of(*arguments, implementation="fast", interpret=True):
    options = {"heads": H, "epsilon": EPSILON, "implementation": implementation, "interpret": interpret}
    return qkv_to_heads(*arguments, **options)


def shapes(length, heads, width, mixes=True):
    channels = heads * width
    scale, lambdas, *angles = (
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((length,), (2,), *2 * [(length, width // 2)])
    )
    qkv, embedding = (jax.ShapeDtypeStruct((length, n), jnp.bfloat16) for n in (3 * channels, channels))
    return qkv, scale, embedding if mixes else None, lambdas, *angles


@pytest.mark.parametrize(("heads", "width", "mixes"), [(6, 128, True), (12, 64, False)])
def test_lowers_for_cuda_at_full_size(heads, width, mixes):
    """All but the last compiler, ptxas. Without a GPU JAX assumes compute 9.0."""

    def loss(*arguments):
        parts = qkv_to_heads(*arguments, heads=heads, epsilon=EPSILON, implementation="fast")
        return sum(x.astype(jnp.float32).sum() for x in parts)

    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 3))).trace(*shapes(65536, heads, width, mixes))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("qkv_to_heads_forward", "qkv_to_heads_backward"):
        assert kernel in text


def test_lowers_under_checkpoint_in_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def local_loss(*arguments):
        parts = jax.checkpoint(functools.partial(heads_of, interpret=False))(*arguments)
        return jax.lax.psum(sum(x.astype(jnp.float32).sum() for x in parts), "data")

    def loss(*arguments):
        specs = (P("data"), P("data"), P("data"), P(), P("data"), P("data"))
        return jax.shard_map(local_loss, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(*arguments)

    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*shapes(256, H, 128))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # The checkpoint runs the forward kernel again in the backward pass, whose first run then has no reader.
    assert "qkv_to_heads_backward" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "bfloat16, got float32"),
        ({"length": 80}, "T a multiple of 32, got 80"),
        ({"width": 32}, "K of 64 or 128, got 32"),
        ({"heads": 5}, "heads"),
        ({"scale": (128, 1)}, "scale must be"),
        ({"lambdas": (1,)}, "lambdas must be"),
        ({"embedding": 256}, "value_embedding must be"),
        ({"angles": 32}, "cos must be"),
    ],
)
def test_what_is_not_supported_is_said(change, message):
    case = {"dtype": jnp.bfloat16, "length": 128, "width": 128, "heads": 6, "lambdas": (2,)} | change
    length, channels = case["length"], 6 * case["width"]

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    angles = shape(length, case.get("angles", case["width"] // 2))
    arguments = (
        shape(length, 3 * channels, dtype=case["dtype"]),
        shape(*case.get("scale", (length,))),
        shape(length, case.get("embedding", channels), dtype=case["dtype"]),
        shape(*case["lambdas"]),
        angles,
        angles,
    )
    options = {"heads": case["heads"], "epsilon": EPSILON, "implementation": "fast"}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(qkv_to_heads, **options), *arguments)


def test_a_cpu_has_no_fast_path():
    assert not fast_qkv_supported(jax.devices()[0], jnp.bfloat16, tokens=65536, head_width=128)
