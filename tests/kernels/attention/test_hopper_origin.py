"""The backward attention kernels where they undo the norm and rotation of q and k: interpreter, lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.kernels.attention.hopper_backward import Origin, backward_dkv, backward_dq
from jax_speedrun.kernels.attention.hopper_forward import forward
from jax_speedrun.kernels.attention.schedule import build_schedule
from jax_speedrun.kernels.block_mask import BLOCK_SIZE, BlockMask
from jax_speedrun.kernels.implementation import interpret_kernels
from jax_speedrun.kernels.masks import causal, same_document
from tests.numpy_attention import dense_attention, random_mask

SCALE, BLOCKS, HEADS, WIDTH = 0.12, 2, 2, 128
LENGTH = BLOCKS * BLOCK_SIZE
ROTATED = WIDTH // 4
BF16 = 2.0**-8  # the largest relative error of a rounding


def heads_of(z_THK, rstd_T, cos_TR, sin_TR):
    """q or k of its matmul's result, and the factor of each head and token."""
    y = z_THK * rstd_T[:, None, None]
    rms = jnp.sqrt(jnp.mean(y * y, axis=-1))
    n = (y / rms[..., None]).reshape(LENGTH, HEADS, 2, WIDTH // 2)
    cos, sin = (x[:, None] for x in (cos_TR, sin_TR))
    a, b = n[:, :, 0, :ROTATED], n[:, :, 1, :ROTATED]
    parts = [a * cos + b * sin, n[:, :, 0, ROTATED:], b * cos - a * sin, n[:, :, 1, ROTATED:]]
    return jnp.concatenate(parts, axis=-1), (rstd_T[:, None] / rms).T


class Case:
    """Matmuls' results, what comes of them, and an output gradient, all random."""

    def __init__(self, rng):
        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        self.rstd_T = jnp.asarray(rng.uniform(0.5, 2, LENGTH), jnp.float32)
        angles = rng.uniform(-np.pi, np.pi, (LENGTH, ROTATED))
        self.angles = [jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)]
        self.z = [normal(LENGTH, HEADS, WIDTH) for _ in range(2)]
        self.v, self.d_output = (normal(LENGTH, HEADS, WIDTH).astype(jnp.bfloat16) for _ in range(2))
        heads = [heads_of(z, self.rstd_T, *self.angles) for z in self.z]
        self.q, self.k = (head.astype(jnp.bfloat16) for head, _ in heads)
        self.origins = [Origin(*self.angles, factor) for _, factor in heads]

    def gradient_of_matmul(self, which, g):
        """By automatic differentiation."""
        _, pull = jax.vjp(lambda z: heads_of(z, self.rstd_T, *self.angles)[0], self.z[which])
        return np.asarray(pull(jnp.asarray(g, jnp.float32))[0], np.float64)


@jax.jit
def kernels(q, k, v, d_output, mask, origins, rstd_T):
    """(dq, delta, dots), (dk, dv, dots, values); without origins fewer of them."""
    schedule = build_schedule(mask)
    o, lse = forward(q, k, v, mask.documents, schedule.by_query, scale=SCALE)
    of_q, of_k = origins
    of_queries = backward_dq(q, k, v, o, d_output, lse, mask.documents, schedule.by_query, of_q, scale=SCALE)
    of_keys = backward_dkv(
        q, k, v, d_output, lse, of_queries[1], mask.documents, schedule.by_key, of_k, rstd_T, scale=SCALE
    )
    return of_queries, of_keys


