"""Muon for the hidden matrices, Adam for the rest, and the schedules of a run.

Everything is an optax transform or a plain function of the step, so the pieces
compose with `optax.partition`, `optax.chain`, `optax.inject_hyperparams` and
schedules. Matrices are stored (output features, input features): rows are outputs.

Source: the "Sub-3 minute" NanoGPT speedrun record of 16 January 2025.
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

from .config import OptimizerConfig
from .kernels.block_mask import BLOCK_SIZE

QUINTIC = (3.4445, -4.7750, 2.0315)
# A dtype instance, not `jnp.bfloat16`: the latter is callable, and
# `optax.inject_hyperparams` takes every callable argument for a schedule.
BFLOAT16 = jnp.dtype(jnp.bfloat16)


def newton_schulz(matrices: Array, *, steps: ArrayLike = 5, dtype: DTypeLike = BFLOAT16) -> Array:
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
      matrices: (..., rows, columns); leading axes are a batch of independent matrices.
      steps: how often to apply the polynomial. If traced, the loop is not unrolled.
      dtype: of the matmuls, the iterates and the result.

    Returns:
      (..., rows, columns) in `dtype`. A zero matrix stays zero.

    Raises:
      ValueError: if `matrices` has fewer than 2 axes.

    Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    if matrices.ndim < 2:
        raise ValueError(f"newton_schulz needs (..., rows, columns), got shape {matrices.shape}")
    a, b, c = QUINTIC
    # The Gram matrix below is rows x rows: cheap on the short side.
    x = _lay_down(matrices).astype(dtype)
    wide = _widen(x)
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=(-2, -1), keepdims=True))
    x = (wide / (norm + 1e-7)).astype(dtype)

    # Matmuls run in `dtype`, sums do not: as bfloat16 the coefficients alone (3.4445 becomes
    # 3.4375) would move the result more than all other rounding together.
    def polynomial(_: Array, x: Array) -> Array:
        gram = x @ x.mT
        inner = b * _widen(gram) + c * _widen(gram @ gram)
        return (a * _widen(x) + _widen(inner.astype(dtype) @ x)).astype(dtype)

    # Unrolled, XLA sees straight-line matmuls; a while loop cannot be unrolled to a traced bound.
    unroll = True if isinstance(steps, int) else None
    result: Array = jax.lax.fori_loop(0, steps, polynomial, x, unroll=unroll)
    if result.shape != matrices.shape:
        result = result.mT
    return result


class MuonState(NamedTuple):
    """`count`: updates made, int32 scalar. `momentum`: like the parameters."""

    count: Array  # type: ignore[assignment]  # optax's name for it, and a method of tuple
    momentum: optax.Updates


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    newton_schulz_steps: ArrayLike = 5,
    dtype: DTypeLike = BFLOAT16,
) -> optax.GradientTransformation:
    """Momentum, orthogonalised: the update of a matrix is `-lr sqrt(max(1, rows / columns)) O`.

    O is `newton_schulz` of the (Nesterov) momentum, an exponential average of the
    gradients with weight 1 - momentum. Leaves have shape (..., rows, columns), and
    leading axes are a batch of independent matrices: a merged (3, D, D) projection is three.

    Matrices of equal shape are stacked across leaves, tall ones after transposition,
    so that Newton-Schulz runs once per distinct shape however many layers there are.

    Args:
      learning_rate: a number, or a schedule of the number of updates made so far.
      momentum: likewise.
      nesterov: look ahead: average the gradient with the new momentum once more.
      newton_schulz_steps: under `optax.inject_hyperparams`, name it in `static_args`
        to keep the loop unrolled.
      dtype: of the Newton-Schulz iterates. Momentum and update have the dtype of the parameters.

    Raises:
      ValueError: (at init) if a leaf has fewer than 2 axes.
    """

    def init(params: optax.Params) -> MuonState:
        for path, leaf in jax.tree.leaves_with_path(params):
            if jnp.ndim(leaf) < 2:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"muon updates matrices, but parameter '{name}' has shape {jnp.shape(leaf)}; "
                    "give it another optimiser through optax.partition"
                )
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        m = momentum(state.count) if callable(momentum) else momentum

        def average(old: Array, new: Array) -> Array:
            mixed: Array = m * old + (1 - m) * new
            return mixed.astype(old.dtype)

        buffers = jax.tree.map(average, state.momentum, updates)
        ahead = jax.tree.map(average, buffers, updates) if nesterov else buffers
        new_state = MuonState(optax.safe_increment(state.count), buffers)
        return _orthogonalise(ahead, newton_schulz_steps, dtype), new_state

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def _orthogonalise(tree: optax.Updates, steps: ArrayLike, dtype: DTypeLike) -> optax.Updates:
    """sqrt(max(1, rows / columns)) times `newton_schulz` of each matrix, in one call per distinct shape."""
    leaves, structure = jax.tree.flatten(tree)
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, leaf in enumerate(leaves):
        short, long = sorted(leaf.shape[-2:])
        members[short, long].append(index)

    results = list(leaves)
    for (short, long), indices in members.items():
        # Cast before stacking: the stack is a copy, and bfloat16 halves it.
        parts = [_lay_down(leaves[i].astype(dtype)).reshape(-1, short, long) for i in indices]
        stack = newton_schulz(jnp.concatenate(parts), steps=steps, dtype=dtype)
        borders = list(accumulate(len(part) for part in parts))[:-1]
        for i, part in zip(indices, jnp.split(stack, borders), strict=True):
            leaf = leaves[i]
            tall = leaf.shape[-2] > leaf.shape[-1]
            # Scaled in the parameter's precision: the record's in-place add promotes the same way.
            o = (part.mT if tall else part).reshape(leaf.shape).astype(leaf.dtype)
            results[i] = math.sqrt(long / short) * o if tall else o
    return jax.tree.unflatten(structure, results)


def _lay_down(matrices: Array) -> Array:
    """Transpose tall matrices."""
    wide: Array = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    return wide


def adam(
    learning_rate: optax.ScalarOrSchedule, b1: float = 0.8, b2: float = 0.95, eps: float = 1e-10
) -> optax.GradientTransformation:
    """Bias-corrected Adam that stores its moments in the parameter's dtype but computes in float32.

    On bfloat16 parameters `optax.adam` would do all its arithmetic in bfloat16. A
    fused Adam, which the record uses, rounds only what it writes back: the moments
    here, and the parameter in `optax.apply_updates`. So updates come out in float32.
    """
    inner = optax.scale_by_adam(b1, b2, eps)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        wide = state._replace(mu=_widen(state.mu), nu=_widen(state.nu))
        scaled, new = inner.update(_widen(updates), wide, params)
        stored = new._replace(
            mu=optax.tree.cast_like(new.mu, state.mu),
            nu=optax.tree.cast_like(new.nu, state.nu),
        )
        return scaled, stored

    return optax.chain(optax.GradientTransformation(inner.init, update), optax.scale_by_learning_rate(learning_rate))


def _widen[Tree](tree: Tree) -> Tree:
    """In float32, or wider if it was."""
    widened: Tree = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)
    return widened


def learning_rate_factor(
    step: ArrayLike, steps: ArrayLike, cooldown_fraction: float = 0.4, final: float = 0.1
) -> Array:
    """What multiplies every learning rate: 1, then linearly down to `final` over the last `cooldown_fraction`."""
    remaining = 1 - jnp.asarray(step) / steps
    weight = jnp.clip(remaining / cooldown_fraction, 0, 1)
    return weight + (1 - weight) * final


def momentum_schedule(step: ArrayLike, warmup_steps: int) -> Array:
    """Muon's momentum: linearly from 0.85 to 0.95 over `warmup_steps`, then constant."""
    fraction = jnp.minimum(jnp.asarray(step) / warmup_steps, 1)
    return 0.85 * (1 - fraction) + 0.95 * fraction


