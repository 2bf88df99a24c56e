"""Muon: momentum, orthogonalised by Newton-Schulz, as an optax transform.

Matrices are stored (output features, input features): rows are outputs.

Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

import math
from collections import defaultdict
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from .banks import Buckets, pack, unpack
from .sharding import Shards

QUINTIC = (3.4445, -4.7750, 2.0315)
# A dtype instance, not `jnp.bfloat16`: the latter is callable, and
# `optax.inject_hyperparams` takes every callable argument for a schedule.
BFLOAT16 = jnp.dtype(jnp.bfloat16)


def newton_schulz(matrices: ArrayLike, *, steps: ArrayLike = 5, dtype: DTypeLike = BFLOAT16) -> Array:
    """Roughly orthogonalise each matrix: U S V^T becomes about U V^T, without an SVD.

    One step applies the odd polynomial p(s) = a s + b s^3 + c s^5 to every
    singular value and leaves the singular vectors alone: matmuls are all it needs.
    The division by the Frobenius norm first brings every s into [0, 1].

    It does not converge to U V^T, and that is on purpose. A polynomial with a
    fixed point at 1 has to rise gently from 0, and small singular values need many
    steps to get anywhere. This one gives up the fixed point (p(1) = 0.701) for
    the steepest slope at 0: a small s grows 3.4445-fold a step, and one that has
    arrived wanders around 1 for ever. After 5 steps all that began above 0.002 lie
    in [0.68, 1.21]. As an optimiser's update that is as good as U V^T, and for the
    same reason bfloat16 is precise enough.

    Args:
      matrices: (..., rows, columns); leading axes are a batch of independent matrices. They are first rounded to
        `dtype`.
      steps: how often to apply the polynomial, any number. If traced, the loop is not unrolled.
      dtype: of the matmuls, the iterates and the result.

    Returns:
      (..., rows, columns) in `dtype`. A zero matrix stays zero. One whose sum of squares overflows float32 (a norm
      above 1.8e19) becomes NaN.

    Raises:
      ValueError: if `matrices` has fewer than 2 axes, or `dtype` is no type of floats.

    Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    matrices = jnp.asarray(matrices)
    if matrices.ndim < 2:
        raise ValueError(f"newton_schulz needs (..., rows, columns), got shape {matrices.shape}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"newton_schulz computes with floats, got dtype {jnp.dtype(dtype)}")
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]

    def gram_matrix(x: Array) -> Array:
        """X X^T, or X^T X of a tall matrix: on the short side it is cheap."""
        return x.mT @ x if tall else x @ x.mT

    wide = widen(matrices.astype(dtype))
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=(-2, -1), keepdims=True))
    norm = jnp.where(jnp.isinf(norm), jnp.nan, norm)  # or all would silently become 0

    # Matmuls run in `dtype`, coefficients are not rounded to it: as bfloat16 they alone (3.4445 becomes 3.4375)
    # would move the result more than all other rounding together.
    def polynomial(_: Array, carry: tuple[Array, float]) -> tuple[Array, float]:
        x, scale = carry
        gram = gram_matrix(x)
        wide_q = scale**2 * (b / a) * widen(gram) + scale**4 * (c / a) * widen(gram @ gram)
        q = wide_q.astype(dtype)
        return x + (x @ q if tall else q @ x), a * scale

    # The iterate is scale times x. In p(s) = a (s + b/a s^3 + c/a s^5) the leading a only multiplies the scale, which
    # starts so that it ends as 1. What is left is x + Q x, and that a matmul does by itself: it adds x before it
    # rounds, instead of a pass over x afterwards. The squared Gram matrix is of size scale^-4 at most.
    if isinstance(steps, int) and 4 * steps * math.log(a) < math.log(float(jnp.finfo(dtype).max)):
        scale = 1 / a**steps
        x = (wide / (scale * (norm + 1e-7))).astype(dtype)
        # Unrolled, XLA sees straight-line matmuls.
        unrolled: Array = jax.lax.fori_loop(0, steps, polynomial, (x, scale), unroll=True)[0]
        return unrolled

    # So many steps, or a traced number of them, start anew each time.
    def one_step(i: Array, x: Array) -> Array:
        return polynomial(i, ((a * widen(x)).astype(dtype), 1 / a))[0]

    x = (wide / (norm + 1e-7)).astype(dtype)
    result: Array = jax.lax.fori_loop(0, steps, one_step, x)
    return result


