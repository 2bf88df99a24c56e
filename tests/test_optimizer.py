"""Newton-Schulz and Muon against float64 NumPy, the SVD, and optax where the two agree by definition."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from jax_speedrun import schedules
from jax_speedrun.optimizer import muon, newton_schulz
from tests.marks import slow
from tests.numpy_optimizer import (
    Float,
    normal,
    numpy_muon,
    numpy_newton_schulz,
    polynomial,
    relative_error,
    run,
    to_float32,
)

# --- Newton-Schulz ----------------------------------------------------------------


def matrix_with_spectrum(singular_values: Float, rows: int, columns: int) -> tuple[Float, Float, Float]:
    u = np.linalg.qr(normal(1, rows, rows))[0][:, : len(singular_values)]
    v = np.linalg.qr(normal(2, columns, columns))[0][:, : len(singular_values)]
    return u @ np.diag(singular_values) @ v.T, u, v


@pytest.mark.parametrize("shape", [slow((12, 12)), (12, 40), slow((40, 12))])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_singular_values_land_where_the_polynomial_says(
    shape: tuple[int, int], steps: int, dtype: type, tolerance: float
) -> None:
    s = np.geomspace(3.0, 3e-3, 12)
    matrix, u, v = matrix_with_spectrum(s, *shape)
    with jax.enable_x64(dtype is np.float64):
        out = newton_schulz(jnp.asarray(matrix, dtype), steps=steps, dtype=dtype)
        assert out.dtype == dtype
        out64 = np.asarray(out, np.float64)
    # In the bases of the input's singular vectors, the output must be diagonal.
    expected = polynomial(s / (np.linalg.norm(s) + 1e-7), steps)
    np.testing.assert_allclose(u.T @ out64 @ v, np.diag(expected), atol=tolerance)
    np.testing.assert_allclose(out64, u @ np.diag(expected) @ v.T, atol=tolerance)


def test_five_steps_bring_singular_values_near_one_but_not_to_one() -> None:
    s = np.geomspace(1, 2e-3, 64)
    matrix, _, _ = matrix_with_spectrum(s / np.linalg.norm(s), 64, 64)
    s_in = np.linalg.svd(matrix, compute_uv=False)
    s_out = np.linalg.svd(np.asarray(newton_schulz(jnp.asarray(matrix), dtype=jnp.float32)), compute_uv=False)
    assert s_in.min() < 1e-3  # below the range that the docstring speaks of
    assert s_out.max() < 1.21
    above = np.linspace(2e-3, 1, 100_001)
    assert 0.68 < polynomial(above, 5).min() < 0.69
    assert 1.20 < polynomial(above, 5).max() < 1.21


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 3, 8, 24), (2, 24, 8), (5, 7)])
def test_leading_axes_are_independent_matrices(shape: tuple[int, ...]) -> None:
    matrices = normal(3, *shape) * np.exp(normal(4, *shape[:-2], 1, 1))
    out = np.asarray(newton_schulz(jnp.asarray(matrices, jnp.float32), dtype=jnp.float32))
    assert out.shape == shape
    for index in np.ndindex(*shape[:-2]):
        np.testing.assert_allclose(out[index], numpy_newton_schulz(matrices[index]), atol=3e-5)


def test_transposing_the_input_transposes_the_output() -> None:
    matrices = jnp.asarray(normal(5, 4, 30, 12), jnp.float32)
    np.testing.assert_array_equal(newton_schulz(matrices), newton_schulz(matrices.mT).mT)


def test_bfloat16_is_the_default_and_stays_close_to_float32() -> None:
    matrices = jnp.asarray(normal(6, 3, 64, 96), jnp.float32)
    rough, exact = newton_schulz(matrices), newton_schulz(matrices, dtype=jnp.float32)
    assert rough.dtype == jnp.bfloat16
    difference = relative_error(rough, np.asarray(exact, np.float64))
    assert 1e-4 < difference < 0.03  # coefficients in bfloat16 would make it 0.06
    s = np.linalg.svd(np.asarray(rough, np.float64), compute_uv=False)
    assert s.min() > 0.6
    assert s.max() < 1.3


def test_scale_of_the_input_does_not_matter() -> None:
    matrix = jnp.asarray(normal(7, 16, 16), jnp.float32)
    for factor in (1e-4, 1e6):
        np.testing.assert_allclose(
            newton_schulz(factor * matrix, dtype=jnp.float32), newton_schulz(matrix, dtype=jnp.float32), atol=5e-4
        )


def test_epsilon_is_added_to_the_norm() -> None:
    matrix = normal(8, 16, 16)
    matrix *= 1e-7 / np.linalg.norm(matrix)  # norm + epsilon is then twice the norm
    out = newton_schulz(jnp.asarray(matrix, jnp.float32), dtype=jnp.float32)
    assert relative_error(out, numpy_newton_schulz(matrix)) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [slow(jnp.float16, 0.03), (jnp.bfloat16, 0.12), slow(jnp.float32, 1e-5)],
    ids=lambda x: str(x),
)
@pytest.mark.parametrize("shape", [(24, 40), slow((40, 24))])
def test_any_number_of_steps_in_any_type_traced_or_not(dtype: Any, tolerance: float, shape: tuple[int, int]) -> None:
    matrix = normal(9, *shape)
    traced = jax.jit(lambda m, steps: newton_schulz(m, steps=steps, dtype=dtype))
    for steps in (0, 1, 2, 3, 5, 17, 18, 40, 1000):
        expected = numpy_newton_schulz(matrix, steps)
        known = newton_schulz(jnp.asarray(matrix, jnp.float32), steps=steps, dtype=dtype)
        for out in (known, traced(jnp.asarray(matrix, jnp.float32), steps)):
            assert out.dtype == dtype
            s = np.linalg.svd(np.asarray(out, np.float64), compute_uv=False)
            # After many steps a value wanders on from its last rounding, within these bounds.
            assert steps < 5 or (s.min() > 0.66 and s.max() < 1.23)
            assert steps > 40 or relative_error(out, expected) < tolerance


def test_a_norm_that_overflows_is_not_taken_for_zero() -> None:
    huge = jnp.stack([jnp.full((3, 4), 1e25), jnp.full((3, 4), 1e15)])
    out = np.asarray(newton_schulz(huge, dtype=jnp.float32))
    assert np.isnan(out[0]).all()
    np.testing.assert_allclose(out[1], numpy_newton_schulz(np.ones((3, 4))), atol=1e-4)


def test_newton_schulz_takes_numpy_and_no_matrices() -> None:
    matrices = normal(10, 2, 5, 7).astype(np.float32)
    np.testing.assert_array_equal(newton_schulz(matrices), newton_schulz(jnp.asarray(matrices)))
    for shape in ((0, 3, 4), (2, 0, 4), (2, 4, 0)):
        assert newton_schulz(np.ones(shape, np.float32)).shape == shape


def test_newton_schulz_rejects_integers() -> None:
    with pytest.raises(ValueError, match="computes with floats, got dtype int32"):
        newton_schulz(jnp.ones((3, 3)), dtype=jnp.int32)


def test_newton_schulz_rejects_vectors() -> None:
    with pytest.raises(ValueError, match=r"\(\.\.\., rows, columns\), got shape \(4,\)"):
        newton_schulz(jnp.ones(4))


# --- Muon -------------------------------------------------------------------------

SHAPES = {"qkv": (3, 16, 16), "out": (16, 16), "fc": (40, 16), "proj": (16, 40)}


def gradients_for(steps: int) -> list[dict[str, Float]]:
    return [
        {name: normal(100 * step + i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
        for step in range(steps)
    ]


def zeros() -> dict[str, Array]:
    return {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_follows_the_float64_version(nesterov: bool) -> None:
    """Six steps of a five-step warm-up and of a decaying learning rate, on every kind of leaf."""
    gradients = gradients_for(6)

    def momentum(step: int) -> float:
        f = min(step / 5, 1)
        return 0.85 * (1 - f) + 0.95 * f

    transform = muon(
        lambda step: 0.05 / (1 + step), lambda step: schedules.momentum(step, 5), nesterov=nesterov, dtype=jnp.float32
    )
    updates = run(transform, zeros(), [to_float32(g) for g in gradients])
    for name, shape in SHAPES.items():
        for index in np.ndindex(*shape[:-2]):
            expected = numpy_muon([g[name][index] for g in gradients], lambda s: 0.05 / (1 + s), momentum, nesterov)
            for step, u in enumerate(expected):
                assert relative_error(updates[step][name][index], u) < 2e-5, (name, index, step)


@pytest.mark.slow
def test_muon_in_bfloat16_stays_close_to_float32() -> None:
    gradients = [to_float32(g) for g in gradients_for(3)]
    rough, exact = run(muon(0.05), zeros(), gradients), run(muon(0.05, dtype=jnp.float32), zeros(), gradients)
    for a, b in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.float32
        # Small matrices suffer most: rounding averages out over a longer sum.
        assert 1e-4 < relative_error(a, np.asarray(b, np.float64)) < 0.05


def optax_muon(nesterov: bool) -> optax.GradientTransformation:
    every_leaf = functools.partial(jax.tree.map, lambda _: optax.contrib.MuonDimensionNumbers(-2, -1))
    return optax.contrib.muon(0.05, nesterov=nesterov, muon_weight_dimension_numbers=every_leaf)


@pytest.mark.parametrize(("nesterov", "steps"), [(False, 4), (True, 1)])
def test_muon_agrees_with_optax(nesterov: bool, steps: int) -> None:
    """optax corrects the momentum's bias: a mere scale, which the norm divides away.

    Not so with Nesterov, where optax corrects its two terms differently, except at
    the first step, where they are parallel. optax multiplies from the other side
    (inputs are rows), so it gets the transposed problem.
    """

    def flip(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.mT, tree)

    gradients = [to_float32(g) for g in gradients_for(steps)]
    ours = run(muon(0.05, nesterov=nesterov, dtype=jnp.float32), zeros(), gradients)
    theirs = run(optax_muon(nesterov), flip(zeros()), [flip(g) for g in gradients])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(flip(theirs)), strict=True):
        assert relative_error(a, np.asarray(b, np.float64)) < 5e-5


def test_stacking_changes_nothing() -> None:
    gradients = [to_float32(g) for g in gradients_for(2)]
    together = run(muon(0.05, dtype=jnp.float32), zeros(), gradients)
    for name in SHAPES:
        alone = run(muon(0.05, dtype=jnp.float32), {name: zeros()[name]}, [{name: g[name]} for g in gradients])
        for a, b in zip(together, alone, strict=True):
            assert relative_error(a[name], np.asarray(b[name], np.float64)) < 1e-5


def test_the_iteration_compiles_without_a_loop() -> None:
    transform = muon(0.05)
    hlo = jax.jit(transform.update).lower(zeros(), transform.init(zeros())).compile().as_text()
    assert hlo is not None
    assert "while(" not in hlo


def test_zero_gradient_gives_zero_update() -> None:
    for u in jax.tree.leaves(run(muon(0.05), zeros(), [zeros()] * 2)):
        np.testing.assert_array_equal(u, 0)


def test_a_broken_matrix_does_not_touch_its_neighbours() -> None:
    gradients = to_float32(gradients_for(1)[0])
    broken = gradients | {"out": jnp.full((16, 16), jnp.nan)}
    (good,), (bad,) = (run(muon(0.05), zeros(), [g]) for g in (gradients, broken))
    assert np.isnan(bad["out"]).all()
    for name in ("qkv", "fc", "proj"):
        np.testing.assert_array_equal(good[name], bad[name])


@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (3, 4, 0), (0, 4, 4)])
def test_muon_names_a_parameter_that_is_no_matrix(shape: tuple[int, ...]) -> None:
    params = {"blocks": {3: {"lambdas": jnp.ones(shape)}}}
    with pytest.raises(ValueError, match=r"'blocks/3/lambdas' has shape .* optax\.partition"):
        muon(0.05).init(params)


@pytest.mark.slow
def test_muon_composes() -> None:
    """chain, inject_hyperparams, schedules and jit around it give what it gives alone."""
    gradients = [to_float32(g) for g in gradients_for(3)]
    plain = run(muon(0.05, 0.9), zeros(), gradients)

    injected = optax.inject_hyperparams(muon)(0.05, 0.9)
    unrolled = optax.inject_hyperparams(muon, static_args="newton_schulz_steps")
    chained = optax.chain(optax.identity(), unrolled(optax.constant_schedule(0.05), lambda _: 0.9))
    for transform in (injected, chained):
        for a, b in zip(run(transform, zeros(), gradients), plain, strict=True):
            for name in SHAPES:
                # Unrolled or not, XLA rounds at different places: the noise of bfloat16, no more.
                assert relative_error(a[name], np.asarray(b[name], np.float64)) < 0.05

    state = injected.init(zeros())
    state.hyperparams["learning_rate"] = jnp.float32(0)
    updates, _ = injected.update(gradients[0], state, zeros())
    assert all(not np.any(u) for u in jax.tree.leaves(updates))


def test_muon_under_partition_sees_masked_leaves() -> None:
    params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}
    gradients = {"w": jnp.asarray(normal(1, 4, 4), jnp.float32), "b": jnp.ones(4)}
    both = optax.partition({"muon": muon(0.05), "sgd": optax.sgd(0.5)}, {"w": "muon", "b": "sgd"})
    (updates,) = run(both, params, [gradients])
    (alone,) = run(muon(0.05), {"w": params["w"]}, [{"w": gradients["w"]}])
    np.testing.assert_array_equal(updates["w"], alone["w"])
    np.testing.assert_array_equal(updates["b"], -0.5 * np.ones(4))


def test_muon_without_matrices_has_empty_updates() -> None:
    """As where every leaf is masked, frozen, or another optimiser's."""
    empty: dict[str, Any] = {}
    assert run(muon(0.05), empty, [empty]) == [{}]
    params = {"w": jnp.ones((4, 4))}
    frozen = optax.partition({"muon": muon(0.05), "frozen": optax.set_to_zero()}, {"w": "frozen"})
    (updates,) = run(frozen, params, [params])
    assert not np.any(updates["w"])
    (untouched,) = run(optax.masked(muon(0.05), {"w": False}), params, [params])
    np.testing.assert_array_equal(untouched["w"], params["w"])


@pytest.mark.parametrize("given", [True, False])
def test_updates_have_the_dtype_of_the_parameters(given: bool) -> None:
    params = {"wide": jnp.zeros((6, 4)), "narrow": jnp.zeros((4, 4), jnp.bfloat16)}
    gradient = {"wide": jnp.asarray(normal(1, 6, 4), jnp.bfloat16), "narrow": jnp.asarray(normal(2, 4, 4), jnp.float32)}
    transform = muon(0.05)
    state = transform.init(params)
    updates, state = transform.update(gradient, state, params if given else None)
    assert {name: u.dtype for name, u in updates.items()} == {"wide": jnp.float32, "narrow": jnp.bfloat16}
    assert jax.tree.map(lambda m: m.dtype, state[0].momentum) == {"wide": jnp.float32, "narrow": jnp.bfloat16}