def window_blocks(step: ArrayLike, steps: ArrayLike, final_window_tokens: int) -> Array:
    """The long attention window at `step`, in blocks of 128 tokens: an int32 scalar, at least 1.

    The window is the next multiple of 128 at or above `final_window_tokens * step / steps`.
    Integer arithmetic, so exact, as long as `final_window_tokens * step` stays below 2^31.
    """
    step, steps = jnp.asarray(step, jnp.int32), jnp.asarray(steps, jnp.int32)
    blocks = -(-(final_window_tokens * step) // (BLOCK_SIZE * steps))
    return jnp.maximum(blocks, 1)


def parameter_labels(params: optax.Params) -> optax.Params:
    """The parameters' tree with each leaf replaced by its group.

    "embeddings" (under `embed` and `value_embeds`), "head" (under `head`), and else
    "hidden" for matrices and stacks of them, "scalars" for what has fewer than 2 axes.
    """

    def label(path: tuple[object, ...], leaf: Array) -> str:
        top = jax.tree_util.keystr(path[:1], simple=True)
        if top in ("embed", "value_embeds"):
            return "embeddings"
        if top == "head":
            return "head"
        return "hidden" if leaf.ndim >= 2 else "scalars"

    return jax.tree.map_with_path(label, params)


def recipe_optimizer(rates: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Every parameter group with the record's optimiser and schedule, for a run of `steps` steps.

    The schedules count updates: update 0 is made with the values of step 0. The
    groups are those of `parameter_labels`.
    """

    def cooled(peak: float) -> optax.Schedule:
        return lambda step: peak * learning_rate_factor(step, steps)

    def momentum(step: ArrayLike) -> Array:
        return momentum_schedule(step, rates.momentum_warmup_steps)

    dtype = jnp.dtype(rates.newton_schulz_dtype)
    return optax.partition(
        {
            "hidden": muon(cooled(rates.muon_learning_rate), momentum, dtype=dtype),
            "head": adam(cooled(rates.head_learning_rate)),
            "embeddings": adam(cooled(rates.embedding_learning_rate)),
            "scalars": adam(cooled(rates.scalar_learning_rate)),
        },
        parameter_labels,
    )
