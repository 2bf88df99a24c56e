"""The head's loss and gradients against float64 NumPy, in every precision; hopper in Pallas' interpreter."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_speedrun.kernels.head import hopper_gradient as head_hopper_gradient
from jax_speedrun.kernels.head.hopper_gradient import logit_gradient
from jax_speedrun.kernels.head.hopper_logits import logits_and_totals
from jax_speedrun.kernels.head.op import (
    IGNORE_INDEX,
    W_SCALE,
    _operand,
    fp8_supported,
    head_logits,
    head_loss,
    unsupported,
)
from jax_speedrun.kernels.implementation import choose, compiling_for_hopper, interpret_kernels
from tests.devices import B200, H100
from tests.marks import slow

T, D, V = 384, 16, 640


def inputs(seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((T, D))
    x /= np.sqrt((x * x).mean(1, keepdims=True))
    return x.astype(np.float32), (scale * rng.standard_normal((V, D))).astype(np.float32), rng.integers(0, V, T)


def abstract(x_shape, w_shape, targets_shape, x_dtype="bfloat16"):
    """What `head_loss` takes, without values: to be traced only."""
    shapes = (x_shape, x_dtype), (w_shape, "float32"), (targets_shape, "int32")
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def gradient_on_two_devices(local_loss):
    """The mean of `local_loss` over two devices with their own x and targets, differentiated in x and w."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    loss = jax.shard_map(
        lambda *args: jax.lax.pmean(local_loss(*args), "data"),
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def numpy_loss(x, w, targets, *, x_round=lambda a: a, w_round=lambda a: a, z_round=lambda a: a, g_round=lambda a: a):
    """Loss, dx and dw in float64, with the given roundings applied to the operands of the three matmuls."""
    x, w = x_round(x.astype(np.float64)), w_round(w.astype(np.float64))
    z = z_round(x @ w.T)
    gate = 1 / (1 + np.exp(-z / 7.5))
    logits = 30 * gate
    top = logits.max(1, keepdims=True)
    log_total = top + np.log(np.exp(logits - top).sum(1, keepdims=True))
    rows = np.arange(len(x))
    gradient = np.exp(logits - log_total)
    gradient[rows, targets] -= 1
    gradient = g_round(gradient * 4 * gate * (1 - gate))
    return np.mean(log_total[:, 0] - logits[rows, targets]), gradient @ w / len(x), gradient.T @ x / len(x)


def rounder(dtype, scale=1.0):
    return lambda a: (a * scale).astype(np.float32).astype(dtype).astype(np.float64) / scale


def numpy_fp8(x, w, targets):
    bfloat16 = rounder(ml_dtypes.bfloat16)
    return numpy_loss(
        x,
        w,
        targets,
        x_round=rounder(ml_dtypes.float8_e4m3fn, 2),
        w_round=rounder(ml_dtypes.float8_e4m3fn, 32),
        z_round=bfloat16,
        g_round=lambda a: rounder(ml_dtypes.float8_e5m2, 2**13)(bfloat16(a)),
    )


@functools.cache
def gradient_function(**options):
    return jax.jit(jax.value_and_grad(functools.partial(head_loss, **options), argnums=(0, 1)), static_argnums=3)


def run(x, w, targets, precision, **options):
    arguments = jnp.asarray(x), jnp.asarray(w), jnp.asarray(targets, jnp.int32), precision
    loss, (dx, dw) = gradient_function(**options)(*arguments)
    return np.asarray(loss), np.asarray(dx), np.asarray(dw)


def relative(got, want):
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


@pytest.mark.parametrize("seed", range(5))
def test_float32(seed):
    arguments = inputs(seed, scale=[0.0, 0.1, 0.3, 2.0, 20.0][seed])  # 20: most logits at the cap
    for got, want in zip(run(*arguments, "float32"), numpy_loss(*arguments), strict=True):
        assert relative(got, want) < 2e-5


@pytest.mark.parametrize("seed", range(3))
def test_fp8_rounds_as_the_recipe_says(seed):
    """x 2 and w 32 to e4m3, the gradient 2^13 a token to e5m2, z in bfloat16 between: the same values in NumPy."""
    x, w, targets = inputs(seed)
    want = numpy_fp8(x, w, targets)
    exact = numpy_loss(x, w, targets)
    # A value that float32 puts on the other side of a rounding border moves by one step of 2^-3: few do.
    for got, expected, unrounded in zip(run(x, w, targets, "fp8_emulated"), want, exact, strict=True):
        assert relative(got, expected) < 5e-3
        assert relative(got, expected) < 0.2 * relative(got, unrounded)


