"""Drawn masks, read back from letters, pixels and files."""

import itertools
import os
import re
import subprocess
import sys
import types
import xml.etree.ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from jax_speedrun.config import PRESETS
from jax_speedrun.errors import UsageError
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
from tests.paths import ROOT
from tests.scripts import load_script

SCRIPT = ROOT / "scripts" / "draw_masks.py"
TINY = ROOT / "jax_speedrun" / "data" / "tiny"


def masks_of(blocks: int, starts: list[int], window: int) -> tuple[BlockMask, BlockMask]:
    tokens_T = np.zeros(blocks * BLOCK_SIZE, np.int32)
    tokens_T[starts] = DOCUMENT_START
    return long_short_masks(jnp.asarray(tokens_T), window)


@pytest.fixture(scope="module")
def example() -> BlockMask:
    """Three documents over six blocks, as in the docstring of block_mask."""
    return masks_of(6, [0, 3 * BLOCK_SIZE + 40, 5 * BLOCK_SIZE + 7], 6)[0]


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    return load_script("draw_masks")


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


def run(script: types.ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_masks.py", *map(str, arguments)])
    script.main()


def test_script_draws_the_batch_of_the_step(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "masks.png"
    run(script, monkeypatch, "--step", 7, "--steps", 20, "--sequence-length", 2048, "--out", out)
    said = capsys.readouterr().out

    # The shard read by hand: step 7 begins after 7 batches of all its sequences.
    shard = np.fromfile(TINY / "tiny_train_000000.bin", "<u2")[512:]
    start = 7 * PRESETS["tiny"].sequences * 2048
    window = -(-PRESETS["tiny"].optimizer.window_tokens * 7 // (20 * 128))
    for name, mask in zip(
        ("long", "short"), long_short_masks(jnp.asarray(shard[start : start + 2048]), window), strict=True
    ):
        letters = ascii_blocks(mask)
        assert f"{letters.count('F')} full + {letters.count('P')} partial" in said.split(name)[1].splitlines()[0]
    assert f"window of {window} blocks" in said
    assert matplotlib.image.imread(out).shape[2] == 4
    assert list(tmp_path.iterdir()) == [out]


def test_script_zooms_and_writes_svg_after_more_than_one_pass(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The record's last step lies far behind the end of the tiny data."""
    out = tmp_path / "masks.svg"
    run(script, monkeypatch, "--preset", "sub3min", "--sequence-length", 1024, "--blocks", "2:", "--out", out)
    assert xml.etree.ElementTree.parse(out).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--step", "50"], "--step 50"),
        (["--step", "-1"], "--step -1"),
        (["--steps", "0"], "--steps"),
        (["--sequence-length", "100"], "--sequence-length"),
        (["--blocks", "3"], "--blocks 3"),
        (["--blocks", "a:b"], "--blocks a:b"),
        (["--blocks", "4:2"], "--blocks 4:2"),
        (["--blocks", "0:99"], "--blocks 0:99"),
        (["--out", "masks.gif"], "--out masks.gif"),
        (["--out", "no/such/folder/masks.png"], "--out no/such"),
        (["--data", "nowhere"], "--data nowhere"),
    ],
)
def test_script_names_bad_input(
    script: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    names: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=names) as error:
        run(script, monkeypatch, *arguments)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_script_says_it_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--data", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("draw_masks.py: error: --data nowhere")
    assert done.stderr.count("\n") == 1
