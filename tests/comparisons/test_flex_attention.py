"""Against PyTorch's FlexAttention on the CPU, with the masks and score functions of its gallery: one function for both.

`pip install -e '.[comparisons]'` brings what these tests need.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.kernels.attention import block_sparse_attention
from jax_speedrun.kernels.attention.scores import alibi, score_mod
from jax_speedrun.kernels.block_mask import BlockMask
from jax_speedrun.kernels.masks import (
    Mask,
    causal,
    chunks,
    dilated,
    everything,
    global_tokens,
    mask_mod,
    prefix,
    same_document,
    window,
)

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[comparisons]'")
flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="needs PyTorch's FlexAttention")

TOKENS, HEADS, SHARED, WIDTH = 64, 4, 2, 16
IDS = np.cumsum(np.isin(np.arange(TOKENS), [11, 12, 37]))
GLOBAL = np.isin(np.arange(TOKENS), [0, 40])


def of(values, like):
    """The same numbers as an array of the caller's library."""
    return torch.from_numpy(values) if isinstance(like, torch.Tensor) else jnp.asarray(values)


def by_head(b, h, q, k):
    return (q >= k) & (q - k <= 4 * h + 3)


MASKS = {
    "full": (lambda b, h, q, k: q >= 0, everything()),
    "causal": (lambda b, h, q, k: q >= k, causal()),
    "sliding window": (lambda b, h, q, k: (q >= k) & (q - k <= 20), causal() & window(left=20)),
    "symmetric window": (lambda b, h, q, k: abs(q - k) <= 9, window(left=9, right=9)),
    "prefix": (lambda b, h, q, k: (k < 13) | (q >= k), causal() | prefix(13)),
    "documents": (
        lambda b, h, q, k: (of(IDS, q)[q] == of(IDS, q)[k]) & (q >= k),
        causal() & same_document(IDS),
    ),
    "dilated": (
        lambda b, h, q, k: ((q - k) % 3 == 0) & (q >= k) & (q - k <= 30),
        causal() & window(left=30) & dilated(3),
    ),
    "sinks": (lambda b, h, q, k: (q >= k) & ((q - k <= 8) | (k < 4)), causal() & (window(left=8) | prefix(4))),
    "global": (
        lambda b, h, q, k: (abs(q - k) <= 6) | of(GLOBAL, q)[q] | of(GLOBAL, q)[k],
        window(left=6, right=6) | global_tokens(GLOBAL),
    ),
    "chunks": (lambda b, h, q, k: q // 10 == k // 10, chunks(10)),
    "of heads": (by_head, None),
}
SCORES = {
    "alibi": (
        lambda score, b, h, q, k: score + 2.0 ** (-8 * (h + 1) / HEADS) * (k - q),
        alibi(heads=HEADS),
    ),
    "relative": (lambda score, b, h, q, k: score + (k - q) / 16, None),
    "soft cap": (
        lambda score, b, h, q, k: 3 * (torch if isinstance(score, torch.Tensor) else jnp).tanh(score / 3),
        None,
    ),
}


def inputs():
    rng = np.random.default_rng(0)
    shapes = [(TOKENS, HEADS, WIDTH), *[(TOKENS, SHARED, WIDTH)] * 2, (TOKENS, HEADS, WIDTH)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def theirs(mask, score=None):
    *qkv, d_output = (torch.from_numpy(x).transpose(0, 1)[None] for x in inputs())
    qkv = [x.requires_grad_() for x in qkv]
    blocks = flex.create_block_mask(mask, None, HEADS, TOKENS, TOKENS, device="cpu")
    dense = flex.create_mask(mask, None, HEADS, TOKENS, TOKENS, device="cpu")
    # On a CPU FlexAttention has no gradients: these are of the same functions on dense scores. The output is its own.
    scores = torch.einsum("bhqk,bhsk->bhqs", qkv[0], qkv[1].repeat_interleave(HEADS // SHARED, 1)) * WIDTH**-0.5
    if score is not None:
        h, q, k = (
            torch.arange(n).reshape(shape) for n, shape in ((HEADS, (-1, 1, 1)), (TOKENS, (-1, 1)), (TOKENS, (-1,)))
        )
        scores = score(scores, 0, h, q, k)
    weights = torch.softmax(torch.where(dense, scores, -torch.inf), -1)
    output = torch.einsum("bhqs,bhsk->bhqk", weights, qkv[2].repeat_interleave(HEADS // SHARED, 1))
    gradients = torch.autograd.grad(output, qkv, d_output)
    output = flex.flex_attention(*(x.detach() for x in qkv), score_mod=score, block_mask=blocks, enable_gqa=True)
    return [x[0].transpose(0, 1).numpy() for x in (output, *gradients)]


@functools.partial(jax.jit, static_argnames="implementation")
def ours(mask: BlockMask, score, implementation):
    q, k, v, d_output = map(jnp.asarray, inputs())
    output, pull = jax.vjp(
        lambda q, k, v: block_sparse_attention(q, k, v, mask, score_fn=score, implementation=implementation), q, k, v
    )
    return output, *pull(d_output)


def check(mask: Mask, score, wanted):
    blocks = BlockMask.from_mask(mask, TOKENS, block_size=16)
    for got, want in zip(ours(blocks, score, "xla"), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    """The function as it stands, and the predicate that says the same."""
    function, predicate = MASKS[name]
    wanted = theirs(function)
    for mask in (mask_mod(function, heads=HEADS if name == "of heads" else None), predicate):
        if mask is not None:
            check(mask, None, wanted)


@pytest.mark.parametrize("name", SCORES)
def test_score_functions(name):
    function, named = SCORES[name]
    wanted = theirs(MASKS["causal"][0], function)
    for score in (score_mod(function), named):
        if score is not None:
            check(causal(), score, wanted)
