"""Adam and the groups: everything of the optimiser that is not Muon itself."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jax_speedrun.config import OptimizerConfig
from jax_speedrun.optimizer import adam, parameter_labels, recipe_optimizer, state_specs
from jax_speedrun.sharding import Shards
from tests.marks import slow
from tests.numpy_optimizer import (
    Float,
    normal,
    numpy_adam,
    numpy_muon,
    numpy_newton_schulz,
    relative_error,
    run,
    to_float32,
)

# --- Adam -------------------------------------------------------------------------


def test_adam_follows_the_float64_version() -> None:
    gradients = [normal(step, 5, 7) * 10.0 ** (-step) for step in range(8)]
    updates = run(adam(0.04), jnp.zeros((5, 7)), [to_float32(g) for g in gradients])
    for u, expected in zip(updates, numpy_adam(gradients, 0.04, 0.8, 0.95, 1e-10), strict=True):
        assert relative_error(u, expected) < 1e-5


def test_adam_epsilon_is_small_enough_for_tiny_gradients() -> None:
    gradients = [normal(0, 6) * 1e-9]
    (update,) = run(adam(1.0), jnp.zeros(6), [to_float32(gradients[0])])
    assert relative_error(update, numpy_adam(gradients, 1.0, 0.8, 0.95, 1e-10)[0]) < 1e-5
    assert np.abs(update).max() < 0.99  # with epsilon 0 it would be 1


def test_adam_on_bfloat16_rounds_only_what_it_stores() -> None:
    """Against float64 arithmetic whose moments are rounded to bfloat16 between steps."""
    gradients = [jnp.asarray(normal(step, 200), jnp.bfloat16) for step in range(10)]
    params = jnp.zeros(200, jnp.bfloat16)
    transform = adam(0.6)
    state = transform.init(params)
    first, second = np.zeros(200), np.zeros(200)

    def stored(x: Float) -> Float:
        return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float64)

    for step, g in enumerate(gradients, start=1):
        update, state = transform.update(g, state, params)
        assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int32)}
        g64 = np.asarray(g, np.float64)
        first, second = 0.8 * first + 0.2 * g64, 0.95 * second + 0.05 * g64**2
        expected = -0.6 * (first / (1 - 0.8**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-10)
        assert update.dtype == jnp.float32
        # A moment on the edge between two bfloat16 numbers may be stored either way.
        close = np.isclose(np.asarray(update), expected, rtol=1e-4)
        assert close.mean() > 0.98, step
        first, second = stored(first), stored(second)
    assert optax.apply_updates(params, update).dtype == jnp.bfloat16


def test_adam_leaves_untouched_rows_alone() -> None:
    (update,) = run(adam(0.6), jnp.ones((3, 4), jnp.bfloat16), [jnp.zeros((3, 4), jnp.bfloat16)])
    np.testing.assert_array_equal(update, 0)


# --- The recipe's groups ----------------------------------------------------------


def recipe_params(layers: int, width: int, without_attention: int) -> dict[str, Any]:
    """The tree of parameters of the whole model, as the trainer hands it over."""

    def block(layer: int) -> dict[str, Any]:
        attention = {
            "qkv_3CD": jnp.ones((3, width, width)),
            "lambdas": jnp.ones(2),
            "out_DC": jnp.ones((width, width)),
        }
        mlp = {"fc_FD": jnp.ones((4 * width, width)), "proj_DF": jnp.ones((width, 4 * width))}
        rest = {} if layer == without_attention else {"attention": attention}
        return {"lambdas": jnp.ones(2), "mlp": mlp, **rest}

    return {
        "embed": jnp.ones((20, width), jnp.bfloat16),
        "value_embeds": {i: jnp.ones((20, width), jnp.bfloat16) for i in range(3)},
        "head": jnp.ones((24, width)),
        "skip_weights": jnp.ones(layers // 2),
        "blocks": {layer: block(layer) for layer in range(layers)},
    }


def test_labels() -> None:
    labels = parameter_labels(recipe_params(layers=2, width=4, without_attention=1))
    mlp = {"fc_FD": "hidden", "proj_DF": "hidden"}
    assert labels == {
        "embed": "embeddings",
        "value_embeds": {0: "embeddings", 1: "embeddings", 2: "embeddings"},
        "head": "head",
        "skip_weights": "scalars",
        "blocks": {
            0: {
                "lambdas": "scalars",
                "attention": {"qkv_3CD": "hidden", "out_DC": "hidden", "lambdas": "scalars"},
                "mlp": mlp,
            },
            1: {"lambdas": "scalars", "mlp": mlp},
        },
    }


def dot_shapes(jaxpr: Any, repeats: int = 1) -> Iterator[tuple[int, ...]]:
    """The output shape of every matmul that runs, those in a scan as often as it goes round."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from [equation.outvars[0].aval.shape] * repeats
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from dot_shapes(inner, repeats * equation.params.get("length", 1))


