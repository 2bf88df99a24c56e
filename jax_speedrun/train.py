"""The training run: one pure step, jitted and sharded, and the loop around it."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from . import checkpoint
from .checkpoint import Checkpoints
from .config import Config, peak_flops, to_dict
from .data import TokenBatches, find_shards, prefetch, validation_sequences
from .kernels.block_mask import BLOCK_SIZE
from .kernels.head_loss import HeadPrecision
from .model import GPT, model_graph
from .optimizer import learning_rate_factor, recipe_optimizer, window_blocks
from .runlog import RunLog, StepClock
from .sharding import DATA_AXIS, replicate, split_sequences

Params = dict[str, Any]


class DivergedError(RuntimeError):
    """The loss is not a finite number any more."""


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
        window = _window(config, state.step)
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
        window = _window(config, state.step)
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


def _window(config: Config, step: Array) -> Array:
    return window_blocks(step, config.steps, config.optimizer.window_tokens)


def train(config: Config, mesh: Mesh, data: Path, out: Path, *, resume: bool = False) -> float:
    """Train, and write the run's folder `out`.

    Args:
      config: the run, resolved for the devices of `mesh`.
      mesh: from `sharding.make_mesh`.
      data: a folder with training and validation shards.
      out: the run's folder; with `resume`, one that holds a checkpoint.

    Returns:
      The last validation loss.

    Raises:
      UsageError: for data, folders or checkpoints that will not do, before anything is written.
      DivergedError: if a loss is not finite; the last checkpoint stays.
    """
    batches = TokenBatches(find_shards(data, "train"), config.sequences, config.sequence_length, epochs=config.epochs)
    batches.require_steps(config.steps)
    validation = validation_sequences(find_shards(data, "val"), config.sequence_length, config.validation_tokens)
    start, metadata = checkpoint.latest(out) if resume else (0, {})
    if resume:
        batches.seek(metadata["data_position"])

    program = make_program(config, mesh)
    log = RunLog(
        out,
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
        config=to_dict(config),
        resume_step=start if resume else None,
    )
    with log, Checkpoints(out) as checkpoints:
        state = program.init()
        if resume:
            state = checkpoints.restore(start, checkpoint.abstract(state))
        clock = StepClock(**metadata.get("clock", {}))
        loop = _Loop(config, mesh, program, log, checkpoints, clock, validation)
        return loop.run(state, batches, start)


class _Loop:
    """The host's side of a run: dispatches steps, and reads each one's metrics while the next is running."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        program: Program,
        log: RunLog,
        checkpoints: Checkpoints,
        clock: StepClock,
        validation: tuple[np.ndarray, np.ndarray],
    ):
        self.config, self.program, self.log, self.checkpoints, self.clock = config, program, log, checkpoints, clock
        self.split = split_sequences(mesh)
        self.devices = mesh.size
        self.device = mesh.devices.flat[0]
        peak = peak_flops(self.device)
        self.peak_flops = None if peak is None else peak * mesh.size
        self.validation = self._place_validation(*validation)
        self.pending: tuple[int, Metrics] | None = None

    def run(self, state: TrainState, batches: TokenBatches, start: int) -> float:
        config = self.config
        sequences = jax.ShapeDtypeStruct((config.sequences, config.sequence_length), jnp.int32, sharding=self.split)
        began = time.perf_counter()
        train_step = self.program.train_step.lower(state, sequences, sequences).compile()
        evaluate = self.program.evaluate.lower(state, *self.validation).compile()
        print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)

        position = batches.position()
        placed = prefetch(batches, lambda batch: jax.device_put(batch, (self.split, self.split)))
        val_loss = math.nan
        for step in range(start, config.steps + 1):
            last = step == config.steps
            if last or step % config.validation_every == 0:
                self._report()
                self.clock.pause()
                val_loss = float(evaluate(state, *self.validation))
                self.log.validation(
                    step,
                    val_loss=val_loss,
                    train_time_ms=self.clock.elapsed_ms,
                    step_avg_ms=self.clock.step_avg_ms,
                )
            if step > start and (last or (config.checkpoint_every and step % config.checkpoint_every == 0)):
                self._report()
                self._save(step, state, position)
            if last:
                break
            self.clock.resume()
            position, (tokens_NT, targets_NT) = next(placed)
            state, metrics = train_step(state, tokens_NT, targets_NT)
            self._report()
            self.pending = step, metrics
        placed.close()
        if peak := (self.device.memory_stats() or {}).get("peak_bytes_in_use"):
            print(f"peak memory: {peak / 2**30:.1f} GiB a device", flush=True)
        return val_loss

    def _report(self) -> None:
        """Wait for the step dispatched before the newest one, and log it."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        loss = float(metrics.loss)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of step {step + 1}/{self.config.steps} is {loss}; stopped. "
                f"The last checkpoint under {self.checkpoints.directory} is kept: lower the learning rates, or --resume"
            )
        ms = self.clock.tick()
        flops = 6 * self.config.model.matmul_parameters * self.config.tokens_per_step
        self.log.train_step(
            step + 1,
            loss=loss,
            lr=float(metrics.learning_rate),
            window=BLOCK_SIZE * int(metrics.window_blocks),
            ms=ms,
            train_time_ms=self.clock.elapsed_ms,
            step_avg_ms=self.clock.step_avg_ms,
            mfu=None if self.peak_flops is None else 1000 * flops / ms / self.peak_flops,
        )

    def _save(self, step: int, state: TrainState, position: dict[str, int]) -> None:
        # A finite loss says nothing of the update made after it.
        if not bool(_all_finite(state.params)):
            raise DivergedError(
                f"a parameter is not finite after step {step}/{self.config.steps}; stopped. "
                f"The last checkpoint under {self.checkpoints.directory} is kept"
            )
        self.checkpoints.save(
            step,
            state,
            {"config": to_dict(self.config), "data_position": position, "clock": self.clock.state()},
        )

    def _place_validation(self, tokens_NT: np.ndarray, targets_NT: np.ndarray) -> tuple[Array, Array, Array]:
        """Fill up to a multiple of the devices with copies of the first sequence that weigh nothing."""
        count = tokens_NT.shape[0]
        rows = np.arange(count + -count % self.devices)
        weights_N = (rows < count).astype(np.float32)
        rows = np.where(rows < count, rows, 0)
        return jax.device_put((tokens_NT[rows], targets_NT[rows], weights_N), self.split)


@jax.jit
def _all_finite(params: Params) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
