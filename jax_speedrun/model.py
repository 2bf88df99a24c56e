"""The U-net GPT of the record, in Flax NNX: one sequence of T tokens in, its mean loss out.

Names carry shapes: T tokens, D model width, H heads, K head width, F MLP width,
V vocabulary, C = H K. Matrices are stored (out, in), as the record does: Muon's
scale depends on which side is which.

Source: NanoGPT speedrun record of 16 January 2025; `ModelConfig` holds its numbers.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .config import ATTENTION_SCALE, NORM_EPSILON, ROTARY_BASE, ModelConfig
from .kernels.block_mask import BlockMask, long_short_masks
from .kernels.embedding import embed, sort_tokens
from .kernels.head import HeadPrecision, head_logits, head_loss
from .kernels.implementation import Implementation
from .kernels.layer.mlp import mlp
from .kernels.layer.residual import add_linear, rstd
from .kernels.layer.self_attention import self_attention


def norm(x_TD: Array) -> Array:
    """Return the RMS norm of every token, without weights, computed in float32."""
    wide_TD = x_TD.astype(jnp.float32)
    return (wide_TD * rstd(wide_TD, NORM_EPSILON)[:, None]).astype(x_TD.dtype)


def rotary(tokens: int, head_width: int) -> tuple[Array, Array]:
    """Return cos and sin of half-truncated rotary angles, each (T, K / 4): the other pairs of a head do not turn."""
    frequencies = (1 / ROTARY_BASE) ** jnp.linspace(0, 1, head_width // 4, dtype=jnp.float32)
    angles_TR = jnp.arange(tokens, dtype=jnp.float32)[:, None] * frequencies
    return jnp.cos(angles_TR), jnp.sin(angles_TR)


def mix(weights: Array, *values: Array) -> Array:
    """Return sum_i weights[i] values[i] in float32, in the values' dtype."""
    total = sum(weight * value.astype(jnp.float32) for weight, value in zip(weights, values, strict=True))
    return jnp.asarray(total).astype(values[0].dtype)


def uniform_matrix(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    """Draw uniformly, with standard deviation 0.5 / sqrt(fan_in), fan_in being the last axis."""
    bound = math.sqrt(3) * 0.5 / math.sqrt(shape[-1])
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


class Attention(nnx.Module):
    """Merged QKV of norm(x), normalised and rotated q and k, values mixed with the token's value embedding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.heads = config.heads
        channels = config.heads * config.head_width
        self.qkv_3CD = nnx.Param(uniform_matrix(rngs, (3, channels, config.width)))
        self.lambdas = nnx.Param(jnp.array([0.5, 0.5], jnp.float32))
        self.out_DC = nnx.Param(jnp.zeros((config.width, channels), jnp.float32))

    def __call__(
        self,
        x_TD: Array,
        rstd_T: Array,
        value_embedding_TC: Array | None,
        mask: BlockMask,
        cos_sin: tuple[Array, Array],
        attention: Implementation,
        kernels: Implementation,
    ) -> tuple[Array, Array]:
        """Return x + attention(norm(x)) and its rstd."""
        x_TD, y_TC = self_attention(
            x_TD,
            rstd_T,
            self.qkv_3CD[...],
            value_embedding_TC,
            self.lambdas[...],
            *cos_sin,
            mask,
            heads=self.heads,
            softmax_scale=ATTENTION_SCALE,
            epsilon=NORM_EPSILON,
            attention=attention,
            implementation=kernels,
        )
        return add_linear(x_TD, y_TC, self.out_DC[...], epsilon=NORM_EPSILON, implementation=kernels)


class MLP(nnx.Module):
    """x and what comes of it by norm, D -> F, relu squared, F -> D."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.fc_FD = nnx.Param(uniform_matrix(rngs, (config.mlp_width, config.width)))
        self.proj_DF = nnx.Param(jnp.zeros((config.width, config.mlp_width), jnp.float32))

    def __call__(self, x_TD: Array, rstd_T: Array, kernels: Implementation) -> Array:
        return mlp(x_TD, rstd_T, self.fc_FD[...], self.proj_DF[...], kernels)


class Block(nnx.Module):
    """The residual stream is mixed with the embedding x0, then attention (if any) and MLP add to it."""

    def __init__(self, config: ModelConfig, layer: int, rngs: nnx.Rngs):
        self.lambdas = nnx.Param(jnp.array([1.0, 0.0], jnp.float32))
        self.attention = None if layer in config.attention_free_layers else Attention(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x_TD: Array,
        x0_TD: Array,
        value_embedding_TC: Array | None,
        mask: BlockMask,
        cos_sin: tuple[Array, Array],
        attention: Implementation,
        kernels: Implementation,
    ) -> Array:
        x_TD = mix(self.lambdas[...], x_TD, x0_TD)
        rstd_T = jax.lax.stop_gradient(rstd(x_TD, NORM_EPSILON))  # known: residual.py
        if self.attention is not None:
            x_TD, rstd_T = self.attention(x_TD, rstd_T, value_embedding_TC, mask, cos_sin, attention, kernels)
        return self.mlp(x_TD, rstd_T, kernels)


def model_graph(config: ModelConfig) -> nnx.GraphDef["GPT"]:
    """Return the model without its values: `nnx.merge` of it and parameters is a `GPT`."""
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))