def test_operands_are_rounded_once():
    """Once more to bfloat16 on the way, which holds many values halfway between two of e4m3, would move 3 % of them."""
    w = inputs()[1]
    got = jax.jit(lambda w: _operand(w, "fp8", W_SCALE))(w)
    np.testing.assert_array_equal(got, (32 * w).astype(ml_dtypes.float8_e4m3fn))


def test_emulation_equals_fp8_operands():
    """XLA multiplies FP8 operands on the CPU as well; the emulation gives the same."""
    arguments = inputs(3)
    for native, emulated in zip(run(*arguments, "fp8"), run(*arguments, "fp8_emulated"), strict=True):
        np.testing.assert_allclose(native, emulated, rtol=2e-2, atol=2e-5)


def test_bfloat16_is_within_its_rounding():
    arguments = inputs(4)
    for got, want in zip(run(*arguments, "bfloat16"), numpy_loss(*arguments), strict=True):
        assert relative(got, want) < 1e-2


def test_loss_alone_equals_loss_with_gradient():
    x, w, targets = (jnp.asarray(a) for a in inputs(5))
    np.testing.assert_allclose(head_loss(x, w, targets, "float32"), run(x, w, targets, "float32")[0], rtol=1e-6)


def test_cotangent_scales_the_gradient():
    x, w, targets = (jnp.asarray(a) for a in inputs(6))
    once = jax.grad(lambda w: head_loss(x, w, targets, "float32"))(w)
    thrice = jax.grad(lambda w: 3 * head_loss(x, w, targets, "float32"))(w)
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def test_a_zero_head_is_uniform():
    x, w, targets = inputs(7)
    np.testing.assert_allclose(run(x, 0 * w, targets, "float32")[0], np.log(V), rtol=1e-6)


def test_logits():
    x, w, _ = inputs(8)
    want = 30 / (1 + np.exp(-(x @ w.T) / 7.5))
    np.testing.assert_allclose(head_logits(jnp.asarray(x), jnp.asarray(w), "float32"), want, rtol=1e-5)


def test_full_logits_never_exist():
    gradient = jax.jit(jax.grad(lambda x, w, t: head_loss(x, w, t, "float32"), argnums=(0, 1)))
    assert f"4096x{V}" not in gradient.lower(*abstract((4096, D), (V, D), (4096,), "float32")).as_text()


@pytest.mark.parametrize("implementation", ["xla", "hopper"])
@jax.default_matmul_precision("default")  # whatever another test has left
def test_only_gradients_ask_for_sums_in_float32(implementation):
    """By precision: an algorithm's name, which says more, does not survive several devices."""
    arrays = abstract((256, 256), (640, 256), (256,))
    gradient = jax.jit(jax.grad(lambda *a: head_loss(*a, "fp8", implementation, chunk_tokens=256), argnums=(0, 1)))
    with compiling_for_hopper():
        text = gradient.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line and "f8E" in line]
    of_gradients = ["f8E5M2" in line for line in products]
    assert of_gradients.count(True) == 2
    assert of_gradients.count(False) == (implementation == "xla")  # hopper's logits are its kernel's
    assert ["precision = [HIGHEST, HIGHEST]" in line for line in products] == of_gradients
    assert not any("algorithm" in line for line in products)