class MuonState(NamedTuple):
    """`count`: updates made, int32 scalar. `momentum`: like the parameters; with shards, their `banks.pack`."""

    count: Array  # type: ignore[assignment]  # optax's name for it, and a method of tuple
    momentum: optax.Updates


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    newton_schulz_steps: ArrayLike = 5,
    dtype: DTypeLike = BFLOAT16,
    shards: Shards | None = None,
) -> optax.GradientTransformation:
    """Momentum, orthogonalised: the update of a matrix is `-lr sqrt(max(1, rows / columns)) O`.

    O is `newton_schulz` of the (Nesterov) momentum, an exponential average of the
    gradients with weight 1 - momentum. Leaves have shape (..., rows, columns), and
    leading axes are a batch of independent matrices: a merged (3, D, D) projection is three.

    Matrices of equal shape are stacked across leaves, so that Newton-Schulz runs once
    per distinct shape however many layers there are.

    Args:
      learning_rate: a number, or a schedule of the number of updates made so far.
      momentum: likewise.
      nesterov: look ahead: average the gradient with the new momentum once more.
      newton_schulz_steps: under `optax.inject_hyperparams`, name it in `static_args`
        to keep the loop unrolled.
      dtype: of the Newton-Schulz iterates, in which O travels between devices. Momentum and update have the dtype
        of the parameters (with `shards`, an update that is not given any has the gradient's).
      shards: update runs inside a `jax.shard_map`, takes the device's own gradient and orthogonalises the device's
        share of the matrices. Gradients are reduced a bucket at a time (`banks`).

    Raises:
      ValueError: (at init) if a leaf has fewer than 2 axes, or no numbers.
    """

    def init(params: optax.Params) -> MuonState:
        for path, leaf in jax.tree.leaves_with_path(params):
            if jnp.ndim(leaf) < 2 or not jnp.size(leaf):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"muon updates matrices that are not empty, but parameter '{name}' has shape {jnp.shape(leaf)}; "
                    "give it another optimiser through optax.partition"
                )
        zeros = jax.tree.map(jnp.zeros_like, params)
        return MuonState(jnp.zeros([], jnp.int32), zeros if shards is None else pack(zeros, shards.devices))

    def update(
        updates: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        m = momentum(state.count) if callable(momentum) else momentum
        gradient = updates
        if shards is not None:
            gradient = jax.tree.map(shards.reduce_mean, pack(updates, shards.devices))

        # Not m old + (1 - m) new: XLA takes the product (1 - m) new for part of the matmul that makes the gradient, and
        # if it then finds cuBLAS faster, which scales nothing, the product costs a pass of its own.
        def average(old: Array, new: Array) -> Array:
            mixed: Array = old + (1 - m) * (new - old)
            return mixed.astype(old.dtype)

        # One pass over gradient and momentum writes what Newton-Schulz takes as well. Left to itself, XLA comes back to
        # both for it, and first copies the momentum, whose memory the new one gets.
        def accumulate(old: Array, new: Array) -> tuple[Array, Array]:
            buffer = average(old, new)
            ahead = average(buffer, new) if nesterov else buffer
            return jax.lax.optimization_barrier((buffer, ahead.astype(dtype)))

        leaves, structure = jax.tree.flatten(gradient)
        pairs = list(map(accumulate, jax.tree.leaves(state.momentum), leaves))
        buffers, ahead = (jax.tree.unflatten(structure, [pair[i] for pair in pairs]) for i in (0, 1))
        o = _orthogonalise(ahead, newton_schulz_steps, dtype)
        if shards is not None:
            o = unpack(_gather(o, shards), updates, shards.devices)
        like = state.momentum if shards is None else updates if params is None else params
        return jax.tree.map(_scale, o, like), MuonState(optax.safe_increment(state.count), buffers)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def _orthogonalise(tree: optax.Updates, steps: ArrayLike, dtype: DTypeLike) -> optax.Updates:
    """`newton_schulz` of each matrix, in one call per distinct shape."""
    leaves, structure = jax.tree.flatten(tree)
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, leaf in enumerate(leaves):
        members[leaf.shape[-2:]].append(index)

    results = list(leaves)
    for shape, indices in members.items():
        parts = [leaves[i].reshape(-1, *shape) for i in indices]
        stack = newton_schulz(jnp.concatenate(parts), steps=steps, dtype=dtype)
        borders = list(accumulate(len(part) for part in parts))[:-1]
        for i, part in zip(indices, jnp.split(stack, borders), strict=True):
            results[i] = part.reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, results)


def _gather(buckets: Buckets, shards: Shards) -> Buckets:
    """Every device's share of the buckets: one all-gather a bank, whose buckets Newton-Schulz finishes together."""

    def bank(shares: tuple[Array, ...]) -> tuple[Array, ...]:
        borders = list(accumulate(len(share) for share in shares))[:-1]
        everything = shards.gather(jnp.concatenate(shares)[None])
        parts = jnp.split(everything, borders, axis=1)
        return tuple(part.reshape(-1, *part.shape[2:]) for part in parts)

    return tuple(map(bank, buckets))


def _scale(o: Array, like: Array) -> Array:
    """sqrt(max(1, rows / columns)) O in the parameter's precision: the record's in-place add promotes the same way."""
    rows, columns = o.shape[-2:]
    scaled: Array = math.sqrt(max(1, rows / columns)) * o.astype(like.dtype)
    return scaled


def widen[Tree](tree: Tree) -> Tree:
    """In float32, or wider if it was."""
    widened: Tree = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)
    return widened
