"""`mlp`, by xla and by hopper, against float64 with bounds from its roundings; hopper in Pallas' interpreter."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_speedrun.kernels.hopper.matmul import Config
from jax_speedrun.kernels.implementation import choose, compiling_for_hopper, interpret_kernels
from jax_speedrun.kernels.layer.mlp import mlp, unsupported
from jax_speedrun.kernels.layer.mlp_hopper import matmul_relu_squared, matmul_slope
from jax_speedrun.kernels.layer.residual import rstd
from tests.devices import B200, H100
from tests.marks import slow

BF16, F32 = 2.0**-8, 2.0**-24  # largest relative error of one rounding
EPSILON = 2.0**-23
SIZES = {"tokens": 512, "width": 256, "hidden": 512}  # several tiles for each of two programs


def inputs(case, tokens, width, hidden):
    """x, fc, proj and the output's gradient; x and the gradient are bfloat16, and so are the weights' values."""
    rng = np.random.default_rng(len(case))
    x, dy = rng.standard_normal((2, tokens, width))
    fc, proj = (rng.standard_normal(shape) * shape[1] ** -0.5 for shape in ((hidden, width), (width, hidden)))
    if case == "all negative":
        x, fc = np.abs(x), -np.abs(fc)
    if case == "zero rows":
        x[::3], dy[1::3], fc[::5] = 0, 0, 0
    if case == "huge":
        x, dy = 1e12 * x, 1e5 * dy
    if case == "tiny":
        x, dy = 1e-14 * x, 1e-5 * dy
    if case == "each token its own":
        x *= 10.0 ** rng.integers(-5, 6, (tokens, 1))
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in (x, fc, proj, dy)]
    fc, proj = (weight.astype(jnp.float32) for weight in rounded[1:3])
    return rounded[0], fc, proj, rounded[3]


def float64(arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def truth(x, fc, proj, dy):
    """Output and gradients in float64, each with how far it may be off: sums in float32, results in bfloat16.

    h is off by its sum, r2 by that and a rounding, and so on through the chain; hopper also rounds the slope,
    xla h instead, and results before they join the residual.
    """
    x, fc, proj, dy = float64((x, fc, proj, dy))
    scale = 1 / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPSILON)

    def product(a, a_off, b, transposed=False):
        """a b^T or a^T b, with a known to within `a_off`."""
        a, a_off, b = (a.T, a_off.T, b.T) if transposed else (a, a_off, b)
        value, size = a @ b.T, np.abs(a) @ np.abs(b).T
        return value, a_off @ np.abs(b).T + a.shape[1] * F32 * size

    z, z_off = product(x, 0 * x, fc)
    z_off = z_off + BF16 * np.abs(z)  # if it is rounded, as xla does
    h, h_off = scale * z, scale * z_off
    root = np.maximum(h, 0)
    r2, r2_off = root**2, 2 * root * h_off + h_off**2 + BF16 * root**2
    y, y_off = product(r2, r2_off, proj)
    y, y_off = x + y, y_off + BF16 * np.abs(y)
    d_r2, d_r2_off = product(dy, 0 * dy, proj.T)
    d_r2_off = d_r2_off + BF16 * np.abs(d_r2)
    dh = d_r2 * 2 * root
    slope_off = 2 * h_off + 2 * BF16 * 2 * root
    dh_off = d_r2_off * 2 * root + np.abs(d_r2) * slope_off + d_r2_off * slope_off + BF16 * np.abs(dh)
    dz, dz_off = scale * dh, scale * dh_off
    d_scale, d_scale_off = np.sum(dh * z, axis=1), np.sum(dh_off * np.abs(z) + np.abs(dh) * (z_off + slope_off), axis=1)
    along, along_off = (a[:, None] * scale**3 / x.shape[1] for a in (-d_scale, d_scale_off))
    dx, dx_off = product(dz, dz_off, fc.T)
    dx_off += BF16 * np.abs(dx) + along_off * np.abs(x)  # xla rounds dz W
    dx += dy + along * x
    d_fc, d_fc_off = product(dz, dz_off, x, transposed=True)
    d_proj, d_proj_off = product(r2, r2_off, dy, transposed=True)
    offs = y_off, dx_off, d_fc_off, d_proj_off.T
    return [(a, off + BF16 * np.abs(a)) for a, off in zip((y, dx, d_fc, d_proj.T), offs, strict=True)]


@functools.cache
def runner(implementation):
    def run(x, fc, proj, dy):
        def output(x, fc, proj):
            return mlp(x, rstd(x, EPSILON), fc, proj, implementation)

        y, pull = jax.vjp(output, x, fc, proj)
        return y, *pull(dy)

    return interpreted(jax.jit(run))


def interpreted(function):
    def run(*arguments):
        with interpret_kernels():
            return function(*arguments)

    return run


def assert_close(got, case):
    for name, result, (want, off) in zip(("y", "dx", "d_fc", "d_proj"), got, case, strict=True):
        error = np.abs(np.asarray(result, np.float64) - want)
        assert (error <= 1.05 * off + 1e-38).all(), (name, np.max(error / (off + 1e-38)))
        # The bound lets every rounding err the same way. As they do not, they add up like their squares: an MLP has
        # five in a row, none of more than 2^-8.
        assert np.linalg.norm(error) <= 5**0.5 * BF16 * np.linalg.norm(want), name


CASES = ["random", "all negative", "zero rows", "huge", "tiny", "each token its own"]


@pytest.mark.parametrize(
    ("implementation", "case"),
    [*(("xla", case) for case in CASES), *(slow("hopper", case) for case in CASES)],
)
def test_output_and_gradients_equal_float64(implementation, case):
    arguments = inputs(case, **SIZES)
    got = runner(implementation)(*arguments)
    assert [a.dtype for a in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    assert_close(got, truth(*arguments))
    if case == "all negative":  # no NaN from the root's slope at 0
        y, dx, d_fc, d_proj = got
        np.testing.assert_array_equal(y, arguments[0])
        np.testing.assert_array_equal(dx, arguments[3])
        assert not np.asarray(d_fc).any()
        assert not np.asarray(d_proj).any()


@pytest.mark.parametrize("implementation", ["xla", slow("hopper")])
def test_the_scale_is_no_variable_of_its_own(implementation):
    x, fc, proj, dy = inputs("random", 128, 256, 256)
    run = interpreted(lambda s: jax.vjp(lambda s: mlp(x, s, fc, proj, implementation), s)[1](dy))
    (d_scale,) = run(rstd(x, EPSILON))
    assert not np.asarray(d_scale).any()


@pytest.mark.parametrize("implementation", ["xla", slow("hopper")])
def test_a_norm_sends_nothing_back_along_x(implementation):
    """However small the MLP's part of the gradient is beside what passes it by: no rounding may favour one direction.

    Along x the matmul's part and the norm's are each -2 |y|^2 for the gradient y = mlp - x, and cancel. Added one by
    one to a much larger number in bfloat16, both would be lost, but not equally often.
    """
    x, fc, proj, _ = inputs("random", 256, 256, 256)
    y = mlp(x, rstd(x, EPSILON), fc, proj) - x
    ratio = 2.0**-12  # the MLP's part of the gradient, and of the output, to what passes by
    proj, y = proj * ratio, np.asarray(y, np.float64)
    passing = np.random.default_rng(1).standard_normal(y.shape)
    dy = jnp.asarray(y / np.sqrt(np.mean(y**2)) + passing, jnp.bfloat16)
    _, dx, *_ = runner(implementation)(x, fc, proj, dy)
    x, y, dy, dx = float64((x, y, dy, dx))
    cancels = 2 * ratio * np.sum(y * dy)
    rounding = BF16 * np.sqrt(np.mean(dy**2) * np.sum(x**2))  # of dx: as often up as down
    assert cancels > 20 * rounding
    assert abs(np.sum((dx - dy) * x)) <= 3 * rounding


@pytest.mark.slow
def test_an_odd_number_of_tiles():
    arguments = inputs("random", tokens=384, width=256, hidden=256)
    assert_close(runner("hopper")(*arguments), truth(*arguments))


@pytest.mark.slow
def test_bfloat16_weights_get_bfloat16_gradients():
    x, fc, proj, dy = inputs("random", 128, 256, 256)
    got = runner("hopper")(x, fc.astype(jnp.bfloat16), proj.astype(jnp.bfloat16), dy)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 4
    assert_close(got, truth(x, fc, proj, dy))


CONFIGS = [
    slow(Config()),
    slow(Config(columns=128, stages=3)),
    slow(Config(columns=192, channels=32, stages=8)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_value_lands_in_its_place(config):
    """Tokens that pick one channel: a sum has one term, so the results are known to the last bit."""
    tokens, width, hidden = 512, 320, 2 * config.columns  # the ring ends within a tile
    rng = np.random.default_rng(0)
    picks = rng.permutation(tokens) % width
    one_hot = jnp.asarray(np.eye(width)[picks], jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((hidden, width)), jnp.bfloat16)
    h = np.asarray(w, np.float32)[:, picks].T
    scale = np.asarray(2.0 ** rng.integers(-3, 4, (tokens, 1)), np.float32)  # multiplies without rounding
    r2 = interpreted(functools.partial(matmul_relu_squared, config=config))(one_hot, w, jnp.asarray(scale[:, 0]))
    np.testing.assert_array_equal(np.asarray(r2), ((scale * np.maximum(h, 0)) ** 2).astype(ml_dtypes.bfloat16))

    dz, shares = interpreted(functools.partial(matmul_slope, config=config))(one_hot, w, jnp.asarray(scale[:, 0]), r2)
    slope = (2 * scale * np.sqrt(np.asarray(r2, np.float64))).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(dz), (h * slope).astype(ml_dtypes.bfloat16))
    shares_wanted = (np.asarray(dz, np.float64) * slope).sum(axis=1)
    size = np.abs(np.asarray(dz, np.float64) * slope).sum(axis=1)
    assert (np.abs(shares.sum(axis=0) - shares_wanted) <= BF16 * size).all()
    # The root of the rounded square, before its own rounding, is nearer to relu(h) than bfloat16 can say.
    root, relu = np.sqrt(np.asarray(r2, np.float64)), scale * np.maximum(h, 0)
    assert (np.abs(root - relu) <= 1.01 * BF16 / 2 * relu).all()


def test_hopper_lowers_for_cuda_at_full_size():
    """All but the last compiler, ptxas. Of h there is nothing: one (T, F) array forward, one backward."""
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((65536, 768), "bfloat16"),
            ((65536,), "float32"),
            ((3072, 768), "float32"),
            ((768, 3072), "float32"),
        )
    ]
    gradient = jax.jit(jax.grad(lambda *a: mlp(*a, "hopper").astype(jnp.float32).sum(), argnums=(0, 1, 2, 3)))
    with compiling_for_hopper():
        text = gradient.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("matmul_relu_squared", "matmul_slope", "matmul_add"):
        assert kernel in text
    assert "65536x3072xf32" not in text
    for pointwise in ("maximum", "sqrt"):
        assert f"stablehlo.{pointwise}" not in text


@pytest.mark.slow
def test_hopper_lowers_in_a_sharded_scan():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def local_loss(x, fc, proj):
        layer = jax.checkpoint(lambda x, _: (mlp(x, rstd(x, 1e-6), fc, proj, "hopper"), None))
        return jax.lax.pmean(jax.lax.scan(layer, x[0], length=3)[0].astype(jnp.float32).sum(), "data")

    def loss(*args):
        specs = (P("data"), P(), P())
        return jax.shard_map(local_loss, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(*args)

    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((2, 256, 256), "bfloat16"), ((512, 256), "float32"), ((256, 512), "float32"))
    ]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    with compiling_for_hopper():
        lowered = gradient.trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "matmul_slope" in lowered.as_text()


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({}, "float32", "bfloat16, got float32"),
        ({"tokens": 64}, "bfloat16", "T a multiple of 128, got 64"),
        ({"tokens": 0}, "bfloat16", "T a multiple of 128, got 0"),
        ({"width": 96}, "bfloat16", "channels into each matmul a multiple of 64, got 96"),
        ({"width": 128}, "bfloat16", "channels out of each matmul a multiple of 256, got 128"),
        ({"hidden": 384}, "bfloat16", "channels out of each matmul a multiple of 256, got 384"),
    ],
)
def test_what_hopper_does_not_take_is_said(change, dtype, message):
    sizes = SIZES | change
    x = jnp.zeros((sizes["tokens"], sizes["width"]), dtype)
    fc = jnp.zeros((sizes["hidden"], sizes["width"]))
    with (
        compiling_for_hopper(),
        pytest.raises(ValueError, match=f"mlp: implementation 'hopper' needs {message}; use 'xla' or 'auto'$"),
    ):
        mlp(x, jnp.ones(sizes["tokens"]), fc, fc.T, "hopper")


@pytest.mark.parametrize("implementation", ["xla", "hopper"])
def test_arrays_that_do_not_fit_together(implementation):
    x, fc, proj, _ = inputs("random", 128, 64, 256)
    scale = rstd(x, EPSILON)
    for arguments in ((x, scale, fc, fc), (x, scale, proj, fc), (x[None], scale, fc, proj)):
        with pytest.raises(ValueError, match=r"mlp needs x \(T, D\), fc \(F, D\) and proj \(D, F\), got"):
            mlp(*arguments, implementation)
    for bad in (scale[:-1], scale.astype(jnp.bfloat16)):
        with pytest.raises(ValueError, match=r"rstd must be \(128,\) float32 for x \(128, 64\), got"):
            mlp(x, bad, fc, proj, implementation)


def test_auto_is_hopper_where_it_runs_and_fits():
    def automatic(device, dtype, **change):
        return choose("mlp", "auto", lambda: unsupported(dtype, **SIZES | change), device=device)

    assert automatic(H100, "bfloat16") == "hopper"
    assert automatic(H100, "float32") == "xla"
    assert automatic(H100, "bfloat16", tokens=1) == "xla"
    assert automatic(B200, "bfloat16") == "xla"


def textbook(x, fc, proj):
    n = x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True) + EPSILON)
    return x + jnp.maximum(n @ fc.T, 0) ** 2 @ proj.T


def small(dtype):
    rng = np.random.default_rng(3)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((6, 8), (12, 8), (8, 12))]


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in small(np.float64)]
        got, pull = jax.vjp(lambda x, *w: mlp(x, rstd(x, EPSILON), *w), *arrays)
        want, pull_textbook = jax.vjp(textbook, *arrays)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-13)
        for a, b in zip(pull(want), pull_textbook(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_second_derivatives_know_the_norm():
    """Whose scale is handed over as known, and is a function of x all the same."""
    with jax.enable_x64(True):
        x, fc, proj = (jnp.asarray(a) for a in small(np.float64))

        def ours(x):
            return jnp.sin(mlp(x, jax.lax.stop_gradient(rstd(x, EPSILON)), fc, proj)).sum()

        got = jax.jacrev(jax.grad(ours))(x)
        want = jax.jacrev(jax.grad(lambda x: jnp.sin(textbook(x, fc, proj)).sum()))(x)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_second_derivatives_by_kernels_are_refused():
    x, fc, proj, _ = inputs("random", 128, 256, 256)
    slope = jax.grad(lambda x: mlp(x, jnp.ones(128), fc, proj, "hopper").astype(jnp.float32).sum())
    with (
        compiling_for_hopper(),
        pytest.raises(TypeError, match=r"^mlp: this implementation can be differentiated once"),
    ):
        jax.eval_shape(jax.grad(lambda x: slope(x).astype(jnp.float32).sum()), x)


def test_numpy_arrays_outside_jit():
    x, fc, proj = small(np.float32)
    s = np.asarray(rstd(x, EPSILON))
    np.testing.assert_array_equal(mlp(x, s, fc, proj), mlp(jnp.asarray(x), jnp.asarray(s), fc, proj))
    assert mlp(x[:0], s[:0], fc, proj).shape == (0, 8)
