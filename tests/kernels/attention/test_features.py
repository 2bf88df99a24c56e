"""What attention can do besides, of both plain implementations, against float64 NumPy; and where it can be called."""

import functools
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_speedrun.kernels.attention import block_sparse_attention
from jax_speedrun.kernels.attention.flax_nnx import attention_fn
from jax_speedrun.kernels.attention.scores import alibi, score_fn, score_mod
from jax_speedrun.kernels.block_mask import BlockMask
from jax_speedrun.kernels.implementation import compiling_for_hopper, interpret_kernels
from jax_speedrun.kernels.masks import causal, mask_fn, prefix, same_document, window
from tests.marks import slow
from tests.numpy_attention import whole_attention

IMPLEMENTATIONS = ("reference", "xla")
QUERIES, KEYS, HEADS, SHARED, WIDTH, VALUES = 45, 38, 4, 2, 8, 12  # neither length is a multiple of the blocks of 8
SLOPES = np.exp2(-8 * np.arange(1, HEADS + 1) / HEADS)
Q, S = np.arange(QUERIES)[:, None], np.arange(KEYS)
ALIBI = SLOPES[:, None, None] * (S - Q)
PER_HEAD = (Q + S * np.arange(HEADS)[:, None, None]) % 5 != 0


def per_head(head, query, key, query_data, key_data, scalars):
    return (query + key * head) % 5 != 0


def make_inputs(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = [(QUERIES, HEADS, WIDTH), (KEYS, SHARED, WIDTH), (KEYS, SHARED, VALUES), (QUERIES, HEADS, VALUES)]
    q, k, v, d_output = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return q, k, v, d_output, rng.standard_normal(HEADS).astype(np.float32), rng.standard_normal((QUERIES, HEADS))


NEAR = window(left=5, right=3)
VISIBLE = (Q - S <= 5) & (S - Q <= 3)
CASES = {
    "plain": ({}, {}, NEAR, VISIBLE),
    "scale": ({"scale": -0.7}, {"scale": -0.7}, NEAR, VISIBLE),
    "soft cap": ({"soft_cap": 1.5}, {"soft_cap": 1.5}, NEAR, VISIBLE),
    "alibi": ({"score_fn": alibi(heads=HEADS)}, {"bias": ALIBI}, NEAR, VISIBLE),
    "function": (
        {"score_fn": score_fn(lambda s, h, q, k, by: s + by * jnp.cos(q - k) * h, scalars=jnp.float32(0.3))},
        {"bias": 0.3 * np.cos(Q - S) * np.arange(HEADS)[:, None, None]},
        NEAR,
        VISIBLE,
    ),
    "sinks": ({"sinks": True}, {"sinks": True}, NEAR, VISIBLE),
    "mask of heads": ({}, {}, NEAR & mask_fn(per_head, heads=HEADS), VISIBLE & PER_HEAD),
    "all": (
        {"soft_cap": 2.0, "score_fn": alibi(heads=HEADS), "sinks": True, "scale": 0.9},
        {"soft_cap": 2.0, "bias": ALIBI, "sinks": True, "scale": 0.9},
        NEAR & mask_fn(per_head, heads=HEADS),
        VISIBLE & PER_HEAD,
    ),
}


@functools.partial(jax.jit, static_argnames=("implementation", "options"))
def run(q, k, v, d_output, sinks, d_lse, mask, score, *, implementation, options):
    def attend(q, k, v, sinks):
        return block_sparse_attention(
            q, k, v, mask, score_fn=score, sinks=sinks, return_residual=True, implementation=implementation,
            **dict(options),
        )  # fmt: skip

    (output, lse), pull = jax.vjp(attend, q, k, v, sinks)
    return output, lse, *pull((d_output, d_lse))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", [slow("reference"), "xla"])
def test_features(implementation, case):
    """Grouped heads, values of another width, other lengths, the log-sum-exp and its gradient, in every case."""
    options, truth, predicate, visible = CASES[case]
    q, k, v, d_output, sinks, d_lse = make_inputs()
    sinks = sinks if "sinks" in options else None
    # The last queries are behind the window of all keys, and see none: their log-sum-exp is -inf, with no gradient.
    sees = np.broadcast_to(visible, (HEADS, QUERIES, KEYS)).any(-1).T
    assert (~sees).any()
    d_lse = np.where(sees | (sinks is not None), d_lse, 0).astype(np.float32)
    static = tuple((name, options[name]) for name in ("scale", "soft_cap") if name in options)
    mask = BlockMask.from_mask(predicate, QUERIES, KEYS, block_size=8)
    got = run(
        q, k, v, d_output, sinks, d_lse, mask, options.get("score_fn"), implementation=implementation, options=static
    )
    want = whole_attention(
        q, k, v, d_output, visible, truth.get("scale", 1 / math.sqrt(WIDTH)), soft_cap=truth.get("soft_cap"),
        bias=truth.get("bias"), sinks=sinks, d_lse=d_lse,
    )  # fmt: skip
    for name, one, other in zip(want._fields, got, want, strict=True):
        if one is not None:
            np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("dtype", [slow("float16"), "bfloat16"])
def test_half_precisions_are_within_their_rounding(dtype):
    q, k, v, d_output, sinks, d_lse = (jnp.asarray(x, dtype) for x in make_inputs())
    mask = BlockMask.from_mask(NEAR, QUERIES, KEYS, block_size=8)
    sees = VISIBLE.any(-1)[:, None]
    sinks, d_lse = sinks.astype(jnp.float32), jnp.where(sees, d_lse, 0).astype(jnp.float32)
    got = run(q, k, v, d_output, sinks, d_lse, mask, None, implementation="xla", options=(("soft_cap", 2.0),))
    want = whole_attention(
        *(np.asarray(x, np.float64) for x in (q, k, v, d_output)), VISIBLE, 1 / math.sqrt(WIDTH), soft_cap=2.0,
        sinks=np.asarray(sinks), d_lse=np.asarray(d_lse),
    )  # fmt: skip
    assert [x.dtype.name for x in got] == [dtype, "float32", dtype, dtype, dtype, "float32"]
    for one, other in zip(got, want, strict=True):
        error = np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other)
        assert error < {"float16": 1.5e-3, "bfloat16": 1e-2}[dtype]


