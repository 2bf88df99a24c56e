"""The oracle itself: cases whose answer is known without it."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.numpy_model import DOCUMENT_START, Float, attention, forward_loss, norm, rotary, visible

HEADS, WIDTH, MLP, LAYERS, VOCABULARY = 2, 8, 24, 4, 50257
SMALL = 40  # ids that are drawn, besides the document start; no other has a row in the head
SETTINGS: dict[str, Any] = {
    "heads": HEADS,
    "head_width": WIDTH // HEADS,
    "long_layers": {0, 3},
    "attention_free_layers": {2},
    "value_embedding_layers": {0: 0, 1: 1, 3: 0},
}


def random_params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> Float:
        return rng.standard_normal(shape) / math.sqrt(shape[-1])

    def block(layer: int) -> dict[str, Any]:
        attention_weights = {
            "qkv_3CD": matrix(3, WIDTH, WIDTH),
            "lambdas": rng.standard_normal(2),
            "out_DC": matrix(WIDTH, WIDTH),
        }
        rest = {} if layer == 2 else {"attention": attention_weights}
        return {
            "lambdas": rng.standard_normal(2),
            "mlp": {"fc_FD": matrix(MLP, WIDTH), "proj_DF": matrix(WIDTH, MLP)},
            **rest,
        }

    return {
        "embed": rng.standard_normal((VOCABULARY, WIDTH)),
        "value_embeds": {i: rng.standard_normal((VOCABULARY, WIDTH)) for i in range(2)},
        "head": matrix(SMALL, WIDTH),
        "skip_weights": rng.standard_normal(LAYERS // 2),
        "blocks": {layer: block(layer) for layer in range(LAYERS)},
    }


PARAMS = random_params()


def random_tokens(length: int, documents_at: list[int], seed: int = 1) -> np.ndarray[Any, Any]:
    tokens = np.random.default_rng(seed).integers(0, SMALL, length)
    tokens[documents_at] = DOCUMENT_START
    return tokens


@settings(max_examples=25, deadline=None)
@given(
    starts=st.sets(st.integers(0, 511) | st.sampled_from([0, 127, 128, 129, 255, 256, 384])),
    window=st.integers(0, 5),
)
def test_visible_keys_follow_the_rules_of_the_blocks(starts: set[int], window: int) -> None:
    """The interval against the three rules: causal, same document, inside the window of blocks."""
    tokens = random_tokens(512, sorted(starts))
    position = np.arange(512)
    document = np.cumsum(tokens == DOCUMENT_START)
    distance = position[:, None] // 128 - position // 128
    rules = (position[:, None] >= position) & (document[:, None] == document) & (distance <= max(window - 1, 0))
    np.testing.assert_array_equal(visible(tokens, window), rules)


def test_zero_head_gives_the_log_of_the_padded_vocabulary() -> None:
    tokens = random_tokens(128, [0, 50])
    loss, logits = forward_loss(PARAMS | {"head": np.zeros((50304, WIDTH))}, tokens, tokens, 1, **SETTINGS)
    assert loss == pytest.approx(math.log(50304), abs=1e-12)
    assert loss == pytest.approx(10.8258, abs=5e-5)  # the record's, at step 0
    np.testing.assert_array_equal(logits, 15)


def test_identity_network_predicts_the_embedding() -> None:
    """Zero output projections: what is left is the head on norm(embed)."""
    params = random_params(2)
    for block in params["blocks"].values():
        block["lambdas"] = np.array([1.0, 0.0])
        block["mlp"]["proj_DF"] = np.zeros((WIDTH, MLP))
        if "attention" in block:
            block["attention"]["out_DC"] = np.zeros((WIDTH, WIDTH))
    tokens = random_tokens(128, [0])
    # Every skip adds a multiple of the same x0, and the last norm takes the factor out again.
    params["skip_weights"] = np.array([0.5, 2.0])
    targets = tokens % SMALL
    loss, logits = forward_loss(params, tokens, targets, 1, **SETTINGS)
    x = params["embed"][tokens]
    z = x / np.sqrt((x**2).mean(axis=1, keepdims=True)) @ params["head"].T
    expected = 15 + 15 * np.tanh(z / 15)  # 30 sigmoid(z / 7.5)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    probability = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(float(-np.log(probability[np.arange(128), targets]).mean()), rel=1e-5)


def test_skips_pair_the_last_pushed_with_the_first_popped() -> None:
    """Linear network x <- l0 x (+ skip): the factor of x0 is computable by hand."""
    params = random_params(3)
    for layer, block in params["blocks"].items():
        block["lambdas"] = np.array([layer + 2.0, 0.0])
        block["mlp"]["proj_DF"] = np.zeros((WIDTH, MLP))
        if "attention" in block:
            block["attention"]["out_DC"] = np.zeros((WIDTH, WIDTH))
    # Outputs 2, 6, then (6 + 6 a) 4, then (24 + 24 a + 2 b) 5: zero for a = 1, b = -24.
    params["skip_weights"] = np.array([1.0, -24.0])
    tokens = random_tokens(128, [0])
    _, logits = forward_loss(params, tokens, tokens % SMALL, 1, **SETTINGS)
    np.testing.assert_allclose(logits, 15, atol=1e-6)


def test_uniform_attention_averages_the_visible_values() -> None:
    rng = np.random.default_rng(4)
    qkv = np.stack([np.zeros((WIDTH, WIDTH)), np.zeros((WIDTH, WIDTH)), np.eye(WIDTH)])
    weights = {"qkv_3CD": qkv, "lambdas": np.array([2.0, 3.0]), "out_DC": np.eye(WIDTH)}
    x, embedding = rng.standard_normal((2, 256, WIDTH))
    mask = visible(random_tokens(256, [0, 100, 200]), 1)
    out = attention(weights, x, embedding, mask, HEADS, WIDTH // HEADS)
    values = 2 * x + 3 * embedding
    for query, first in [(0, 0), (99, 0), (100, 100), (150, 128), (199, 128), (255, 200)]:
        np.testing.assert_allclose(out[query], values[first : query + 1].mean(axis=0), atol=1e-12)
    without = attention(weights, x, None, mask, HEADS, WIDTH // HEADS)
    np.testing.assert_allclose(without[150], 2 * x[128:151].mean(axis=0), atol=1e-12)


def test_rotary_turns_by_the_distance_and_keeps_half_of_the_width() -> None:
    x = np.broadcast_to(np.random.default_rng(5).standard_normal(16), (64, 1, 16))
    y = rotary(x)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1))
    scores = y[:, 0] @ y[:, 0].T
    np.testing.assert_allclose(np.diagonal(scores, 5), scores[0, 5])  # a function of the distance alone
    np.testing.assert_array_equal(y[..., [4, 5, 6, 7, 12, 13, 14, 15]], x[..., [4, 5, 6, 7, 12, 13, 14, 15]])
    # The first pair turns by -1 radian a position.
    turned = complex(x[3, 0, 0], x[3, 0, 8]) * np.exp(-3j)
    assert complex(y[3, 0, 0], y[3, 0, 8]) == pytest.approx(turned)
    # The slowest turning pair by 1 / 1024.
    slow = complex(x[9, 0, 3], x[9, 0, 11]) * np.exp(-9j / 1024)
    assert complex(y[9, 0, 3], y[9, 0, 11]) == pytest.approx(slow)


def test_norm_has_epsilon_under_the_root() -> None:
    np.testing.assert_allclose(norm(np.full((1, 4), 1e-4)), 1e-4 / math.sqrt(1e-8 + 2**-23), rtol=1e-7)


def changed_rows(window: int, position: int, **changes: Any) -> set[int]:
    """Which positions' logits move when the token at `position` changes."""
    tokens = random_tokens(384, [0, 60, 200])
    other = tokens.copy()
    other[position] = SMALL + 1
    settings = SETTINGS | changes
    (_, a), (_, b) = (forward_loss(PARAMS, t, t % SMALL, window, **settings) for t in (tokens, other))
    return set(np.flatnonzero(np.abs(a - b).max(axis=1) > 1e-12).tolist())


def test_nothing_leaks_backwards_or_across_documents() -> None:
    assert changed_rows(3, 100) == set(range(100, 200))
    assert changed_rows(3, 250) == set(range(250, 384))


def test_windows_limit_the_reach_and_long_layers_reach_further() -> None:
    # One block: nothing beyond it, in any number of layers.
    assert changed_rows(1, 250) == set(range(250, 256))
    # Two blocks, long layers only: across one border a layer.
    assert changed_rows(2, 250, long_layers={3}) == set(range(250, 384))
    # No long layer: half of two is one block.
    assert changed_rows(2, 250, long_layers=set()) == set(range(250, 256))
