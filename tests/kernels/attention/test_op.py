"""Both plain implementations against float64 NumPy: random lists, the recipe's masks, bad input."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.kernels.attention import xla as attention_xla
from jax_speedrun.kernels.attention.op import block_sparse_attention
from jax_speedrun.kernels.attention.scores import alibi
from jax_speedrun.kernels.block_mask import BlockMask, long_short_masks
from jax_speedrun.kernels.masks import causal, same_document, window
from tests.marks import slow
from tests.numpy_attention import dense_attention, random_mask, spread

SCALE = 0.12
IMPLEMENTATIONS = ("reference", "xla")


def value_and_gradients(implementation):
    @jax.jit
    def run(q, k, v, d_output, mask):
        def attend(q, k, v):
            return block_sparse_attention(q, k, v, mask, scale=SCALE, implementation=implementation)

        output, pull = jax.vjp(attend, q, k, v)
        return output, *pull(d_output)

    return run


RUN = {name: value_and_gradients(name) for name in IMPLEMENTATIONS}


def random_inputs(rng, *shape, dtype=jnp.float32):
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_lists(implementation):
    """No structure in the lists: any key block, in any order, with rows that see nothing."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        mask, visible = random_mask(rng, blocks=6, block_size=8, density=rng.random())
        inputs = random_inputs(rng, 48, 2, 16)
        results = RUN[implementation](*inputs, mask)
        for got, want in zip(results, dense_attention(*inputs, visible, SCALE), strict=True):
            np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize("implementation", [slow("reference"), "xla"])
def test_recipe_masks_for_every_window(implementation):
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(np.where(rng.random(1024) < 0.01, 50256, 7), jnp.int32)
    inputs = random_inputs(rng, 1024, 1, 16)
    for blocks in (1, 2, 5, 14):
        for mask in long_short_masks(tokens, blocks):
            results = RUN[implementation](*inputs, mask)
            want = dense_attention(*inputs, np.asarray(mask.dense()), SCALE)
            for got, expected in zip(results, want, strict=True):
                np.testing.assert_allclose(got, expected, atol=3e-5)


@pytest.mark.parametrize("visits_at_once", [slow(1), 3, slow(40)])
def test_more_blocks_than_one_group_walks_together(monkeypatch, visits_at_once):
    """Many groups, and lists that are cut in pieces."""
    monkeypatch.setattr(attention_xla, "pairs_at_once", lambda: visits_at_once * 2 * 2)
    rng = np.random.default_rng(2)
    mask, visible = random_mask(rng, blocks=30, block_size=2, density=0.6)
    inputs = random_inputs(rng, 60, 1, 8)
    results = value_and_gradients("xla")(*inputs, mask)
    for got, want in zip(results, dense_attention(*inputs, visible, SCALE), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)


def test_empty_rows_give_zero_and_no_nan():
    empty = jnp.zeros(4, jnp.int32)
    mask = BlockMask(empty, jnp.zeros((4, 4), jnp.int32), empty, jnp.zeros((4, 4), jnp.int32), causal(), 8)
    inputs = random_inputs(np.random.default_rng(3), 32, 2, 16)
    for implementation in IMPLEMENTATIONS:
        for result in RUN[implementation](*inputs, mask):
            np.testing.assert_array_equal(result, 0)


POISONS = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_a_query_does_not_see_is_not_felt(implementation, where, poison):
    """In blocks that no list names, and masked in blocks that one does. What is seen shows."""
    untouched_and_touched = np.zeros(2, int)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        mask, visible = random_mask(rng, blocks=6, block_size=8, density=0.15)
        inputs = dict(zip(("q", "k", "v", "do"), random_inputs(rng, 48, 2, 16), strict=True))
        bad = {name: np.zeros((48, 2), bool) for name in inputs}
        bad[where][rng.integers(0, 48, 3), rng.integers(0, 2, 3)] = True
        clean = dense_attention(*inputs.values(), visible, SCALE)
        spoilt = inputs | {where: jnp.where(bad[where][..., None], POISONS[poison], inputs[where])}
        results = RUN[implementation](*spoilt.values(), mask)
        for got, want, touched in zip(results, clean, spread(bad, visible), strict=True):
            np.testing.assert_allclose(np.asarray(got)[~touched], want[~touched], atol=3e-5)
            if implementation == "xla" or got is results[0]:
                assert not np.isfinite(np.asarray(got)[touched]).any()
            untouched_and_touched += [(~touched).sum(), touched.sum()]
    assert (untouched_and_touched > 100).all()