@jax.default_matmul_precision("default")
def test_sums_in_float32_on_several_devices(tmp_path):
    """XLA's passes for several devices write every product anew. What they lose, no later pass knows."""
    gradient = gradient_on_two_devices(lambda *args: head_loss(*args, "fp8"))
    gradient.lower(*abstract((256, 128), (384, 128), (256,))).compile(
        {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd.*"}
    )
    (partitioned,) = tmp_path.glob("*after_spmd-partitioning*")
    products = [line for line in partitioned.read_text().splitlines() if " dot(" in line]
    assert len(products) == 3
    assert ["operand_precision={highest,highest}" in line for line in products].count(True) == 2


def test_a_cpu_has_no_fp8_units():
    assert not fp8_supported(jax.devices("cpu")[0])


def test_one_token_and_chunks_that_do_not_divide_alike():
    x, w, targets = inputs(9)
    for tokens, chunk_tokens in ((1, 128), (6, 4), (384, 100)):
        arguments = x[:tokens], w, targets[:tokens]
        for got, want in zip(
            run(*arguments, "float32", chunk_tokens=chunk_tokens), numpy_loss(*arguments), strict=True
        ):
            assert relative(got, want) < 2e-5


# The Hopper kernels. Three tiles of the vocab and two steps of channels; two chunks of tokens, of one tile each.
SIZES = {"tokens": 256, "vocab_size": 384, "width": 256}
HOPPER = {"implementation": "hopper", "chunk_tokens": 255}  # a tile and a part


def hopper_inputs(case):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((SIZES["tokens"], SIZES["width"]))
    w = 0.25 * rng.standard_normal((SIZES["vocab_size"], SIZES["width"]))
    targets = rng.integers(0, SIZES["vocab_size"], SIZES["tokens"])
    if case == "capped":  # the first channel lifts a word's z by 100 or -100 for every token; targets are among both
        x[:, 0], w[:, 0] = 16, 0
        w[:32, 0], w[-32:, 0] = 100 / 16, -100 / 16
    if case == "improbable targets":
        targets = (x @ w.T).argmin(1)
    if case == "one target":
        targets = np.full_like(targets, 131)
    if case == "zero head":
        w *= 0
    return x.astype(np.float32), w.astype(np.float32), targets


@pytest.mark.parametrize("case", ["random", "capped", *map(slow, ["improbable targets", "one target", "zero head"])])
def test_hopper_equals_the_recipe_and_xla(case):
    """Same roundings, so the same tolerance as FP8 above: few values fall on another side of a border."""
    arguments = hopper_inputs(case)
    with interpret_kernels():
        hopper = run(*arguments, "fp8", **HOPPER)
    for got, want, plain in zip(hopper, numpy_fp8(*arguments), run(*arguments, "fp8_emulated"), strict=True):
        assert np.isfinite(got).all()
        assert relative(got, want) < 5e-3
        assert relative(got, plain) < 5e-3
    np.testing.assert_allclose(hopper[0], numpy_fp8(*arguments)[0], rtol=1e-5)


@pytest.mark.parametrize("splits", [slow(1), 2])
def test_logits_and_totals(splits):
    """Two tiles of tokens, and of words three, or two and one."""
    x, w, _ = hopper_inputs("random")
    x, w = jnp.asarray(x * 2, jnp.float8_e4m3fn), jnp.asarray(w * 32, jnp.float8_e4m3fn)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T / 64
    with interpret_kernels():
        z, totals = logits_and_totals(x, w, unscale=1 / 64, splits=splits)
    z = np.asarray(z, np.float64)
    assert relative(z, exact) < 2**-8
    assert totals.shape == (splits, 256)
    np.testing.assert_allclose(np.asarray(totals).sum(0), np.exp(30 / (1 + np.exp(-z / 7.5)) - 30).sum(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("together", "runs"),
    [
        (4, 1),  # more tiles than slots
        slow(1, 3),  # runs of two tiles and of one
        slow(2, 2),
        slow(8, 132),  # more than there are
    ],
)
def test_gradient_kernel_writes_both_layouts(monkeypatch, together, runs):
    monkeypatch.setattr(head_hopper_gradient, "TOGETHER", together)
    monkeypatch.setattr(head_hopper_gradient, "RUNS", runs)
    rng = np.random.default_rng(6)
    z = jnp.asarray(np.concatenate([8 * rng.standard_normal((256, 192)), np.full((256, 64), [[-800, 800] * 32])], 1))
    z, targets = z.astype(jnp.bfloat16), rng.integers(0, 256, 256)
    gate = 1 / (1 + np.exp(-np.asarray(z, np.float64) / 7.5))
    total = np.exp(30 * gate - 30).sum(1, keepdims=True)
    want = np.exp(30 * gate - 30) / total - (np.arange(256) == targets[:, None])
    want = rounder(ml_dtypes.float8_e5m2)(rounder(ml_dtypes.bfloat16)(want * 4 * gate * (1 - gate)) * 2**13)
    log2_total = jnp.asarray(np.log2(total[:, 0]), jnp.float32)
    with interpret_kernels():
        d_z, turned = logit_gradient(z, log2_total, jnp.asarray(targets, jnp.int32))
    assert d_z.dtype == turned.dtype == jnp.float8_e5m2
    d_z, turned = np.asarray(d_z, np.float64), np.asarray(turned, np.float64)
    np.testing.assert_array_equal(turned, d_z.T)
    assert relative(d_z, want) < 2e-3
    assert (d_z != want).mean() < 1e-3


def test_hopper_lowers_for_cuda_at_full_size():
    """All but the last compiler, ptxas. Without a GPU JAX assumes compute 9.0."""
    gradient = jax.jit(jax.grad(lambda x, w, t: head_loss(x, w, t, "fp8", "hopper"), argnums=(0, 1)))
    shapes = abstract((65536, 768), (50304, 768), (65536,))
    with compiling_for_hopper():
        text = gradient.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("head_logits", "head_logit_gradient"):
        assert kernel in text
    assert "32768x50304xbf16" in text
    assert "65536x50304" not in text
    assert "50304x50304" not in text


def test_hopper_lowers_in_a_sharded_scan():
    def local_loss(x, w, targets):
        def add(total, one):
            return total + head_loss(one[0], w, one[1], "fp8", "hopper"), None

        return jax.lax.scan(add, jnp.float32(0), (x, targets))[0]

    shapes = abstract((4, 256, 128), (384, 128), (4, 256))
    with compiling_for_hopper():
        lowered = gradient_on_two_devices(local_loss).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "head_logit_gradient" in lowered.as_text()


@pytest.mark.parametrize(
    ("change", "precision", "message"),
    [
        ({}, "bfloat16", "precision 'fp8', got 'bfloat16'"),
        ({"tokens": 192}, "fp8", "T a multiple of 128, got 192"),
        ({"vocab_size": 320}, "fp8", "V a multiple of 128, got 320"),
        ({"width": 192}, "fp8", "D a multiple of 128, got 192"),
        ({"width": 896}, "fp8", "D at most 768, got 896"),
    ],
)
def test_what_hopper_does_not_take_is_said(change, precision, message):
    sizes = SIZES | change
    x = jnp.zeros((sizes["tokens"], sizes["width"]))
    w, targets = jnp.zeros((sizes["vocab_size"], sizes["width"])), jnp.zeros(sizes["tokens"], jnp.int32)
    with (
        compiling_for_hopper(),
        pytest.raises(ValueError, match=f"head_loss: implementation 'hopper' needs {message}; use 'xla' or 'auto'$"),
    ):
        head_loss(x, w, targets, precision, "hopper")


def test_auto_is_hopper_where_it_runs_and_fits():
    def automatic(device, precision, **change):
        return choose("head_loss", "auto", lambda: unsupported(precision, **SIZES | change), device=device)

    assert automatic(H100, "fp8") == "hopper"
    assert automatic(H100, "bfloat16") == "xla"
    assert automatic(H100, "fp8", tokens=1) == "xla"
    assert automatic(B200, "fp8") == "xla"
    assert automatic(jax.devices("cpu")[0], "fp8") == "xla"


IMPLEMENTED = [("xla", "float32", 2e-5), ("xla", "fp8_emulated", 1e-2), slow("hopper", "fp8", 1e-2)]


def run_anywhere(x, w, targets, precision, implementation):
    with interpret_kernels():
        return run(x, w, targets, precision, implementation=implementation, chunk_tokens=128)


@pytest.mark.parametrize(("implementation", "precision", "tolerance"), IMPLEMENTED)
def test_ignored_targets_are_in_neither_loss_nor_gradients(implementation, precision, tolerance):
    """The mean is over the others; of the ignored tokens not even NaN is felt."""
    x, w, targets = hopper_inputs("random")
    ignored = np.random.default_rng(0).random(len(targets)) < 0.4
    ignored[:128] = True  # a whole chunk
    want_loss, want_dx, want_dw = numpy_loss(x[~ignored], w, targets[~ignored])
    x[np.flatnonzero(ignored)[::3]] = np.nan
    targets = np.where(ignored, IGNORE_INDEX, targets)
    loss, dx, dw = run_anywhere(x, w, targets, precision, implementation)
    np.testing.assert_allclose(loss, want_loss, rtol=tolerance)
    assert not dx[ignored].any()
    share = 10 * tolerance  # FP8 rounds gradients by up to 2^-3
    assert relative(dx[~ignored], want_dx) < share
    assert relative(dw, want_dw) < share
    np.testing.assert_allclose(head_loss(x, w, targets, precision, "xla"), loss, rtol=1e-5)


@pytest.mark.parametrize("bad", [-1, -99, -101, 384, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize(("implementation", "precision", "tolerance"), [IMPLEMENTED[0], IMPLEMENTED[2]])
def test_impossible_targets_are_refused_or_give_nan(implementation, precision, tolerance, bad):
    x, w, targets = hopper_inputs("random")
    targets[17] = bad
    with pytest.raises(ValueError, match=rf"targets must be ids in \[0, 384\) or IGNORE_INDEX \(-100\), got {bad}$"):
        head_loss(x, w, targets, precision, "xla")
    for result in run_anywhere(x, w, targets, precision, implementation):
        assert np.isnan(result).all()


@pytest.mark.parametrize(("implementation", "precision", "tolerance"), [IMPLEMENTED[0], IMPLEMENTED[2]])
def test_with_nothing_but_ignored_targets_there_is_no_mean(implementation, precision, tolerance):
    x, w, targets = hopper_inputs("random")
    for result in run_anywhere(x, w, np.full_like(targets, IGNORE_INDEX), precision, implementation):
        assert np.isnan(result).all()


def test_numpy_arrays_outside_jit_and_targets_of_any_integers():
    x, w, targets = inputs()
    want = head_loss(jnp.asarray(x), jnp.asarray(w), jnp.asarray(targets, jnp.int32), "float32")
    for dtype in ("int64", "uint16", "int16", "uint32"):
        np.testing.assert_array_equal(head_loss(x, w, targets.astype(dtype), "float32"), want)
    some = x[:99], w, (targets % 200)[:99]
    np.testing.assert_allclose(
        head_loss(*some[:2], some[2].astype("uint8"), "float32"), numpy_loss(*some)[0], rtol=1e-5
    )


def test_second_derivatives():
    x, w, targets = (a[:4] if i != 1 else a[:9] for i, a in enumerate(inputs()))
    targets = targets % 9
    direction, step = np.random.default_rng(0).standard_normal(x.shape), 1e-3
    up, down = (numpy_loss(x + s * direction, w, targets)[1] for s in (step, -step))
    _, along = jax.jvp(jax.grad(lambda x: head_loss(x, w, targets, "float32")), (x,), (direction.astype(np.float32),))
    np.testing.assert_allclose(along, (up - down) / (2 * step), rtol=1e-2, atol=1e-5)


def test_second_derivatives_by_kernels_are_refused():
    x, w, targets = hopper_inputs("random")
    slope = jax.grad(lambda x: head_loss(x, w, targets, "fp8", "hopper"))
    with (
        compiling_for_hopper(),
        pytest.raises(TypeError, match=r"^head_loss: this implementation can be differentiated once"),
    ):
        jax.eval_shape(jax.grad(lambda x: slope(x).sum()), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (T, D + 1)}, r"needs x \(T, D\), weights \(V, D\) and targets \(T,\)"),
        ({"x": (T + 1, D)}, "needs x"),
        ({"x": (0, D), "targets": (0,)}, r"needs .* with T at least 1"),
        ({"w": (V,)}, "needs x"),
        ({"targets": (T, 1)}, r"targets must be integers of shape \(T,\), got int32 \(384, 1\)"),
        ({"targets_dtype": "float32"}, "targets must be integers"),
        ({"precision": "float16"}, "unknown precision 'float16'; choose one of fp8, fp8_emulated, bfloat16, float32"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    case = {"x": (T, D), "w": (V, D), "targets": (T,), "targets_dtype": "int32", "precision": "float32"} | change
    with pytest.raises(ValueError, match=f"^head_loss:? {message}"):
        head_loss(
            jnp.ones(case["x"]),
            jnp.ones(case["w"]),
            jnp.zeros(case["targets"], case["targets_dtype"]),
            case["precision"],
        )
