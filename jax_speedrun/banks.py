"""Hidden matrices in banks: how they are gathered into stacks that devices can share.

All matrices of one shape, tall ones laid down, form a bank. It is cut into buckets
in the order in which the backward pass finishes them, so that a bucket's reduction
can start while the layers below are still at work. Zeros fill a bucket up to a
multiple of the devices: each then owns whole matrices, which is what Newton-Schulz
needs.

    leaves, last layer first:   qkv qkv qkv out | qkv qkv qkv out | ...
    one bucket on 8 devices:    [0] [1] [2] [3]   [4] [5] [6] [7]     device of each matrix
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import batched
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

SMALLEST_BUCKET = 8
"""Matrices in a bucket, at least: 19 MB of the record's squares, well above what a collective's start costs."""

Buckets = tuple[tuple[Array, ...], ...]
"""For each bank its buckets, (matrices, short side, long side)."""


class Bank(NamedTuple):
    """Where the matrices of one shape are.

    members: for each bucket its matrices, as (leaf of the tree, index within the leaf).
    sizes: matrices in each bucket with its zeros; a multiple of the devices.
    """

    short: int
    long: int
    members: tuple[tuple[tuple[int, int], ...], ...]
    sizes: tuple[int, ...]


def banks(shapes: Sequence[tuple[int, ...]], devices: int) -> list[Bank]:
    """The banks of a tree whose leaves have `shapes`, each (..., rows, columns).

    Leaves are taken in reverse: in a tree whose layers are numbered from 0, that is
    the order in which the backward pass reaches them.
    """
    members: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for leaf in reversed(range(len(shapes))):
        *leading, rows, columns = shapes[leaf]
        members[min(rows, columns), max(rows, columns)] += [(leaf, index) for index in range(math.prod(leading))]
    bucket = round_up(SMALLEST_BUCKET, devices)
    result = []
    for (short, long), matrices in members.items():
        buckets = tuple(batched(matrices, bucket))
        result.append(Bank(short, long, buckets, tuple(round_up(len(b), devices) for b in buckets)))
    return result


def pack(tree: Any, devices: int) -> Buckets:
    """The matrices of `tree` in their buckets, zeros included."""
    leaves = jax.tree.leaves(tree)
    laid = [lay_down(leaf.reshape(-1, *leaf.shape[-2:])) for leaf in leaves]

    def bucket(members: tuple[tuple[int, int], ...], size: int) -> Array:
        stack = jnp.stack([laid[leaf][index] for leaf, index in members])
        return jnp.pad(stack, ((0, size - len(members)), (0, 0), (0, 0)))

    layout = banks([leaf.shape for leaf in leaves], devices)
    return tuple(tuple(map(bucket, bank.members, bank.sizes)) for bank in layout)


def unpack[Tree](buckets: Buckets, like: Tree, devices: int) -> Tree:
    """The inverse of `pack`: a tree of the structure and shapes of `like`, in the buckets' dtype."""
    leaves, structure = jax.tree.flatten(like)
    found: dict[tuple[int, int], Array] = {}
    for bank, stacks in zip(banks([leaf.shape for leaf in leaves], devices), buckets, strict=True):
        for members, stack in zip(bank.members, stacks, strict=True):
            found |= {member: stack[position] for position, member in enumerate(members)}

    def leaf_of(number: int, shape: tuple[int, ...]) -> Array:
        matrices = [found[number, index] for index in range(math.prod(shape[:-2]))]
        tall = shape[-2] > shape[-1]
        return jnp.stack([m.mT if tall else m for m in matrices]).reshape(shape)

    tree: Tree = jax.tree.unflatten(structure, [leaf_of(i, leaf.shape) for i, leaf in enumerate(leaves)])
    return tree


def lay_down(matrices: Array) -> Array:
    """Transpose tall matrices."""
    wide: Array = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    return wide


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
