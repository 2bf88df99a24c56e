"""A training run: what it needs, in the order in which it is had; loop.py takes it from there."""

import contextlib
from pathlib import Path

import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..config import Config, to_dict
from ..data.batches import Rows, TokenBatches, find_shards, validation_count, validation_sequences
from ..errors import UsageError
from ..sharding import split_sequences
from ..step import make_program
from . import checkpoint, distributed
from .checkpoint import Checkpoints
from .lock import locked
from .log import RunLog, StepClock
from .loop import TRACED_STEPS, Loop, compile_functions
from .program_cache import ProgramCache


def train(
    config: Config,
    mesh: Mesh,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    resume_step: int | None = None,
    profile: bool = False,
    programs: ProgramCache | None = None,
) -> float:
    """Train, and write the run's folder `out`. All processes of a run call this alike; the first one writes.

    Args:
      config: the run, resolved for the devices of `mesh`.
      mesh: from `sharding.make_mesh`, over the devices of all processes.
      data: a folder with training and validation shards.
      out: the run's folder; with `resume`, one that holds a checkpoint.
      resume: go on from a checkpoint, the last one or that of `resume_step`; what the folder has of later steps goes.
      profile: trace some steps of the first process into `out`/profile.
      programs: where compiled ones are kept between runs.

    Returns:
      The last validation loss; nan if a signal stopped the run before the first.

    Raises:
      UsageError: for data, folders or checkpoints that will not do, before anything is written; later on, for shards
        that change and files that cannot be written, with the last checkpoint intact.
      DivergedError: if a loss is not finite; the last checkpoint stays.
    """
    split = split_sequences(mesh)
    with distributed.together():
        batches = TokenBatches(
            find_shards(data, "train"),
            config.sequences,
            config.sequence_length,
            epochs=config.epochs,
            rows=distributed.own_rows(split, config.sequences),
            check=distributed.own_share(),
        )
        batches.require_steps(config.steps)
        total, held_out = _validation(config, data, split)
        start, metadata = checkpoint.latest(out, resume_step) if resume else (None, {})
        if resume:
            batches.seek(metadata["data_position"])
        if profile and config.steps - (start or 0) <= TRACED_STEPS.stop:
            raise UsageError(f"--profile: needs more than {TRACED_STEPS.stop} steps; raise --steps, or leave it out")

    with contextlib.ExitStack() as folder:
        log = None
        with distributed.together():
            if distributed.is_main_process():
                folder.enter_context(locked(out))
                if start is not None:
                    checkpoint.verify(out, start)
                log = folder.enter_context(
                    RunLog(
                        out,
                        steps=config.steps,
                        tokens_per_step=config.tokens_per_step,
                        config=to_dict(config),
                        resume_step=start,
                    )
                )
                if start is not None:
                    checkpoint.discard_after(out, start)
        checkpoints = folder.enter_context(Checkpoints(out))

        program = make_program(config, mesh)
        tokens, targets, weights = (distributed.place(split, total, rows) for rows in held_out)
        validation = tokens, targets, weights
        functions = compile_functions(program, config, mesh, validation, programs)
        if start is None:
            state = functions.init(np.uint32(config.seed))
        else:
            state = program.from_checkpoint(checkpoints.restore(start, program.saved))
        clock = StepClock(**metadata.get("clock", {}))
        trace = out / "profile" if profile and distributed.is_main_process() else None
        loop = Loop(config, mesh, program, functions, log, checkpoints, clock, trace)
        return loop.run(state, batches, validation, start)


def _validation(config: Config, data: Path, split: NamedSharding) -> tuple[int, tuple[Rows, Rows, np.ndarray]]:
    """Return the validation set, filled up to a multiple of the devices with copies of its first sequence of no weight.

    Returns:
      The number of sequences, and this process's rows of tokens_NT, targets_NT and weights_N.
    """
    shards, length, limit = find_shards(data, "val"), config.sequence_length, config.validation_tokens
    count = validation_count(shards, length, limit)
    total = count + -count % split.mesh.size
    own = distributed.own_rows(split, total)
    weights_N = np.array([row < count for row in own], np.float32)
    tokens_NT, targets_NT = validation_sequences(shards, length, limit, [row if row < count else 0 for row in own])
    return total, (tokens_NT, targets_NT, weights_N)
