"""Rotary embedding of a head in registers: what the products that make q and k do, and attention backward undoes."""

from collections.abc import Sequence

from jax import Array

HEAD_WIDTH = 128
ROTATED = HEAD_WIDTH // 4  # pairs that rotate: channel i < 32 of a half with channel i of the other

type Halves = Sequence[Array]  # two tiles (rows, R), one of each half of a head


def rotate(x: Halves, cos: Array, sin: Array) -> list[Array]:
    """By the angle; with -sin, back."""
    return [x[0] * cos + x[1] * sin, x[1] * cos - x[0] * sin]
