"""One pure training step, its evaluation and its initial state, jitted and sharded over the mesh.

A step is one `jax.shard_map` from tokens to new parameters, so every collective in it
is one that the code below or the optimiser asks for: docs/scaling.md shows them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .config import Config
from .kernels.head import HeadPrecision
from .model import GPT, model_graph
from .optimizer import recipe_optimizer, shared_state, state_specs, whole_state
from .schedules import learning_rate_factor, window_blocks
from .sharding import DATA_AXIS, Shards, compiler_options, replicate, shards_of, split_sequences

Params = dict[str, Any]


class TrainState(NamedTuple):
    """What a step maps to its successor. `step` counts the updates made, int32.

    Parameters are on every device, the optimiser's state is split (`optimizer.state_specs`).
    """

    params: Params
    optimizer_state: optax.OptState
    step: Array


class Metrics(NamedTuple):
    """Scalars of one step: the mean loss in nats before its update, Muon's rate, the long window in blocks."""

    loss: Array
    learning_rate: Array
    window_blocks: Array


class Program(NamedTuple):
    """The functions of a run; `N` sequences are split over the mesh.

    init: seed -> TrainState; the seed below 2^32.
    train_step: (TrainState, tokens_NT, targets_NT) -> (TrainState, Metrics); the old state is donated.
    evaluate: (TrainState, tokens_NT, targets_NT, weights_N) -> weighted mean loss.
    to_checkpoint: TrainState -> the same on every device, its structure and shapes independent of how many there are.
    from_checkpoint: its inverse, for the devices of this mesh.
    state, saved: the shapes, dtypes and shardings of a state, and of what `to_checkpoint` makes of it.
    """

    init: jax.stages.Wrapped
    train_step: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped
    to_checkpoint: Callable[[TrainState], TrainState]
    from_checkpoint: Callable[[TrainState], TrainState]
    state: TrainState
    saved: TrainState


def loss_function(config: Config) -> Callable[[Params, Array, Array, Array, HeadPrecision], Array]:
    """Return (parameters, tokens_T, targets_T, window in blocks, precision) -> mean loss of one sequence in nats."""
    graph = model_graph(config.model)

    def sequence_loss(
        params: Params, tokens_T: Array, targets_T: Array, window: Array, precision: HeadPrecision
    ) -> Array:
        model: GPT = nnx.merge(graph, params)
        return model.loss(
            tokens_T,
            targets_T,
            window,
            attention=config.attention,
            kernels=config.kernels,
            head_precision=precision,
        )

    return sequence_loss


