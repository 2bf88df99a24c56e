"""The host's loop around the step: dispatches steps, and reads each one's metrics while the next is running."""

import math
import signal
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.stages import Compiled

from ..config import Config, cache_key, peak_flops, to_dict
from ..data.batches import Batch, TokenBatches, prefetch
from ..data.fingerprint import Fingerprint
from ..kernels.block_mask import BLOCK_SIZE
from ..sharding import replicate, split_sequences
from ..step import Metrics, Params, Program, TrainState
from .checkpoint import Checkpoints
from .compilation import Call, compile_together
from .distributed import SharedError, place, say
from .log import RunLog, StepClock
from .preemption import Preemption
from .program_cache import ProgramCache

TRACED_STEPS = range(10, 15)
"""Which of the steps that a process makes `--profile` traces: past compilation and the first, slow ones."""

type Validation = tuple[Array, Array, Array]
"""tokens_NT, targets_NT, weights_N, split over the mesh."""


class DivergedError(SharedError, RuntimeError):
    """The loss is not a finite number any more."""


class Outcome(NamedTuple):
    """How a run ended: its last validation loss, nan without one, and the signal that ended it before its last step."""

    val_loss: float
    preempted_by: signal.Signals | None


class Functions(NamedTuple):
    """A `Program`'s, compiled."""

    init: Compiled
    train_step: Compiled
    evaluate: Compiled


def compile_functions(
    program: Program, config: Config, mesh: Mesh, validation: Validation, programs: ProgramCache | None
) -> Functions:
    """Compile side by side, on all cores; or take what `programs` has."""
    split = split_sequences(mesh)
    sequences = jax.ShapeDtypeStruct((config.sequences, config.sequence_length), jnp.int32, sharding=split)
    began = time.perf_counter()
    train_step, evaluate, init = compile_together(
        # The longest first.
        Call(program.train_step, (program.state, sequences, sequences)),
        Call(program.evaluate, (program.state, *validation)),
        Call(program.init, (jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicate(mesh)),)),
        cache=programs,
        cache_key=cache_key(config),
    )
    say(f"compiled in {time.perf_counter() - began:.1f} s")
    return Functions(init, train_step, evaluate)


class Loop:
    """Runs a `Program`: with the log (None in processes that write none), the checkpoints and the clock.

    Checkpoints say that it was trained on `data`. With `trace`, a folder, some steps are traced into it, for xprof or
    Perfetto.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        program: Program,
        functions: Functions,
        log: RunLog | None,
        checkpoints: Checkpoints,
        clock: StepClock,
        data: Fingerprint,
        trace: Path | None = None,
    ):
        self.config, self.program, self.log, self.checkpoints, self.clock = config, program, log, checkpoints, clock
        self.functions = functions
        self.split = split_sequences(mesh)
        self.device = mesh.local_devices[0]
        peak = peak_flops(self.device)
        self.peak_flops = None if peak is None else peak * mesh.size
        self.data, self.trace = data, trace
        self.pending: tuple[int, Metrics] | None = None

    def run(self, state: TrainState, batches: TokenBatches, validation: Validation, resumed: int | None) -> Outcome:
        """Train from the first step on, or from step `resumed`, whose checkpoint there is already."""
        config = self.config
        if resumed is not None:
            say(f"goes on from the checkpoint of step {resumed}/{config.steps}")
        start, position, val_loss = resumed or 0, batches.position(), math.nan
        placed = prefetch(batches, self._place)
        with Preemption() as preemption:
            for step in range(start, config.steps + 1):
                last, preempted = step == config.steps, preemption.reached(step)
                if last or (step % config.validation_every == 0 and not preempted):
                    self._report()
                    self.clock.pause()
                    val_loss = float(self.functions.evaluate(state, *validation))
                    self._log_validation(step, val_loss)
                every = config.checkpoint_every
                due = last or preempted or (every > 0 and step % every == 0 and step > start)
                if due and step != resumed:
                    self._report()
                    self._save(step, state, position)
                if last or preempted:
                    break
                self._trace(step - start)
                self.clock.resume()
                position, (tokens_NT, targets_NT) = next(placed)
                state, metrics = self.functions.train_step(state, tokens_NT, targets_NT)
                self._report()
                self.pending = step, metrics
            self.checkpoints.wait()
        placed.close()
        unfinished = preempted and not last
        if unfinished:
            folder, name = self.checkpoints.directory.parent, preemption.signal.name
            say(f"stopped by {name} after step {step}/{config.steps}; go on with --resume {folder}")
        if peak := (self.device.memory_stats() or {}).get("peak_bytes_in_use"):
            say(f"peak memory: {peak / 2**30:.1f} GiB a device")
        return Outcome(val_loss, preemption.signal if unfinished else None)

    def _trace(self, done: int) -> None:
        """Begin or end the trace where the next step, before which this process has made `done`, asks for it."""
        if self.trace is None or done not in (TRACED_STEPS.start, TRACED_STEPS.stop):
            return
        self._report()
        if done == TRACED_STEPS.start:
            jax.profiler.start_trace(self.trace)
        else:
            jax.profiler.stop_trace()
            say(f"trace: {self.trace}")

    def _place(self, batch: Batch) -> tuple[Array, Array]:
        tokens_NT, targets_NT = (place(self.split, self.config.sequences, rows) for rows in batch)
        return tokens_NT, targets_NT

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
        self.checkpoints.check()
        if self.log is None:
            return
        self.log.train_step(
            step + 1,
            loss=loss,
            lr=float(metrics.learning_rate),
            window=BLOCK_SIZE * int(metrics.window_blocks),
            ms=ms,
            train_time_ms=self.clock.elapsed_ms,
            step_avg_ms=self.clock.step_avg_ms,
            mfu=None if self.peak_flops is None else 1000 * self.config.matmul_flops / ms / self.peak_flops,
        )

    def _log_validation(self, step: int, val_loss: float) -> None:
        if self.log is not None:
            self.log.validation(
                step, val_loss=val_loss, train_time_ms=self.clock.elapsed_ms, step_avg_ms=self.clock.step_avg_ms
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
            self.program.to_checkpoint(state),
            {
                "config": to_dict(self.config),
                "data": self.data,
                "data_position": position,
                "clock": self.clock.state(),
            },
        )


@jax.jit
def _all_finite(params: Params) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
