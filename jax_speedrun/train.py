"""The training run: the host's loop around the step, with its data, log, clock and checkpoints."""

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from . import checkpoint
from .checkpoint import Checkpoints
from .config import Config, peak_flops, to_dict
from .data import TokenBatches, find_shards, prefetch, validation_sequences
from .kernels.block_mask import BLOCK_SIZE
from .runlog import RunLog, StepClock
from .sharding import split_sequences
from .step import Metrics, Params, Program, TrainState, make_program


class DivergedError(RuntimeError):
    """The loss is not a finite number any more."""


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
