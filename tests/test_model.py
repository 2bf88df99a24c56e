"""The model against an independent float64 NumPy forward, and its gradients against finite differences of that."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_speedrun.config import PRESETS, ModelConfig
from jax_speedrun.kernels.layer.residual import rstd
from jax_speedrun.model import GPT
from tests.hlo import dot_flops, text
from tests.marks import slow
from tests.numpy_model import forward_loss

CONFIG = ModelConfig(
    vocab_size=50257,
    padded_vocab_size=256,
    layers=6,
    width=32,
    heads=2,
    head_width=16,
    mlp_width=48,
    long_layers=(0, 2, 5),
    attention_free_layers=(3,),
    value_embedding_tables=2,
    table_dtype="float32",
    compute_dtype="float32",
    head_precision="float32",
    evaluation_precision="float32",
)
TOKENS = 512


@functools.cache
def setup(seed=0):
    """Random parameters (the recipe's zeros would hide most of the model), tokens with documents, targets."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(GPT(CONFIG, nnx.Rngs(seed)))

    def randomise(path, leaf):
        scale = 1.0 if leaf.ndim == 1 or "embed" in jax.tree_util.keystr(path) else 1 / np.sqrt(leaf.shape[-1])
        return scale * rng.standard_normal(leaf.shape).astype(np.float32)

    params = jax.tree.map_with_path(randomise, nnx.to_pure_dict(state))
    tokens = rng.integers(0, 256, TOKENS).astype(np.int32)
    tokens[[0, 50, 128, 200, 201, 383]] = 50256
    targets = rng.integers(0, 256, TOKENS).astype(np.int32)
    return graph, params, tokens, targets


@functools.cache
def jitted(implementation):
    graph, *_ = setup()

    def loss(params, tokens, targets, window):
        return nnx.merge(graph, params).loss(
            tokens, targets, window, attention=implementation, head_precision="float32"
        )

    return jax.jit(jax.value_and_grad(loss))


def numpy_loss(params, tokens, targets, window):
    return forward_loss(
        params,
        tokens,
        targets,
        window,
        heads=CONFIG.heads,
        head_width=CONFIG.head_width,
        long_layers=CONFIG.long_layers,
        attention_free_layers=CONFIG.attention_free_layers,
        value_embedding_layers={0: 0, 1: 1, 4: 0, 5: 1},
    )


@pytest.mark.parametrize("window", [slow(1), 2, slow(3), slow(14)])
@pytest.mark.parametrize("implementation", [slow("reference"), "xla"])
def test_loss_equals_numpy(implementation, window):
    _, params, tokens, targets = setup()
    loss, _ = jitted(implementation)(params, tokens, targets, jnp.int32(window))
    want, _ = numpy_loss(params, tokens, targets, window)
    np.testing.assert_allclose(float(loss), want, rtol=1e-5)


def test_logits_equal_numpy():
    graph, params, tokens, targets = setup()
    logits = nnx.merge(graph, params).logits(
        jnp.asarray(tokens), jnp.arange(100, TOKENS, 7), jnp.int32(2), attention="xla"
    )
    want = numpy_loss(params, tokens, targets, 2)[1][100::7]
    assert np.linalg.norm(logits - want) / np.linalg.norm(want) < 1e-5


def test_gradient_equals_finite_differences_for_every_kind_of_weight():
    """Central differences of the float64 oracle, along one random direction for each parameter array."""
    _, params, tokens, targets = setup()
    _, gradient = jitted("xla")(params, tokens, targets, jnp.int32(2))
    rng = np.random.default_rng(1)
    kinds = {}
    for path, leaf in jax.tree.leaves_with_path(gradient):
        # One of each kind, from a layer in the middle where there is a choice.
        kinds[jax.tree_util.keystr(tuple(key for key in path if not isinstance(key.key, int)))] = (path, leaf)
    assert len(kinds) == 10
    for name, (path, leaf) in kinds.items():
        direction = rng.standard_normal(leaf.shape)
        if "embed" in name:
            direction[np.setdiff1d(np.arange(len(direction)), tokens)] = 0

        def moved(step, path=path, direction=direction):
            tree = copy.deepcopy(params)
            node = tree
            for key in path[:-1]:
                node = node[key.key]
            node[path[-1].key] = np.asarray(node[path[-1].key], np.float64) + step * direction
            return numpy_loss(tree, tokens, targets, 2)[0]

        step = 1e-5
        difference = (moved(step) - moved(-step)) / (2 * step)
        along = float(np.sum(np.asarray(leaf, np.float64) * direction))
        assert abs(along - difference) < 2e-4 * max(abs(difference), 1e-3), (name, along, difference)


@pytest.mark.slow
def test_the_scale_of_a_norm_is_known(monkeypatch):
    """Whoever uses it returns its gradient as part of x's: another way back would cost a pass over x for zeros."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def counted(x_TD, epsilon):
        return rstd(x_TD, epsilon)

    differentiated = []

    def backward(epsilon, x_TD, d_scale_T):
        differentiated.append(x_TD.shape)
        return jax.vjp(lambda x_TD: rstd(x_TD, epsilon), x_TD)[1](d_scale_T)

    counted.defvjp(lambda x_TD, epsilon: (counted(x_TD, epsilon), x_TD), backward)
    monkeypatch.setattr("jax_speedrun.model.rstd", counted)
    graph, params, tokens, targets = setup()

    def loss(params):
        model = nnx.merge(graph, params)
        return model.loss(tokens, targets, jnp.int32(1), attention="xla", head_precision="float32")

    jax.grad(loss)(params)
    assert len(differentiated) == 2  # of the embedding and of the last layer, which are written as normalised


def test_initial_loss_is_uniform_and_parameters_are_the_records():
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(GPT(PRESETS["sub3min"].model, nnx.Rngs(0)))))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    matrices = [leaf for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim > 1]
    assert round(count / 1e6, 1) == 275.6
    assert round(sum(leaf.size for leaf in matrices) / 1e6, 1) == 82.6
    assert {leaf.dtype for leaf in matrices} == {jnp.dtype("float32")}
    assert params["embed"].dtype == params["value_embeds"][2].dtype == jnp.bfloat16
    assert "attention" not in params["blocks"][7]


def test_initial_values():
    model = GPT(CONFIG, nnx.Rngs(3))
    qkv = np.asarray(model.blocks[0].attention.qkv_3CD[...])
    np.testing.assert_allclose(qkv.std(), 0.5 / np.sqrt(CONFIG.width), rtol=0.05)
    assert abs(qkv).max() <= np.sqrt(3) * 0.5 / np.sqrt(CONFIG.width)
    np.testing.assert_allclose(np.asarray(model.embed[...]).std(), 1, rtol=0.01)
    for zero in (model.head, model.blocks[0].attention.out_DC, model.blocks[0].mlp.proj_DF):
        assert not np.asarray(zero[...]).any()
    tokens = jnp.arange(128)
    loss = model.loss(tokens, tokens, jnp.int32(1), head_precision="float32")
    np.testing.assert_allclose(float(loss), np.log(CONFIG.padded_vocab_size), rtol=1e-6)


def test_bfloat16_stays_near_float32():
    import dataclasses

    graph, params, tokens, targets = setup()
    narrow = dataclasses.replace(CONFIG, table_dtype="bfloat16", compute_dtype="bfloat16")
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(narrow, nnx.Rngs(0))))
    loss = jax.jit(lambda p: nnx.merge(graph, p).loss(tokens, targets, jnp.int32(2), head_precision="fp8_emulated"))(
        params
    )
    want, _ = numpy_loss(params, tokens, targets, 2)
    np.testing.assert_allclose(float(loss), want, rtol=2e-2)


def test_flops_of_attention_are_those_of_its_products():
    """Attention with all scores in memory multiplies every pair, seen or not."""
    q = jnp.ones((TOKENS, CONFIG.heads, CONFIG.head_width))

    def attention(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k), where=jnp.tri(TOKENS, dtype=bool))
        return jnp.einsum("hts,shk->thk", weights, v).sum()

    gradient = jax.value_and_grad(attention, argnums=(0, 1, 2))
    flops = dot_flops(text(jax.jit(gradient).lower(q, q, q)))
    one_layer = dataclasses.replace(CONFIG, layers=1, long_layers=(0,), attention_free_layers=())
    assert one_layer.attention_flops(TOKENS**2, 0) == flops > 0


def test_flops_of_attention_add_up_over_the_layers():
    per_pair = 12 * CONFIG.heads * CONFIG.head_width
    assert CONFIG.attention_flops(1000, 10) == per_pair * (3 * 1000 + 2 * 10)  # 0, 2 and 5 long, 1 and 4 short
    record = ModelConfig()
    assert record.attention_flops(1000, 10) == 12 * 768 * (3 * 1000 + 8 * 10)