@pytest.mark.parametrize("where", ["k", "v", "do"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_poison_shows_what_a_recipe_mask_lets_through(implementation, where):
    """At one token in the middle of a document and of a block: as one looks for a leak of the future."""
    tokens = np.full(512, 7)
    tokens[[0, 130, 300]] = 50256
    at = 200
    long, _ = long_short_masks(jnp.asarray(tokens), 2)
    inputs = dict(zip(("q", "k", "v", "do"), random_inputs(np.random.default_rng(7), 512, 1, 16), strict=True))
    inputs[where] = inputs[where].at[at].set(jnp.nan)
    output, dq, dk, dv = (np.isfinite(np.asarray(x)).all((1, 2)) for x in RUN[implementation](*inputs.values(), long))
    later, before = np.arange(512), np.arange(512)
    later, before = (later >= at) & (later < 300), (before <= at) & (before >= 130)
    np.testing.assert_array_equal(output, ~later if where != "do" else np.ones(512, bool))
    np.testing.assert_array_equal(dq, ~later if where != "do" else np.arange(512) != at)
    touched = before if where == "do" else (np.arange(512) >= 130) & (np.arange(512) < 300)
    assert dk[~touched].all()
    assert dv[~touched].all()
    assert not dk[touched].any()


def test_large_scores_do_not_overflow():
    rng = np.random.default_rng(4)
    mask, visible = random_mask(rng, blocks=4, block_size=8, density=0.8)
    q, k, v, d_output = random_inputs(rng, 32, 2, 16)
    inputs = (100 * q, 100 * k, v, d_output)
    want = dense_attention(*inputs, visible, SCALE)
    for got, expected in zip(RUN["xla"](*inputs, mask), want, strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, expected, atol=2e-2 * max(1.0, float(np.abs(expected).max())))


def test_bfloat16_is_within_its_rounding():
    rng = np.random.default_rng(5)
    mask, visible = random_mask(rng, blocks=6, block_size=8, density=0.5)
    inputs = random_inputs(rng, 48, 2, 16, dtype=jnp.bfloat16)
    wide = [np.asarray(x, np.float64) for x in inputs]
    for got, want in zip(RUN["xla"](*inputs, mask), dense_attention(*wide, visible, SCALE), strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert error < 8e-3, error


@pytest.mark.parametrize("shared_mask", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_leading_batch_axis(implementation, shared_mask):
    rng = np.random.default_rng(6)
    masks = [random_mask(rng, blocks=4, block_size=8, density=0.5)[0] for _ in range(3)]
    inputs = random_inputs(rng, 3, 32, 2, 16)
    mask = masks[0] if shared_mask else jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    batched = RUN[implementation](*inputs, mask)
    for i in range(3):
        alone = RUN[implementation](*(x[i] for x in inputs), masks[0] if shared_mask else masks[i])
        for got, want in zip(batched, alone, strict=True):
            np.testing.assert_allclose(got[i], want, atol=1e-6)


def test_work_follows_the_visited_blocks(monkeypatch):
    """Without jit the walk runs in Python, and what each group gathers can be counted."""
    gathered, met = 0, np.zeros((40, 40), int)

    def visit(group):
        nonlocal gathered
        gathered += group.index_GN.size
        np.add.at(met, (group.rows_G[:, None], group.index_GN), group.listed_GN)
        return (jnp.sum(group.listed_GN, axis=1)[None],)

    monkeypatch.setattr(attention_xla, "pairs_at_once", lambda: 64)
    for blocks in (1, 3, 9, 40):
        gathered, met[:] = 0, 0
        mask = BlockMask.from_mask(causal() & window(left=8 * blocks - 8), 40 * 8, block_size=8)
        partial, full = mask.dense_blocks()
        with jax.disable_jit():
            (counts,) = attention_xla._walk(
                attention_xla._by_query(mask), 1, visit, lambda a, b: (a[0] + b[0],), (jnp.zeros((1, 40), jnp.int32),)
            )
        np.testing.assert_array_equal(met, np.asarray(partial) + np.asarray(full))
        np.testing.assert_array_equal(counts[0], met.sum(1))
        assert gathered <= 2 * met.sum() + 64  # the last group may reach beyond the rows


def test_no_array_of_all_pairs_exists():
    inputs = [jax.ShapeDtypeStruct((2048, 1, 16), jnp.float32)] * 4
    mask = jax.eval_shape(lambda tokens: long_short_masks(tokens, 4)[0], jax.ShapeDtypeStruct((2048,), jnp.int32))
    assert "2048x2048" not in RUN["xla"].lower(*inputs, mask).as_text()
    assert "2048x2048" in RUN["reference"].lower(*inputs, mask).as_text()


def test_window_changes_without_recompiling():
    traces = 0

    @jax.jit
    def run(q, k, v, tokens, window):
        nonlocal traces
        traces += 1
        long, _ = long_short_masks(tokens, window)
        return block_sparse_attention(q, k, v, long, scale=SCALE, implementation="xla")

    rng = np.random.default_rng(8)
    tokens = jnp.full(512, 7, jnp.int32)
    inputs = random_inputs(rng, 512, 1, 16)[:3]
    outputs = [np.asarray(run(*inputs, tokens, jnp.int32(window))) for window in range(1, 5)]
    assert traces == 1
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(outputs))


class TestBadInput:
    rng = np.random.default_rng(9)
    mask, _ = random_mask(rng, blocks=4, block_size=8, density=0.5)
    q = jnp.zeros((32, 2, 16))

    def check(self, match, q=q, k=q, v=q, mask=mask, implementation="xla", **options):
        with pytest.raises(ValueError, match=match) as error:
            block_sparse_attention(q, k, v, mask, scale=SCALE, implementation=implementation, **options)
        assert "\n" not in str(error.value)

    def test_shapes_differ(self):
        self.check("as many as values", k=jnp.zeros((32, 1, 16)))
        self.check("as wide as queries", k=jnp.zeros((32, 2, 8)))
        self.check("a multiple of the key's", *[jnp.zeros((32, heads, 16)) for heads in (2, 3, 3)])

    def test_rank(self):
        self.check(r"must be \(T, H, K\), or \(N, T, H, K\)", *[jnp.zeros((32, 16))] * 3)

    def test_dtypes_differ(self):
        self.check("one floating dtype", v=jnp.zeros((32, 2, 16), jnp.bfloat16))
        self.check("one floating dtype", *[jnp.zeros((32, 2, 16), jnp.int32)] * 3)

    def test_mask_of_another_length(self):
        self.check("same sequence", *[jnp.zeros((64, 2, 16))] * 3)
        self.check("for 32 queries and 32 keys, but there are 30 and 30", *[jnp.zeros((30, 2, 16))] * 3)

    def test_mask_of_other_heads(self):
        mask = BlockMask.from_mask_fn(lambda h, q, k, qd, kd, s: q > h, 32, heads=3, block_size=8)
        self.check("the mask is for 3 heads, but the query has 2", mask=mask)

    def test_options(self):
        self.check("soft_cap must be above 0, got 0.0; None for no cap", soft_cap=0)
        self.check(r"sinks must be floats of shape \(2,\), got float32 \(3,\)", sinks=jnp.zeros(3))
        self.check(r"alibi: slopes must have shape \(2,\), got \(3,\)", score_fn=alibi(heads=3))
        self.check(r"must come of .*scores\.py, .* got function", score_fn=lambda s, h, q, k: s)

    def test_mask_of_another_batch(self):
        batched = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), self.mask)
        self.check("batch", *[jnp.zeros((3, 32, 2, 16))] * 3, mask=batched)

    def test_block_size(self):
        self.check("for 512 queries", mask=dataclasses.replace(self.mask, block_size=128))

    def test_nothing_at_all(self):
        self.check("T, H and K must be at least 1", *[jnp.zeros((0, 2, 16))] * 3)
        self.check("T, H and K must be at least 1", *[jnp.zeros((32, 0, 16))] * 3)

    def test_scale_of_several_numbers(self):
        with pytest.raises(ValueError, match=r"scale must be one number, got an array of shape \(2,\)"):
            block_sparse_attention(self.q, self.q, self.q, self.mask, scale=jnp.ones(2))

    @pytest.mark.parametrize(
        ("leaf", "value", "message"),
        [
            ("partial_counts", np.zeros(3, int), r"partial_counts must be integers of shape \(4,\)"),
            ("full_indices", np.zeros((4, 4)), r"full_indices must be integers .* got float64"),
            ("full_counts", np.zeros((2, 4), int), r"full_counts must be integers of shape \(4,\)"),
            ("partial_indices", np.zeros(4, int), r"partial_indices must be \(B, D\) or \(N, B, D\)"),
            ("block_size", 0, "blocks of at least 1, got .* of 0"),
            ("q_length", 33, "lists of 4 x 4 blocks of 8 are not for 33 queries and 32 keys"),
            (
                "predicate",
                causal() & same_document(np.zeros((2, 32), int)),
                r"ids must have shape \(32,\) .* got \(2, 32\)",
            ),
            ("predicate", same_document(np.zeros(30, int)), r"ids must have shape \(32,\) for 32 queries and 32 keys"),
        ],
    )
    def test_lists_that_do_not_fit_together(self, leaf, value, message):
        for implementation in IMPLEMENTATIONS:
            self.check(message, mask=dataclasses.replace(self.mask, **{leaf: value}), implementation=implementation)

    def test_implementation(self):
        self.check("choose one of auto, hopper, xla, reference", implementation="flash")


def numpy_case(seed=8):
    rng = np.random.default_rng(seed)
    mask, visible = random_mask(rng, blocks=4, block_size=8, density=0.6)
    inputs = [rng.standard_normal((32, 2, 16)).astype(np.float32) for _ in range(4)]
    return inputs, jax.tree.map(np.asarray, mask), visible


@pytest.mark.parametrize("implementation", [slow("reference"), "xla"])
def test_numpy_arrays_outside_jit(implementation):
    """Also in the mask, with whatever integers it has: as inside."""
    (q, k, v, d_output), mask, visible = numpy_case()
    mask = jax.tree.map(lambda leaf: leaf.astype(np.uint8), mask)

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, mask, scale=np.float32(SCALE), implementation=implementation)

    output, pull = jax.vjp(attend, q, k, v)
    want = dense_attention(q, k, v, d_output, visible, SCALE)
    for got, expected in zip((attend(q, k, v), *pull(jnp.asarray(d_output))), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-5)
    np.testing.assert_array_equal(output, jax.jit(attend)(q, k, v))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.3, -0.2])