@pytest.mark.slow
def test_flex_score_functions_know_their_head_and_positions():
    q, k, v, *_ = make_inputs()
    mask = BlockMask.from_mask(NEAR, QUERIES, KEYS, block_size=8)
    mod = score_mod(lambda score, b, h, q_idx, kv_idx: score + jnp.exp2(-2.0 * (h + 1)) * (kv_idx - q_idx))
    got, want = (
        block_sparse_attention(q, k, v, mask, score_fn=one, implementation=name)
        for one, name in ((mod, "xla"), (alibi(heads=HEADS), "reference"))
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_numbers_of_score_functions_are_constants_but_in_the_reference():
    q, k, v, *_ = make_inputs()
    mask = BlockMask.from_mask(NEAR, QUERIES, KEYS, block_size=8)

    def loss(slopes, implementation):
        output = block_sparse_attention(q, k, v, mask, score_fn=alibi(slopes=slopes), implementation=implementation)
        return jnp.sum(output**2)

    slopes, step = jnp.asarray(SLOPES, jnp.float32), 1e-2
    one = step * jnp.eye(HEADS)[1]
    slope = (loss(slopes + one, "reference") - loss(slopes - one, "reference")) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(slopes, "reference")[1], slope, rtol=1e-2)
    with pytest.raises(TypeError, match=r"^block_sparse_attention: the score function has no gradient here"):
        jax.grad(loss)(slopes, "xla")


