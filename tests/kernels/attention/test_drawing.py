"""Counts of masks; tests/tools/test_draw_masks.py looks at the pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_speedrun.kernels.attention.drawing import ascii_blocks, count_blocks
from tests.numpy_attention import random_mask


def test_counts_of_a_batch_are_those_of_its_masks_together():
    masks = [random_mask(np.random.default_rng(seed), 5, 8, 0.4)[0] for seed in range(3)]
    alone = [count_blocks(mask) for mask in masks]
    together = count_blocks(jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks))
    assert (together.full, together.partial) == (sum(c.full for c in alone), sum(c.partial for c in alone))
    assert together.share == pytest.approx(np.mean([c.share for c in alone]))
    assert together.share == pytest.approx(together.visited / (3 * 15))


def test_a_batch_has_no_one_picture():
    mask, _ = random_mask(np.random.default_rng(0), 5, 8, 0.4)
    with pytest.raises(ValueError, match="a mask of one sequence can be drawn, not a batch"):
        ascii_blocks(jax.tree.map(lambda leaf: leaf[None], mask))