def test_scale_may_be_an_array_and_traced(implementation, scale):
    """It is then a factor of q, with a gradient of its own."""
    (q, k, v, d_output), mask, visible = numpy_case()

    def attend(q, scale):
        return block_sparse_attention(q, k, v, mask, scale=scale, implementation=implementation)

    want = dense_attention(q, k, v, d_output, visible, scale)
    for given in (jnp.float32(scale), np.asarray(scale)):
        np.testing.assert_allclose(attend(q, given), want.output, atol=3e-5)
    output, pull = jax.vjp(jax.jit(attend), q, jnp.float32(scale))
    dq, d_scale = pull(jnp.asarray(d_output))
    np.testing.assert_allclose(output, want.output, atol=3e-5)
    np.testing.assert_allclose(dq, want.dq, atol=3e-5)
    step = 1e-4
    up, down = (dense_attention(q, k, v, d_output, visible, s).output for s in (scale + step, scale - step))
    np.testing.assert_allclose(d_scale, np.sum((up - down) * d_output) / (2 * step), rtol=1e-3)


@pytest.mark.slow
def test_second_derivatives_are_the_references_and_others_say_so():
    (q, k, v, d_output), mask, visible = numpy_case()

    def slope(q, implementation):
        def loss(q):
            output = block_sparse_attention(q, k, v, mask, scale=SCALE, implementation=implementation)
            return jnp.sum(output * d_output)

        return jnp.sum(jax.grad(loss)(q) * v)

    got = jax.grad(slope)(jnp.asarray(q), "reference")
    direction, step = np.random.default_rng(0).standard_normal(q.shape), 1e-4
    up, down = (dense_attention(q + s * direction, k, v, d_output, visible, SCALE).dq for s in (step, -step))
    np.testing.assert_allclose(np.sum(got * direction), np.sum((up - down) * v) / (2 * step), rtol=1e-3)
    message = "^block_sparse_attention: this implementation can be differentiated once, in reverse mode"
    for differentiate in (jax.grad, jax.jacfwd):
        with pytest.raises(TypeError, match=message):
            differentiate(slope)(jnp.asarray(q), "xla")
