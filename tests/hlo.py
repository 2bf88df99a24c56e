"""What a compiled program computes, read from its HLO."""

import math
import re

import jax


def text(lowered: jax.stages.Lowered) -> str:
    hlo = lowered.compile().as_text()
    assert hlo is not None
    return hlo


def dot_flops(hlo: str) -> int:
    """2 x the output's numbers x the contracted length, over all matmuls of a program without loops."""
    shapes = {name: dims for name, dims in re.findall(r"%(\S+) = \w+\[([\d,]*)\]", hlo)}
    total = 0
    for out, lhs, axes in re.findall(
        r"= \w+\[([\d,]*)\]\S* dot\(%?([\w.\-]+),.*?lhs_contracting_dims=\{([\d,]*)\}", hlo
    ):
        sizes = [int(n) for n in shapes[lhs].split(",")]
        contracted = math.prod(sizes[int(axis)] for axis in axes.split(","))
        total += 2 * contracted * math.prod(int(n) for n in out.split(","))
    return total