def test_a_score_function_that_is_none_is_one_line():
    for make, message in (
        (lambda: score_fn(lambda s, h, q, k, by: q > k), "must return one score for a pair"),
        (lambda: score_fn(lambda s, h, q, k, by: s if q > k else 0 * s), r"decides something in Python .* jnp\.where"),
        (lambda: alibi(), "give either heads=H, for the paper's slopes, or slopes"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


LACKS = {
    "score function": ({"score_fn": alibi(heads=2)}, "no score function but a soft cap"),
    "both": ({"score_fn": alibi(heads=2), "soft_cap": 30.0}, "no score function but a soft cap"),
    "mask": (
        {"mask": causal() & window(left=100)},
        r"the mask causal\(\) & same_document\(ids\), got causal\(\) & wind",
    ),
    "length": ({"length": 250}, "T a multiple of 128, got 250"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_what_hopper_lacks_is_said_and_auto_goes_without(lack):
    options, message = LACKS[lack]
    options = dict(options)
    length = options.pop("length", 256)
    q = jnp.zeros((length, 2, 64), jnp.bfloat16)
    rule = options.pop("mask", causal() & same_document(np.zeros(length, int)))
    mask = BlockMask.from_mask(rule, length)

    def attend(implementation):
        return jax.eval_shape(
            lambda q: block_sparse_attention(q, q, q, mask, implementation=implementation, **options), q
        )

    with compiling_for_hopper():
        attend("auto")
        with pytest.raises(ValueError, match=f"needs {message}.*; use 'xla' or 'auto'"):
            attend("hopper")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16)])
def test_hopper_has_what_the_op_promises(dtype):
    """Grouped heads, soft cap, sinks and the log-sum-exp, forward and backward, in the interpreter."""
    rng = np.random.default_rng(5)
    q, k, v, d_output = (jnp.asarray(rng.standard_normal((128, heads, 64)), dtype) for heads in (2, 1, 1, 2))
    sinks, d_residual = jnp.asarray([0.5, -1.0]), jnp.asarray(rng.standard_normal((128, 2)), jnp.float32)
    mask = BlockMask.from_mask(causal() & same_document(np.arange(128) // 50), 128)

    def run(implementation, wide):
        def attend(q, k, v, sinks):
            return block_sparse_attention(
                q, k, v, mask, soft_cap=2.0, sinks=sinks, return_residual=True, implementation=implementation
            )

        results, pull = jax.vjp(attend, *(x.astype(wide) for x in (q, k, v)), sinks)
        return *results, *pull((d_output.astype(wide), d_residual))

    with interpret_kernels():
        got = run("hopper", dtype)
    for name, one, expected in zip(
        ("output", "log-sum-exp", "dq", "dk", "dv", "dsinks"), got, run("reference", jnp.float32), strict=True
    ):
        error = np.linalg.norm(np.asarray(one, np.float32) - expected) / np.linalg.norm(expected)
        assert error < 6e-3, (name, error)


def batch_of(count, tokens=24, heads=4):
    rng = np.random.default_rng(3)
    ids_NT = jnp.asarray(np.cumsum(rng.random((count, tokens)) < 0.1, axis=1))
    shapes = [(count, tokens, heads, 8), (count, tokens, heads // 2, 8), (count, tokens, heads // 2, 8)]
    return ids_NT, *(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def rule_of(ids):
    return (causal() & window(left=7) | prefix(2)) & same_document(ids)


def losses_and_gradients(attend):
    """Of a function of (ids, q, k, v), jitted; the loss weighs every output and residual differently."""

    def loss(q, k, v, ids):
        output, lse = attend(ids, q, k, v)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(lse)), (output, lse)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


def attend_batch(ids, q, k, v, implementation="xla"):
    mask = jax.vmap(lambda ids: BlockMask.from_mask(rule_of(ids), ids.shape[0], block_size=8))(ids)
    return block_sparse_attention(q, k, v, mask, return_residual=True, implementation=implementation)


@pytest.fixture(scope="module")
def batch_truth():
    ids, q, k, v = batch_of(4)
    return jax.jit(losses_and_gradients(functools.partial(attend_batch, implementation="reference")))(q, k, v, ids)


def assert_same(got, want):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5), got, want)


def over_mesh(spec_of_heads, spec_of_batch, attend=attend_batch):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    of_x, of_ids = P(spec_of_batch, None, spec_of_heads), P(spec_of_batch)
    return jax.shard_map(attend, mesh=mesh, in_specs=(of_ids, of_x, of_x, of_x), out_specs=(of_x, of_x))


def scanned(ids, q, k, v):
    def body(carry, one):
        return carry, attend_batch(*(x[None] for x in one))

    _, results = jax.lax.scan(body, None, (ids, q, k, v))
    return jax.tree.map(lambda x: x[:, 0], results)


PLACES = {
    "batch axis": attend_batch,
    "shard_map over heads": over_mesh("d", None),
    "shard_map over the batch": over_mesh(None, "d"),
    "vmap": jax.vmap(lambda *one: jax.tree.map(lambda x: x[0], attend_batch(*(x[None] for x in one)))),
    "remat": jax.checkpoint(attend_batch),
    "scan": scanned,
}


@pytest.mark.parametrize("place", ["shard_map over heads", *(slow(p) for p in PLACES if p != "shard_map over heads")])
def test_it_works_inside(place, batch_truth):
    ids, q, k, v = batch_of(4)
    assert_same(jax.jit(losses_and_gradients(PLACES[place]))(q, k, v, ids), batch_truth)


@pytest.mark.parametrize("spec", [slow(P(None, None, "d", None), id="heads"), pytest.param(P("d"), id="batch")])
def test_explicit_meshes(spec, batch_truth):
    ids, q, k, v = batch_of(4)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
        got = jax.jit(losses_and_gradients(attend_batch))(*placed, jax.device_put(ids, NamedSharding(mesh, P())))
    assert got[0][1][0].sharding.spec[: len(spec)] == spec[: len(got[0][1][0].sharding.spec)]
    assert_same(jax.device_get(got), jax.device_get(batch_truth))


@pytest.mark.slow
def test_keys_that_all_devices_share_get_the_sum_of_gradients():
    """Queries cut over devices, keys and values whole on each."""
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(rng.standard_normal((16, 2, 8)), jnp.float32) for _ in range(3))
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    def local(q, k, v):
        mask = BlockMask.from_mask(window(left=5, right=5), 8, 16, block_size=8)
        return jax.lax.psum(jnp.sum(jnp.sin(block_sparse_attention(q, k, v, mask, implementation="xla"))), "d")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=P())
    got = jax.jit(jax.grad(sharded, (0, 1, 2)))(q, k, v)

    def whole(q, k, v):
        mask = BlockMask.from_mask(window(left=5, right=5), 8, 16, block_size=8)
        return sum(
            jnp.sum(jnp.sin(block_sparse_attention(x, k, v, mask, implementation="reference"))) for x in (q[:8], q[8:])
        )

    assert_same(got, jax.grad(whole, (0, 1, 2))(q, k, v))


def test_donated_buffers_and_the_same_bits_twice():
    ids, q, k, v = batch_of(2)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(q, k, v, ids):
        (_, (output, _)), gradients = losses_and_gradients(attend_batch)(q, k, v, ids)
        return output, gradients

    one, other = (jax.device_get(step(q + 0, k, v, ids)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)


IMPORTED = """
import sys
import jax_speedrun.kernels.attention
import jax_speedrun.kernels.attention.flax_nnx
import jax_speedrun.kernels.attention.scores
import jax_speedrun.kernels.masks
print([name for name in ("optax", "orbax", "flax", "torch", "matplotlib") if name in sys.modules])
"""


def test_importing_attention_imports_no_training_library():
    result = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


class TestFlaxNnx:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 16)), jnp.float32)
    mask = BlockMask.from_mask(causal() & window(left=6), 24, block_size=8)

    def layer(self, attend=None, **options):
        more = {} if attend is None else {"attention_fn": attend}
        return nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0), **more, **options)

    def test_it_is_the_layers_own_attention(self):
        dense = jnp.asarray((Q[:24] >= S[:24]) & (Q[:24] - S[:24] <= 6))

        def loss(layer, x, **mask):
            return jnp.sum(jnp.sin(layer(x, **mask)))

        got = nnx.value_and_grad(loss)(self.layer(attention_fn(self.mask, implementation="xla")), self.x)
        want = nnx.value_and_grad(functools.partial(loss, mask=dense))(self.layer(), self.x)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), *map(jax.tree.leaves, (got, want)))

    @pytest.mark.parametrize(
        ("options", "call", "message"),
        [
            ({}, {"mask": jnp.ones((24, 24), bool)}, "a dense mask"),
            ({}, {"is_causal": True}, "is_causal: put causal"),
            ({"dropout_rate": 0.5, "deterministic": False, "keep_rngs": True}, {}, "dropout"),
            ({}, {"sow_weights": True}, "sown weights"),
        ],
    )
    def test_what_it_cannot_do_is_refused(self, options, call, message):
        with pytest.raises(ValueError, match=f"^attention_fn: block-sparse attention cannot take {message}"):
            self.layer(attention_fn(self.mask), **options)(self.x, **call)