def wide(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def structured_mask(rng):
    return random_mask(rng, BLOCKS, BLOCK_SIZE, density=0.8)[0]


def blind_mask(rng):
    """Queries of block 0 list nothing; of block 1, all but 128..249 have a document that no key has in block 0."""
    none, one = jnp.zeros(BLOCKS, jnp.int32), jnp.array([0, 1], jnp.int32)
    indices = jnp.zeros((BLOCKS, BLOCKS), jnp.int32)
    position = jnp.arange(LENGTH)
    documents = jnp.where(
        position < BLOCK_SIZE // 2, 3, jnp.where((position < BLOCK_SIZE) | (position >= 250), position, 0)
    )
    documents = jnp.where((position >= 32) & (position < BLOCK_SIZE // 2), 0, documents)
    return BlockMask(one, indices, none, indices, causal() & same_document(documents.astype(jnp.int32)))


@pytest.mark.slow
@pytest.mark.parametrize("make_mask", [structured_mask, blind_mask])
def test_gradients_of_the_matmuls_results(make_mask):
    rng = np.random.default_rng(7)
    case, mask = Case(rng), make_mask(rng)
    visible = np.asarray(mask.dense())
    inputs = case.q, case.k, case.v, case.d_output, mask
    with interpret_kernels():
        (dz_q, delta, q_dots), (dz_k, dz_v, k_dots, values) = kernels(*inputs, case.origins, case.rstd_T)

    # The whole of it, against float64 attention and automatic differentiation: errors as `q` and `k` were rounded.
    _, *want = dense_attention(case.q, case.k, case.v, case.d_output, visible, SCALE)
    scale = np.asarray(case.rstd_T, np.float64)[:, None, None]
    truth = [case.gradient_of_matmul(0, want[0]), case.gradient_of_matmul(1, want[1]), scale * want[2]]
    for got, true in zip((dz_q, dz_k, dz_v), truth, strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.abs(true).max() > 0.01
        got = np.asarray(got, np.float64)
        np.testing.assert_allclose(got, true, atol=0.02 * max(1.0, np.abs(true).max()))
        assert np.linalg.norm(got - true) <= 1e-2 * np.linalg.norm(true)
    for got, g, n in zip((q_dots, k_dots, values), want, (case.q, case.k, case.v), strict=True):
        assert got.dtype == jnp.float32
        true = (g * np.asarray(n, np.float64)).sum(-1).T
        assert np.linalg.norm(got - true) <= 1e-2 * np.linalg.norm(g)

    unseeing, unseen = ~visible.any(1), ~visible.any(0)
    if make_mask is blind_mask:
        assert unseeing[:BLOCK_SIZE].all()
        assert unseen[BLOCK_SIZE:].all()
        assert not unseeing.all()
    for got, rows in ((dz_q, unseeing), (q_dots.T, unseeing), *((x, unseen) for x in (dz_k, dz_v, k_dots.T, values.T))):
        assert not np.asarray(got)[rows].any()

    if make_mask is blind_mask:
        return
    # Against the kernels without origins, where g was rounded on its way: nothing else differs, to the element.
    with interpret_kernels():
        (dq, plain_delta), (dk, dv) = kernels(*inputs, (None, None), None)
    np.testing.assert_array_equal(delta, plain_delta)
    for got, dots, rounded, n, origin in (
        (dz_q, q_dots, dq, case.q, case.origins[0]),
        (dz_k, k_dots, dk, case.k, case.origins[1]),
    ):
        got, dots, g, n, cos, sin, factor = wide(got, dots, rounded, n, *origin)
        turn = np.broadcast_to(np.eye(WIDTH), (LENGTH, WIDTH, WIDTH)).copy()  # what the rotation does: n = turn @ ..
        for i in range(ROTATED):
            j = i + WIDTH // 2
            turn[:, i, i], turn[:, i, j], turn[:, j, i], turn[:, j, j] = cos[:, i], sin[:, i], -sin[:, i], cos[:, i]
        gn = (g * n).sum(-1)
        back = functools.partial(np.einsum, "tij,thi,ht->thj", optimize=True)
        want_dz = back(turn, g - n * gn[..., None] / WIDTH, factor)
        doubt = back(np.abs(turn), np.abs(g) + np.abs(n) * np.abs(g * n).mean(-1, keepdims=True), factor)
        assert (np.abs(got - want_dz) <= 1.01 * BF16 * (doubt + np.abs(want_dz)) + 1e-6).all()
        assert (np.abs(dots - gn.T) <= 1.01 * BF16 * np.abs(g * n).sum(-1).T + 1e-6).all()
    got, g, v = wide(dz_v, dv, case.v)
    assert (np.abs(got - scale * g) <= 2.02 * BF16 * np.abs(scale * g) + 1e-30).all()
    assert (np.abs(values - (g * v).sum(-1).T) <= 1.01 * BF16 * np.abs(g * v).sum(-1).T + 1e-6).all()


def test_lowers_for_cuda_at_full_size():
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    length, heads = 65536, 6
    head, number = array(length, heads, WIDTH, dtype=jnp.bfloat16), array(heads, length)
    blocks = length // BLOCK_SIZE
    schedule = array(blocks, blocks + 4, dtype=jnp.int32)
    origin = Origin(array(length, ROTATED), array(length, ROTATED), number)
    documents = array(length, dtype=jnp.int32)

    def both_kernels(x, number, documents, schedule, origin, rstd_T):
        of_queries = backward_dq(x, x, x, x, x, number, documents, schedule, origin, scale=SCALE)
        return of_queries, backward_dkv(x, x, x, x, number, number, documents, schedule, origin, rstd_T, scale=SCALE)

    traced = jax.jit(both_kernels).trace(head, number, documents, schedule, origin, array(length))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("dq", "dkv"):
        assert f"block_sparse_attention_{kernel}" in text


def test_other_head_widths_are_refused():
    head, number = jax.ShapeDtypeStruct((256, 1, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 256), jnp.float32)
    origin = Origin(*[jax.ShapeDtypeStruct((256, 16), jnp.float32)] * 2, number)
    documents, schedule = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((256,), (2, 6)))
    run = functools.partial(backward_dq, scale=SCALE)
    with pytest.raises(ValueError, match="head width 128, got 64"):
        jax.eval_shape(run, *[head] * 5, number, documents, schedule, origin)
