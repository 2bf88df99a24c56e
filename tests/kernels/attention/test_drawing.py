"""Drawn masks, read back from letters and pixels."""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from jax_speedrun.kernels import block_mask
from jax_speedrun.kernels.attention.drawing import (
    COLORS,
    FULL,
    MASKED,
    UNTOUCHED,
    VISIBLE,
    ascii_blocks,
    count_blocks,
    draw_masks,
)
from jax_speedrun.kernels.block_mask import BLOCK_SIZE, DOCUMENT_START, BlockMask, long_short_masks


def masks_of(blocks: int, starts: list[int], window: int) -> tuple[BlockMask, BlockMask]:
    tokens_T = np.zeros(blocks * BLOCK_SIZE, np.int32)
    tokens_T[starts] = DOCUMENT_START
    return long_short_masks(jnp.asarray(tokens_T), window)


@pytest.fixture(scope="module")
def example() -> BlockMask:
    """Three documents over six blocks, as in the docstring of block_mask."""
    return masks_of(6, [0, 3 * BLOCK_SIZE + 40, 5 * BLOCK_SIZE + 7], 6)[0]


def test_ascii_is_the_picture_in_the_docstring(example: BlockMask) -> None:
    assert block_mask.__doc__ is not None
    documented = re.findall(r"\d [abc]+ +((?:[PF.] ){5}[PF.])  ", block_mask.__doc__)
    assert len(documented) == 6
    assert ascii_blocks(example).splitlines() == documented


def test_ascii_of_windows() -> None:
    long, short = masks_of(5, [0], 3)
    assert ascii_blocks(long).splitlines() == ["P . . . .", "F P . . .", "F F P . .", ". F F P .", ". . F F P"]
    assert ascii_blocks(short).splitlines() == ["P . . . .", ". P . . .", ". . P . .", ". . . P .", ". . . . P"]


def test_counts_are_those_of_the_letters(example: BlockMask) -> None:
    counts, letters = count_blocks(example), ascii_blocks(example)
    assert (counts.full, counts.partial) == (letters.count("F"), letters.count("P")) == (3, 12)
    assert counts.visited == 15
    assert counts.share == pytest.approx(15 / 21)
    assert str(counts) == "15 blocks visited = 3 full + 12 partial; 71.4% of the causal triangle"


def pixels_at(figure_path: Path, mask: BlockMask, blocks: slice, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Colours of the drawn figure at (query, key) token pairs, found through the axes' own coordinates."""
    figure = draw_masks({"only": mask}, title="a title", blocks=blocks)
    figure.savefig(figure_path)
    picture = matplotlib.image.imread(figure_path)[..., :3]
    (axes,) = figure.axes
    points = np.stack([keys + 0.5, queries + 0.5], axis=-1) / mask.block_size
    x, y = axes.transData.transform(points).T
    return picture[(picture.shape[0] - y).astype(int), x.astype(int)]


@pytest.mark.parametrize("blocks", [slice(None), slice(1, 5)])
def test_pixels_show_what_becomes_of_each_pair(tmp_path: Path, blocks: slice) -> None:
    long, short = masks_of(6, [0, 3 * BLOCK_SIZE + 40, 5 * BLOCK_SIZE + 70], 4)
    first, stop, _ = blocks.indices(6)
    # Away from the block borders, document borders and the diagonal, which have lines or a staircase of their own.
    inside = [8, 20, 54, 90, 119]
    places = np.array([block * BLOCK_SIZE + offset for block in range(first, stop) for offset in inside])
    queries, keys = (grid.ravel() for grid in np.meshgrid(places, places, indexing="ij"))
    clear = (abs(queries - keys) > 4) & (keys // BLOCK_SIZE <= queries // BLOCK_SIZE)
    queries, keys = queries[clear], keys[clear]
    for mask in (long, short):
        visible = np.asarray(mask.dense())[queries, keys]
        letters = np.array([list(row.split(" ")) for row in ascii_blocks(mask).splitlines()])
        letter = letters[queries // BLOCK_SIZE, keys // BLOCK_SIZE]
        kind = np.where(letter == "F", FULL, np.where(letter == ".", UNTOUCHED, np.where(visible, VISIBLE, MASKED)))
        assert set(kind) == {FULL, VISIBLE, MASKED, UNTOUCHED}
        expected = np.array([matplotlib.colors.to_rgb(COLORS[k]) for k in kind])
        found = pixels_at(tmp_path / "figure.png", mask, blocks, queries, keys)
        np.testing.assert_allclose(found, expected, atol=0.01)


def test_document_borders_are_drawn(example: BlockMask) -> None:
    (axes,) = draw_masks({"only": example}, title="").axes
    found = sorted(patch.get_extents().transformed(axes.transData.inverted()).bounds for patch in axes.patches)
    borders = [0, 3 + 40 / BLOCK_SIZE, 5 + 7 / BLOCK_SIZE, 6]
    expected = [(start, end, end - start, start - end) for start, end in itertools.pairwise(borders)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_cannot_be_drawn_is_said(example: BlockMask) -> None:
    with pytest.raises(ValueError, match="range of the 6 blocks"):
        draw_masks({"only": example}, title="", blocks=slice(4, 4))
    batch = jax.tree.map(lambda leaf: leaf[None], example)
    with pytest.raises(ValueError, match="not a batch"):
        ascii_blocks(batch)
