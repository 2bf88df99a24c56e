"""Against transformers' models, with random weights: Gemma 2's attention, and Longformer's.

`pip install -e '.[comparisons]'` brings what these tests need.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.kernels.attention import block_sparse_attention
from jax_speedrun.kernels.block_mask import BlockMask
from jax_speedrun.kernels.masks import causal, global_tokens, window

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[comparisons]'")
pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[comparisons]'")


def to_jax(x):
    return jnp.asarray(x.detach().numpy())


@pytest.mark.parametrize("layer", [0, 1], ids=["local", "global"])
def test_gemma_2(layer):
    """A whole layer: local or global, with a soft cap, grouped heads, a scale of its own and rotary angles."""
    from transformers import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding, apply_rotary_pos_emb

    tokens, heads, shared, width, reach = 40, 4, 2, 16, 8
    config = Gemma2Config(
        hidden_size=32, num_attention_heads=heads, num_key_value_heads=shared, head_dim=width, num_hidden_layers=2,
        sliding_window=reach, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, attention_dropout=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    module = Gemma2Attention(config, layer)
    assert (module.sliding_window is not None) == (layer == 0)
    hidden = torch.randn(1, tokens, 32)
    angles = Gemma2RotaryEmbedding(config)(hidden, torch.arange(tokens)[None])
    q, k, v = (
        project(hidden).view(1, tokens, -1, width).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *angles)

    at = torch.arange(tokens)
    seen = (at[:, None] >= at) & ((at[:, None] - at < reach) if layer == 0 else True)
    dense = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    hidden.requires_grad_()
    want, _ = module(hidden, angles, dense)
    weight = torch.randn(tokens, 32)

    # Gradients by the heads, of transformers' own function.
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    heads_of = [x.detach().requires_grad_() for x in (q, k, v)]
    attended, _ = eager_attention_forward(module, *heads_of, dense, scaling=module.scaling, softcap=2.0)
    through = module.o_proj(attended.reshape(tokens, -1))
    gradients = torch.autograd.grad((through * weight).sum(), heads_of)

    mask = BlockMask.from_mask(causal() & window(left=reach - 1) if layer == 0 else causal(), tokens, block_size=16)

    def ours(*qkv):
        output = block_sparse_attention(*qkv, mask, scale=24**-0.5, soft_cap=2.0, implementation="xla")
        return output.reshape(tokens, -1) @ to_jax(module.o_proj.weight).T

    output, pull = jax.vjp(ours, *(to_jax(x[0].transpose(0, 1)) for x in (q, k, v)))
    np.testing.assert_allclose(output, to_jax(want[0]), atol=1e-5)
    for got, wanted in zip(pull(to_jax(weight)), gradients, strict=True):
        np.testing.assert_allclose(got, to_jax(wanted[0].transpose(0, 1)), atol=1e-5)


def test_longformer():
    """A window and global tokens. Longformer's global tokens have projections of their own: given the same weights."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    tokens, heads, width, reach = 32, 2, 8, 4
    config = LongformerConfig(
        hidden_size=heads * width, num_attention_heads=heads, attention_window=[2 * reach], num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    module = LongformerSelfAttention(config, 0).eval()
    for name in ("query", "key", "value"):
        getattr(module, f"{name}_global").load_state_dict(getattr(module, name).state_dict())
    flags = np.isin(np.arange(tokens), [0, 17])
    hidden = torch.randn(1, tokens, heads * width, requires_grad=True)
    is_global = torch.from_numpy(flags)[None]
    (want,) = module(
        hidden,
        attention_mask=torch.where(is_global, 10000.0, 0.0),
        is_index_masked=torch.zeros(1, tokens, dtype=torch.bool),
        is_index_global_attn=is_global,
        is_global_attn=True,
    )
    weight = torch.randn(tokens, heads * width)
    (gradient,) = torch.autograd.grad((want[0] * weight).sum(), hidden)

    mask = BlockMask.from_mask(window(left=reach, right=reach) | global_tokens(flags), tokens, block_size=8)
    weights = {
        name: [to_jax(x) for x in (getattr(module, name).weight, getattr(module, name).bias)]
        for name in ("query", "key", "value")
    }

    def ours(hidden):
        qkv = [(hidden @ w.T + b).reshape(tokens, heads, width) for w, b in weights.values()]
        return block_sparse_attention(*qkv, mask, implementation="xla").reshape(tokens, -1)

    output, pull = jax.vjp(ours, to_jax(hidden[0]))
    np.testing.assert_allclose(output, to_jax(want[0]), atol=1e-5)
    np.testing.assert_allclose(pull(to_jax(weight))[0], to_jax(gradient[0]), atol=1e-5)