def make_program(config: Config, mesh: Mesh) -> Program:
    """Build the functions of a run. Nothing is compiled yet."""
    sequence_loss = loss_function(config)
    shards = shards_of(mesh)
    optimizer = recipe_optimizer(config.optimizer, config.steps, shards)
    everywhere, over_data = PartitionSpec(), PartitionSpec(DATA_AXIS)
    replicated, split = replicate(mesh), split_sequences(mesh)

    def init(seed: Array) -> TrainState:
        params = nnx.to_pure_dict(nnx.state(GPT(config.model, nnx.Rngs(jax.random.key(seed)))))
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.uint32))
    specs = jax.tree.map(lambda _: everywhere, shapes)
    specs = specs._replace(optimizer_state=state_specs(shapes.optimizer_state, shards))
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def local_loss_and_gradient(
        params: Params, tokens_NT: Array, targets_NT: Array, window: Array
    ) -> tuple[Array, Params]:
        """The mean over this device's own sequences, one after the other."""

        def one(tokens_T: Array, targets_T: Array) -> tuple[Array, Params]:
            return jax.value_and_grad(sequence_loss)(params, tokens_T, targets_T, window, config.model.head_precision)

        def add(total: tuple[Array, Params], pair: tuple[Array, Array]) -> tuple[tuple[Array, Params], None]:
            return jax.tree.map(jnp.add, total, one(*pair)), None

        sequences = tokens_NT.shape[0]
        if sequences == 1:
            return one(tokens_NT[0], targets_NT[0])
        # Sums over sequences are taken in float32, whatever the parameter is stored in.
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        (loss, gradient), _ = jax.lax.scan(add, (jnp.float32(0), zeros), (tokens_NT, targets_NT))
        return loss / sequences, jax.tree.map(lambda g, p: (g / sequences).astype(p.dtype), gradient, params)

    def device_step(state: TrainState, tokens_NT: Array, targets_NT: Array) -> tuple[TrainState, Metrics]:
        window = current_window(config, state.step)
        loss, gradient = local_loss_and_gradient(state.params, tokens_NT, targets_NT, window)
        if shards is not None:
            loss, gradient = _mean_of_scalars((loss, gradient))
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = config.optimizer.muon_learning_rate * learning_rate_factor(state.step, config.steps)
        return TrainState(params, optimizer_state, state.step + 1), Metrics(loss, rate, window)

    def device_loss(params: Params, tokens_NT: Array, targets_NT: Array, weights_N: Array, window: Array) -> Array:
        def one(sequence: tuple[Array, Array]) -> Array:
            return sequence_loss(params, *sequence, window, config.model.evaluation_precision)

        losses_N = jax.lax.map(one, (tokens_NT, targets_NT))
        return jax.lax.psum(jnp.sum(losses_N * weights_N), DATA_AXIS)

    def evaluate(state: TrainState, tokens_NT: Array, targets_NT: Array, weights_N: Array) -> Array:
        window = current_window(config, state.step)
        in_specs = (everywhere, over_data, over_data, over_data, everywhere)
        total = jax.shard_map(device_loss, mesh=mesh, in_specs=in_specs, out_specs=everywhere, check_vma=False)
        return total(state.params, tokens_NT, targets_NT, weights_N, window) / jnp.sum(weights_N)

    train_step = jax.shard_map(
        device_step,
        mesh=mesh,
        in_specs=(specs, over_data, over_data),
        out_specs=(specs, everywhere),
        # What is the same everywhere is so by the collectives: types that vary over the mesh would add nothing.
        check_vma=False,
    )
    return Program(
        jax.jit(init, out_shardings=placed),
        jax.jit(
            train_step,
            in_shardings=(placed, split, split),
            out_shardings=(placed, replicated),
            donate_argnums=0,
            compiler_options=compiler_options(mesh),
        ),
        jax.jit(evaluate, in_shardings=(placed, split, split, split), out_shardings=replicated),
        *_checkpoint_forms(
            config, jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, placed), shards, replicated
        ),
    )


def _checkpoint_forms(
    config: Config, state: TrainState, shards: Shards | None, replicated: NamedSharding
) -> tuple[Callable[[TrainState], TrainState], Callable[[TrainState], TrainState], TrainState, TrainState]:
    """The last four of `Program`: a checkpoint is the state as a single device has it."""
    if shards is None:
        return lambda state: state, lambda state: state, state, state
    alone = jax.eval_shape(recipe_optimizer(config.optimizer, config.steps).init, state.params)
    whole = jax.jit(lambda state: whole_state(state, alone, shards), out_shardings=replicated)
    places = jax.tree.map(lambda leaf: leaf.sharding, state.optimizer_state)
    shared = jax.jit(lambda state: shared_state(state, shards), out_shardings=places)
    return (
        lambda state: state._replace(optimizer_state=whole(state.optimizer_state)),
        lambda state: state._replace(optimizer_state=shared(state.optimizer_state)),
        state,
        state._replace(optimizer_state=jax.tree.map(lambda leaf: leaf.update(sharding=replicated), alone)),
    )


def _mean_of_scalars[Tree](tree: Tree) -> Tree:
    """`tree` with its leaves of fewer than 2 axes averaged over the devices, in one message."""
    leaves, structure = jax.tree.flatten(tree)
    small, large = [[leaf for leaf in leaves if (leaf.ndim < 2) == want] for want in (True, False)]
    vector, unravel = ravel_pytree(small)
    means, rest = iter(unravel(jax.lax.pmean(vector, DATA_AXIS))), iter(large)
    result: Tree = jax.tree.unflatten(structure, [next(means if leaf.ndim < 2 else rest) for leaf in leaves])
    return result


def current_window(config: Config, step: Array) -> Array:
    return window_blocks(step, config.steps, config.optimizer.window_tokens)
