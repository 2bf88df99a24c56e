"""One pure training step, its evaluation and its initial state, jitted and sharded over the mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from .config import Config
from .kernels.head_loss import HeadPrecision
from .model import GPT, model_graph
from .optimizer import learning_rate_factor, recipe_optimizer, window_blocks
from .sharding import DATA_AXIS, replicate, split_sequences

Params = dict[str, Any]


class TrainState(NamedTuple):
    """What a step maps to its successor. `step` counts the updates made, int32."""

    params: Params
    optimizer_state: optax.OptState
    step: Array


class Metrics(NamedTuple):
    """Scalars of one step: the mean loss in nats before its update, Muon's rate, the long window in blocks."""

    loss: Array
    learning_rate: Array
    window_blocks: Array


class Program(NamedTuple):
    """The jitted functions of a run; `N` sequences are split over the mesh.

    init: () -> TrainState
    train_step: (TrainState, tokens_NT, targets_NT) -> (TrainState, Metrics); the old state is donated.
    evaluate: (TrainState, tokens_NT, targets_NT, weights_N) -> weighted mean loss.
    """

    init: jax.stages.Wrapped
    train_step: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped


def make_program(config: Config, mesh: Mesh) -> Program:
    """Build the functions of a run. Nothing is compiled yet."""
    graph = model_graph(config.model)
    optimizer = recipe_optimizer(config.optimizer, config.steps)
    replicated, split = replicate(mesh), split_sequences(mesh)

    def sequence_loss(
        params: Params, tokens_T: Array, targets_T: Array, window: Array, precision: HeadPrecision
    ) -> Array:
        model: GPT = nnx.merge(graph, params)
        return model.loss(tokens_T, targets_T, window, implementation=config.attention, head_precision=precision)

    def init() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(GPT(config.model, nnx.Rngs(config.seed))))
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    def mean_loss_and_gradient(
        params: Params, tokens_NT: Array, targets_NT: Array, window: Array
    ) -> tuple[Array, Params]:
        """On each device: its own sequences one after the other, then the mean over all devices."""

        def one(tokens_T: Array, targets_T: Array) -> tuple[Array, Params]:
            loss, gradient = jax.value_and_grad(sequence_loss)(
                params, tokens_T, targets_T, window, config.model.head_precision
            )
            # Sums over sequences are taken in float32, whatever the parameter is stored in.
            return loss, jax.tree.map(lambda g: g.astype(jnp.float32), gradient)

        def add(total: tuple[Array, Params], pair: tuple[Array, Array]) -> tuple[tuple[Array, Params], None]:
            return jax.tree.map(jnp.add, total, one(*pair)), None

        sequences = tokens_NT.shape[0]
        if sequences == 1:
            total = one(tokens_NT[0], targets_NT[0])
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            total, _ = jax.lax.scan(add, (jnp.float32(0), zeros), (tokens_NT, targets_NT))
        return jax.lax.pmean(jax.tree.map(lambda x: x / sequences, total), DATA_AXIS)

    def total_loss(params: Params, tokens_NT: Array, targets_NT: Array, weights_N: Array, window: Array) -> Array:
        def one(sequence: tuple[Array, Array]) -> Array:
            return sequence_loss(params, *sequence, window, config.model.evaluation_precision)

        losses_N = jax.lax.map(one, (tokens_NT, targets_NT))
        return jax.lax.psum(jnp.sum(losses_N * weights_N), DATA_AXIS)

    everywhere, over_data = PartitionSpec(), PartitionSpec(DATA_AXIS)

    def sharded[**P, R](function: Callable[P, R], in_specs: tuple[PartitionSpec, ...]) -> Callable[P, R]:
        # The mean over devices is taken by hand above, so varying-axis types would add nothing.
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=everywhere, check_vma=False)

    def train_step(state: TrainState, tokens_NT: Array, targets_NT: Array) -> tuple[TrainState, Metrics]:
        window = current_window(config, state.step)
        loss, gradient = sharded(mean_loss_and_gradient, (everywhere, over_data, over_data, everywhere))(
            state.params, tokens_NT, targets_NT, window
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = config.optimizer.muon_learning_rate * learning_rate_factor(state.step, config.steps)
        metrics = Metrics(loss, rate, window)
        return TrainState(params, optimizer_state, state.step + 1), metrics

    def evaluate(state: TrainState, tokens_NT: Array, targets_NT: Array, weights_N: Array) -> Array:
        specs = (everywhere, over_data, over_data, over_data, everywhere)
        window = current_window(config, state.step)
        return sharded(total_loss, specs)(state.params, tokens_NT, targets_NT, weights_N, window) / jnp.sum(weights_N)

    return Program(
        jax.jit(init, out_shardings=replicated),
        jax.jit(
            train_step,
            in_shardings=(replicated, split, split),
            out_shardings=(replicated, replicated),
            donate_argnums=0,
        ),
        jax.jit(evaluate, in_shardings=(replicated, split, split, split), out_shardings=replicated),
    )


def current_window(config: Config, step: Array) -> Array:
    return window_blocks(step, config.steps, config.optimizer.window_tokens)
