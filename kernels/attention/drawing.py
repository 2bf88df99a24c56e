"""Block masks as pictures: `draw_masks` for people, `ascii_blocks` for docstrings and terminals."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from ..block_mask import BlockMask
from ..masks import causal_document_ids

SAMPLES = 1024  # of each side of a picture
NOT_CAUSAL, UNTOUCHED, MASKED, VISIBLE, FULL = range(5)
COLORS = ("#ffffff", "#eeeeee", "#fbdcb2", "#f08a1d", "#2b6cb0")
MEANING = {
    FULL: "full block: every key is visible",
    VISIBLE: "partial block: visible",
    MASKED: "partial block: masked, key by key",
    UNTOUCHED: "never touched",
}


@dataclasses.dataclass(frozen=True)
class BlockCounts:
    """Blocks that a mask visits; `share` is their part of `of`, the causal triangle with its diagonal or all blocks."""

    full: int
    partial: int
    share: float
    of: str = "the causal triangle"

    @property
    def visited(self) -> int:
        return self.full + self.partial

    def __str__(self) -> str:
        kinds = f"{self.full:,} full + {self.partial:,} partial"
        return f"{self.visited:,} blocks visited = {kinds}; {self.share:.1%} of {self.of}"


def count_blocks(mask: BlockMask) -> BlockCounts:
    """Counts over all query blocks, of all sequences if the mask has a batch axis."""
    mask = mask.checked()
    rows, columns = mask.partial_indices.shape[-2:]
    partial_blocks, full_blocks = map(np.asarray, mask.dense_blocks())
    full, partial = int(mask.full_counts.sum()), int(mask.partial_counts.sum())
    if rows == columns and _is_causal(partial_blocks, full_blocks):
        return BlockCounts(full, partial, (full + partial) / (math.prod(mask.batch) * rows * (rows + 1) / 2))
    return BlockCounts(full, partial, (full + partial) / full_blocks.size, "all blocks")


def ascii_blocks(mask: BlockMask) -> str:
    """One line a query block, one letter a key block: `P` partial, `F` full, `.` never touched.

    Raises:
      ValueError: for a mask with a batch axis.
    """
    partial_BB, full_BB = _dense_blocks(mask)
    letters_BB = np.where(full_BB, "F", np.where(partial_BB, "P", "."))
    return "\n".join(" ".join(row) for row in letters_BB)


def draw_masks(masks: Mapping[str, BlockMask], *, title: str, blocks: slice = slice(None)) -> Figure:
    """Draws masks of one sequence side by side: full and partial blocks, what each query sees, document borders.

    Args:
      masks: by the name to write above each.
      title: of the whole figure.
      blocks: which query and key blocks to show. The counts are of the whole mask all the same.

    Returns:
      A figure of its own, not known to pyplot; `figure.savefig(path)` writes it.

    Raises:
      ValueError: for a mask with a batch axis or with fewer or more keys than queries, or if `blocks` picks none.
    """
    figure = Figure(figsize=(6 * len(masks), 7.1), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(1, len(masks), squeeze=False)[0]
    for panel, (name, mask) in zip(axes, masks.items(), strict=True):
        _draw_mask(panel, mask, blocks)
        panel.set_title(f"{name}\n{count_blocks(mask)}", fontsize=10)
    handles = [Patch(facecolor=COLORS[kind], edgecolor="#999999", label=text) for kind, text in MEANING.items()]
    handles.append(Patch(facecolor="none", edgecolor="black", label="document"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def _draw_mask(axes: Axes, mask: BlockMask, blocks: slice) -> None:
    partial_BB, full_BB = _dense_blocks(mask)
    mask = mask.checked()
    if mask.q_length != mask.kv_length:
        raise ValueError(f"a mask of one sequence can be drawn, not one of {full_BB.shape} blocks")
    first, stop, step = blocks.indices(len(full_BB))
    if step != 1 or first >= stop:
        raise ValueError(f"blocks {blocks} must pick a range of the {len(full_BB)} blocks")
    kinds = _sampled_kinds(mask, partial_BB, full_BB, first, stop)
    axes.imshow(
        kinds,
        cmap=ListedColormap(COLORS),
        vmin=0,
        vmax=len(COLORS) - 1,
        interpolation="none",
        extent=(first, stop, stop, first),
    )
    if stop - first <= 64:
        causal = _is_causal(partial_BB, full_BB)  # then only the lower triangle has blocks
        for border in range(first + 1, stop):
            axes.plot([first, border if causal else stop], [border, border], color="white", linewidth=0.7)
            axes.plot([border, border], [border if causal else first, stop], color="white", linewidth=0.7)
    if (ids := causal_document_ids(mask.predicate)) is not None:
        documents = np.asarray(ids)
        starts = np.flatnonzero(np.diff(documents, prepend=documents[0] - 1)) / mask.block_size
        ends = [*starts[1:], len(full_BB)]
        for start, end in zip(starts, ends, strict=True):
            axes.add_patch(Rectangle((start, start), end - start, end - start, fill=False, linewidth=0.8, zorder=3))
    axes.set(xlim=(first, stop), ylim=(stop, first), xlabel="key block", ylabel="query block", aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _sampled_kinds(mask: BlockMask, partial_BB: np.ndarray, full_BB: np.ndarray, first: int, stop: int) -> np.ndarray:
    """What becomes of (query, key) pairs, looked at in evenly spaced places of each block."""
    size = mask.block_size
    per_block = int(np.clip(SAMPLES // (stop - first), 1, size))
    offsets = ((np.arange(per_block) + 0.5) * size / per_block).astype(int)
    positions = (size * np.arange(first, stop)[:, None] + offsets).ravel()
    query, key = positions[:, None], positions
    pair = np.ix_(positions // size, positions // size)
    heads = jnp.arange(mask.predicate.heads)[:, None, None]
    sees = np.asarray(mask.predicate.pairs(jnp.asarray(query), jnp.asarray(key), heads))
    sees = sees if sees.ndim == 2 else sees.any(axis=0)
    above = NOT_CAUSAL if _is_causal(partial_BB, full_BB) else UNTOUCHED
    kinds = np.where(key // size <= query // size, UNTOUCHED, above)
    kinds = np.where(partial_BB[pair], np.where(sees, VISIBLE, MASKED), kinds)
    return np.where(full_BB[pair], FULL, kinds)


def _is_causal(partial: np.ndarray, full: np.ndarray) -> bool:
    """Return whether no query block, of any sequence, visits a later key block."""
    return not np.triu(partial | full, 1).any()


def _dense_blocks(mask: BlockMask) -> tuple[np.ndarray, np.ndarray]:
    mask = mask.checked()
    if mask.batch:
        raise ValueError(f"a mask of one sequence can be drawn, not a batch: counts have {mask.partial_counts.shape}")
    partial_BB, full_BB = mask.dense_blocks()
    return np.asarray(partial_BB), np.asarray(full_BB)