class GPT(nnx.Module):
    """The whole model. Parameters: `embed`, `value_embeds`, `blocks`, `skip_weights`, `head`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        channels = config.heads * config.head_width

        def table(width: int) -> nnx.Param:
            values = jax.random.normal(rngs.params(), (config.vocab_size, width), jnp.float32)
            return nnx.Param(values.astype(config.table_dtype))

        self.embed = table(config.width)
        self.value_embeds = nnx.List([table(channels) for _ in range(config.value_embedding_tables)])
        self.blocks = nnx.List([Block(config, layer, rngs) for layer in range(config.layers)])
        self.skip_weights = nnx.Param(jnp.ones(config.layers // 2, jnp.float32))
        self.head = nnx.Param(jnp.zeros((config.padded_vocab_size, config.width), jnp.float32))

    def hidden(
        self,
        tokens_T: Array,
        window_blocks: Array,
        attention: Implementation = "auto",
        kernels: Implementation = "auto",
    ) -> Array:
        """Return the normalised output of the last layer, (T, D), in the compute dtype."""
        config = self.config
        with jax.named_scope("masks"):
            long_mask, short_mask = long_short_masks(tokens_T, window_blocks)
        cos_sin = rotary(tokens_T.shape[0], config.head_width)
        with jax.named_scope("embedding"):
            order = sort_tokens(tokens_T, config.vocab_size) if kernels == "hopper" else None  # once for all tables

            def lookup(table: nnx.Param) -> Array:
                return embed(table[...], tokens_T, order, kernels).astype(config.compute_dtype)

            values = [lookup(table) for table in self.value_embeds]
            x_TD = lookup(self.embed)
        x_TD = x0_TD = norm(x_TD)

        skips: list[Array] = []
        half = config.layers // 2
        for layer, block in enumerate(self.blocks):
            if layer >= half:
                x_TD = mix(jnp.stack([jnp.float32(1), self.skip_weights[layer - half]]), x_TD, skips.pop())
            table_index = config.value_embedding_of(layer)
            value_embedding_TC = None if table_index is None else values[table_index]
            mask = long_mask if layer in config.long_layers else short_mask
            x_TD = block(x_TD, x0_TD, value_embedding_TC, mask, cos_sin, attention, kernels)
            if layer < half:
                skips.append(x_TD)
        return norm(x_TD)

    def loss(
        self,
        tokens_T: Array,
        targets_T: Array,
        window_blocks: Array,
        *,
        attention: Implementation = "auto",
        kernels: Implementation = "auto",
        head_precision: HeadPrecision,
    ) -> Array:
        """Return the mean cross-entropy in nats of `targets_T` after each of `tokens_T`, a float32 scalar."""
        x_TD = self.hidden(tokens_T, window_blocks, attention, kernels)
        head_kernels = kernels if head_precision == "fp8" else "xla"  # evaluation has another precision
        with jax.named_scope("head"):
            return head_loss(x_TD, self.head[...], targets_T, head_precision, head_kernels)

    def logits(
        self, tokens_T: Array, positions_P: Array, window_blocks: Array, *, attention: Implementation = "auto"
    ) -> Array:
        """Return capped float32 logits (P, V padded) of what follows the tokens at `positions_P`."""
        x_PD = self.hidden(tokens_T, window_blocks, attention, "xla")[positions_P]
        return head_logits(x_PD, self.head[...], self.config.evaluation_precision)
