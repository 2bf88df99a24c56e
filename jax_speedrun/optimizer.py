"""Muon for the hidden matrices, Adam for the rest: the optimisers of a run.

Everything is an optax transform, so the pieces
compose with `optax.partition`, `optax.chain`, `optax.inject_hyperparams` and
schedules. Matrices are stored (output features, input features): rows are outputs.

With `Shards` a transform's update runs on each device inside a `jax.shard_map`: it
takes the device's own gradient, reduces it and gathers the updates by itself. Each
device keeps and updates its share of the state only; `state_specs` says which.

Source: the "Sub-3 minute" NanoGPT speedrun record of 16 January 2025.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from . import schedules
from .banks import pack, unpack
from .config import OptimizerConfig
from .muon import MuonState, muon, newton_schulz, widen
from .schedules import learning_rate_factor
from .sharding import Shards

__all__ = [
    "adam",
    "muon",
    "newton_schulz",
    "parameter_labels",
    "recipe_optimizer",
    "shared_state",
    "state_specs",
    "whole_state",
]


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.8,
    b2: float = 0.95,
    eps: float = 1e-10,
    *,
    update_dtype: DTypeLike | None = None,
    shards: Shards | None = None,
) -> optax.GradientTransformation:
    """Bias-corrected Adam that stores its moments in the parameter's dtype but computes in float32.

    On bfloat16 parameters `optax.adam` would do all its arithmetic in bfloat16. A
    fused Adam, which the record uses, rounds only what it writes back: the moments
    here, and the parameter in `optax.apply_updates`. So updates come out in float32.

    Args:
      update_dtype: in which the direction, before the learning rate multiplies it, travels between devices. It is
        rounded to it on a single device too, so that results do not depend on the number of devices.
      shards: each device updates its share of every leaf's rows: see the module.
    """
    inner = optax.scale_by_adam(b1, b2, eps)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        state: optax.ScaleByAdamState = inner.init(params if shards is None else jax.tree.map(shards.pad, params))
        return state

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        gradient = updates
        if shards is not None:
            gradient = jax.tree.map(lambda rows: shards.reduce_mean(shards.pad(rows)), updates)
        wide = state._replace(mu=widen(state.mu), nu=widen(state.nu))
        direction, new = inner.update(widen(gradient), wide)
        stored = new._replace(
            mu=optax.tree.cast_like(new.mu, state.mu),
            nu=optax.tree.cast_like(new.nu, state.nu),
        )
        if update_dtype is not None:
            direction = jax.tree.map(lambda u: u.astype(update_dtype), direction)
        if shards is not None:
            direction = jax.tree.map(lambda u, like: shards.gather(u)[: len(like)], direction, updates)
        return widen(direction), stored

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


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


def recipe_optimizer(rates: OptimizerConfig, steps: int, shards: Shards | None = None) -> optax.GradientTransformation:
    """Every parameter group with the record's optimiser and schedule, for a run of `steps` steps.

    The schedules count updates: update 0 is made with the values of step 0. The
    groups are those of `parameter_labels`. With `shards`, update takes each device's
    own gradient, but for the scalars, whose mean over the devices it must get: that
    is one small message which may carry the loss as well.
    """

    def cooled(peak: float) -> optax.Schedule:
        return lambda step: peak * learning_rate_factor(step, steps)

    def momentum(step: ArrayLike) -> Array:
        return schedules.momentum(step, rates.momentum_warmup_steps)

    dtype, update_dtype = jnp.dtype(rates.newton_schulz_dtype), jnp.dtype(rates.update_dtype)
    return optax.partition(
        {
            "hidden": muon(cooled(rates.muon_learning_rate), momentum, dtype=dtype, shards=shards),
            "head": adam(cooled(rates.head_learning_rate), update_dtype=update_dtype, shards=shards),
            "embeddings": adam(cooled(rates.embedding_learning_rate), update_dtype=update_dtype, shards=shards),
            "scalars": adam(cooled(rates.scalar_learning_rate)),
        },
        parameter_labels,
    )


def state_specs(state: optax.OptState, shards: Shards | None) -> optax.OptState:
    """For each array of `recipe_optimizer`'s state (or its shape) the PartitionSpec.

    Buckets and rows lie split over the devices; counts and the scalars' moments, which have fewer than 2 axes,
    are everywhere.
    """
    split = PartitionSpec() if shards is None else PartitionSpec(shards.axis)
    return jax.tree.map(lambda leaf: split if leaf.ndim >= 2 else PartitionSpec(), state)


def whole_state(state: optax.OptState, like: optax.OptState, shards: Shards) -> optax.OptState:
    """The state which the same transform has without shards; `like`: the shapes of that one."""

    def whole(like: Any, state: Any) -> Any:
        if isinstance(state, MuonState):
            return state._replace(momentum=unpack(state.momentum, like.momentum, shards.devices))
        return state[: like.shape[0]] if like.ndim else state

    return jax.tree.map(whole, like, state, is_leaf=_is_muon)


def shared_state(state: optax.OptState, shards: Shards) -> optax.OptState:
    """The inverse of `whole_state`."""

    def shared(state: Any) -> Any:
        if isinstance(state, MuonState):
            return state._replace(momentum=pack(state.momentum, shards.devices))
        return shards.pad(state) if state.ndim >= 2 else state

    return jax.tree.map(shared, state, is_leaf=_is_muon)


def _is_muon(node: object) -> bool:
    return isinstance(node, MuonState)
