"""The real JAX side, on a small model."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_speedrun.config import PRESETS
from jax_speedrun.schedules import step_of_window
from jax_speedrun.tools.comparison.jax_side import JaxSide
from jax_speedrun.tools.comparison.parity import fill
from jax_speedrun.tools.comparison.turns import make_job
from jax_speedrun.tools.comparison.worker import PARTS

TINY = PRESETS["tiny"]


@pytest.mark.slow
def test_jax_side_gives_back_what_it_loads_and_steps_like_the_program():
    small = {"padded_vocab_size": 256, "layers": 4, "long_layers": (0, 3), "attention_free_layers": (2,)}
    model = dataclasses.replace(TINY.model, value_embedding_tables=1, width=32, mlp_width=48, **small)
    side = JaxSide(make_job(dataclasses.replace(TINY, model=model, sequence_length=256), "parity"))
    weights = fill(side.parameters(), 0)
    assert "blocks.0.attention.qkv_3CD" in weights
    side.load(weights)
    for name, value in side.parameters().items():
        np.testing.assert_array_equal(value, weights[name])
    tokens = np.arange(256, dtype=np.int32)
    loss, gradients = side.gradients(tokens, tokens, 2)
    assert all(gradients[name].any() for name in weights)
    # With a window of 2 blocks: the step that has it.
    step = step_of_window(2, TINY.steps, TINY.optimizer.window_tokens)
    assert side.step(tokens, tokens, step) == pytest.approx(loss, rel=1e-5)
    assert side.evaluate(tokens[None], tokens[None], step) < loss
    moved = side.parameters()
    assert all((moved[name] != weights[name]).any() for name in weights)
    for part in (*(part for parts in PARTS.values() for part in parts), "matmul"):
        result = side.dispatcher(part, tokens, tokens, 2, step)()
        side.wait(result)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result)), part
    with pytest.raises(ValueError, match=r"head: weights of shape \(1, 1\)"):
        side.load({**weights, "head": np.zeros((1, 1))})