def test_one_newton_schulz_batch_per_distinct_shape() -> None:
    """33 + 11 squares, 12 tall and 12 wide rectangles of the twelve-layer model: three stacks, 15 matmuls each."""
    params = recipe_params(layers=12, width=8, without_attention=7)
    transform = recipe_optimizer(OptimizerConfig(), steps=1385)
    state = transform.init(params)
    jaxpr = jax.make_jaxpr(transform.update)(params, state, params)
    shapes = sorted(dot_shapes(jaxpr.jaxpr))
    assert shapes == sorted(15 * [(44, 8, 8)] + 20 * [(12, 8, 8)] + 5 * [(12, 8, 32)] + 5 * [(12, 32, 8)])


def test_recipe_optimizer_gives_each_group_its_rule_and_rate() -> None:
    """At the first step Adam's update is -lr sign(g), and Muon's is -lr scale O."""
    params = recipe_params(layers=2, width=8, without_attention=1)
    leaves, structure = jax.tree.flatten(params)
    random = [jnp.asarray(normal(i, *leaf.shape), leaf.dtype) for i, leaf in enumerate(leaves)]
    gradients = jax.tree.unflatten(structure, random)
    (updates,) = run(recipe_optimizer(OptimizerConfig(newton_schulz_dtype="float32"), steps=10), params, [gradients])

    rates = {"embeddings": 0.6, "head": 0.008, "scalars": 0.04}
    labels = jax.tree.leaves(parameter_labels(params))
    for label, g, u in zip(labels, random, jax.tree.leaves(updates), strict=True):
        if label in rates:
            np.testing.assert_allclose(u, -rates[label] * np.sign(np.asarray(g, np.float32)), rtol=1e-5)
    fc = np.asarray(gradients["blocks"][1]["mlp"]["fc_FD"], np.float64)
    assert relative_error(updates["blocks"][1]["mlp"]["fc_FD"], -0.05 * 2 * numpy_newton_schulz(fc)) < 2e-5


def test_recipe_optimizer_cools_down_and_warms_momentum_up() -> None:
    steps, seen = 10, []
    gradients = [normal(step, 8, 8) for step in range(steps)]
    transform = recipe_optimizer(OptimizerConfig(momentum_warmup_steps=4, newton_schulz_dtype="float32"), steps)
    params = {"blocks": jnp.zeros((8, 8)), "skip_weights": jnp.zeros(2)}
    for u in run(transform, params, [{"blocks": to_float32(g), "skip_weights": jnp.ones(2)} for g in gradients]):
        seen.append(u)

    factors = [1, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325]
    np.testing.assert_allclose([u["skip_weights"][0] for u in seen], [-0.04 * f for f in factors], rtol=1e-4)
    expected = numpy_muon(
        gradients, lambda step: 0.05 * factors[step], lambda step: 0.85 + 0.1 * min(step / 4, 1), nesterov=True
    )
    for u, e in zip(seen, expected, strict=True):
        assert relative_error(u["blocks"], e) < 5e-5


@pytest.mark.parametrize(
    ("missing", "devices"),
    [
        ("all", 1),
        ("hidden", 2),
        *(slow(missing, devices) for missing in ("head", "embeddings", "scalars") for devices in (1, 2)),
        slow("hidden", 1),
        slow("all", 2),
    ],
)
def test_a_group_may_have_no_parameters(missing: str, devices: int) -> None:
    whole = recipe_params(layers=2, width=4, without_attention=1)
    labels = parameter_labels(whole)
    kept = {
        jax.tree_util.keystr(path): leaf
        for (path, leaf), label in zip(jax.tree.leaves_with_path(whole), jax.tree.leaves(labels), strict=True)
        if missing not in (label, "all")
    }
    # Named as the labels ask for.
    params = {
        name: {path: leaf for path, leaf in kept.items() if path.startswith(f"['{name}']")}
        for name in ("embed", "value_embeds", "head", "blocks", "skip_weights")
    }
    shards = Shards("data", devices) if devices > 1 else None
    transform = recipe_optimizer(OptimizerConfig(), 10, shards)
    state = transform.init(params)
    update = transform.update
    if shards is not None:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
        specs = state_specs(state, shards)
        everywhere = PartitionSpec()
        update = jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(everywhere, specs, everywhere),
            out_specs=(everywhere, specs),
            check_vma=False,
        )
    updates, state = jax.jit(update)(params, state, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert all(np.isfinite(u).all() and np.any(u) for u in jax.tree.leaves(updates))
