"""The whole model once more, in float64 NumPy: the oracle that `jax_speedrun.model` is tested against.

Written from the description of the record alone. No blocks, no fused anything:
one sequence, token-level masks, sums as the formulas have them.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]

EPSILON = 1.1920929e-07  # float32's machine epsilon
ATTENTION_SCALE = 0.12
BLOCK = 128
DOCUMENT_START = 50256


def forward_loss(
    params: Mapping[str, Any],
    tokens: ArrayLike,
    targets: ArrayLike,
    window_blocks: int,
    *,
    heads: int,
    head_width: int,
    long_layers: Collection[int],
    attention_free_layers: Collection[int],
    value_embedding_layers: Mapping[int, int],
) -> tuple[float, Float]:
    """Mean cross-entropy and logits (T, V_padded) of one sequence.

    Args:
      params: nested mappings of arrays, converted to float64; see the tests for the layout.
        A matrix W acts as x W^T.
      tokens, targets: (T,) ids.
      window_blocks: the long window, in blocks of 128 tokens; the short one is half of it.
      long_layers: the layers that see the long window.
      value_embedding_layers: layer -> which of the value embedding tables it mixes in.
    """
    tokens, targets = np.asarray(tokens), np.asarray(targets)
    long_mask, short_mask = visible(tokens, window_blocks), visible(tokens, window_blocks // 2)
    layers = len(params["blocks"])
    assert layers % 2 == 0

    x = x0 = norm(array(params["embed"])[tokens])
    skips: list[Float] = []
    for layer in range(layers):
        block = params["blocks"][layer]
        if layer >= layers // 2:
            x = x + array(params["skip_weights"])[layer - layers // 2] * skips.pop()
        lambda_x, lambda_x0 = array(block["lambdas"])
        x = lambda_x * x + lambda_x0 * x0
        if layer not in attention_free_layers:
            table = value_embedding_layers.get(layer)
            value_embedding = None if table is None else array(params["value_embeds"][table])[tokens]
            mask = long_mask if layer in long_layers else short_mask
            x = x + attention(block["attention"], norm(x), value_embedding, mask, heads, head_width)
        x = x + mlp(block["mlp"], norm(x))
        if layer < layers // 2:
            skips.append(x)
    assert not skips

    z = norm(x) @ array(params["head"]).T
    logits = 30 / (1 + np.exp(-z / 7.5))
    top = logits.max(axis=1, keepdims=True)
    log_total = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return float(np.mean(log_total - logits[np.arange(len(targets)), targets])), logits


def array(x: ArrayLike) -> Float:
    return np.asarray(x).astype(np.float64)


def norm(x: Float) -> Float:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON)


def visible(tokens: NDArray[Any], window_blocks: int) -> NDArray[np.bool_]:
    """(T, T): query q sees the keys from max(its document's start, its window's start) to q."""
    mask = np.zeros((len(tokens), len(tokens)), bool)
    document_start = 0
    for q, token in enumerate(tokens):
        if token == DOCUMENT_START:
            document_start = q
        window_start = BLOCK * (q // BLOCK - max(window_blocks, 1) + 1)
        mask[q, max(document_start, window_start) : q + 1] = True
    return mask


def rotary(x_THK: Float) -> Float:
    length, _, width = x_THK.shape
    frequencies = np.concatenate([(1 / 1024) ** np.linspace(0, 1, width // 4), np.zeros(width // 4)])
    angle_T1R = (np.arange(length)[:, None] * frequencies)[:, None, :]
    cos, sin = np.cos(angle_T1R), np.sin(angle_T1R)
    x1, x2 = x_THK[..., : width // 2], x_THK[..., width // 2 :]
    return np.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)


def attention(
    weights: Mapping[str, Any],
    x_TD: Float,
    value_embedding: Float | None,
    mask_TS: NDArray[np.bool_],
    heads: int,
    head_width: int,
) -> Float:
    q_THK, k_THK, v_THK = ((x_TD @ w.T).reshape(len(x_TD), heads, head_width) for w in array(weights["qkv_3CD"]))
    mix_v, mix_embedding = array(weights["lambdas"])
    v_THK = mix_v * v_THK
    if value_embedding is not None:
        v_THK = v_THK + mix_embedding * value_embedding.reshape(v_THK.shape)
    q_THK, k_THK = rotary(norm(q_THK)), rotary(norm(k_THK))

    out_THK = np.empty_like(v_THK)
    for head in range(heads):
        scores_TS = ATTENTION_SCALE * q_THK[:, head] @ k_THK[:, head].T
        scores_TS[~mask_TS] = -np.inf
        weights_TS = np.exp(scores_TS - scores_TS.max(axis=1, keepdims=True))
        weights_TS /= weights_TS.sum(axis=1, keepdims=True)
        out_THK[:, head] = weights_TS @ v_THK[:, head]
    out_TD: Float = out_THK.reshape(len(x_TD), -1) @ array(weights["out_DC"]).T
    return out_TD


def mlp(weights: Mapping[str, Any], x_TD: Float) -> Float:
    hidden_TF = np.maximum(x_TD @ array(weights["fc_FD"]).T, 0) ** 2
    out_TD: Float = hidden_TF @ array(weights["proj_DF"]).T
    return out_TD
