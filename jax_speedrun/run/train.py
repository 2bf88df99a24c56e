"""A training run: what it needs, in the order in which it is had; loop.py takes it from there."""

import contextlib
import json
from pathlib import Path

import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..config import Config, to_dict
from ..data.batches import Rows, TokenBatches, find_shards, validation_count, validation_sequences
from ..data.fingerprint import difference, fingerprint, require_same
from ..errors import UsageError
from ..sharding import split_sequences
from ..step import make_program
from . import checkpoint, distributed
from .checkpoint import Checkpoints
from .lock import locked
from .log import RunLog, StepClock
from .loop import TRACED_STEPS, Loop, Outcome, compile_functions
from .program_cache import ProgramCache


def train(
    config: Config,
    mesh: Mesh,
    data: Path,
    out: Path,
    *,
    resume_step: int | None = None,
    replace: bool = False,
    profile: bool = False,
    programs: ProgramCache | None = None,
) -> Outcome:
    """Train, and write the run's folder `out`. All processes of a run call this alike; the first one writes.

    Args:
      config: the run, resolved for the devices of `mesh`.
      mesh: from `sharding.make_mesh`, over the devices of all processes.
      data: a folder with training and validation shards.
      out: the run's folder; with `resume_step`, one that holds its checkpoint.
      resume_step: go on from the checkpoint of this step; what the folder has of later steps goes.
      replace: begin even where `out` holds a run that has no checkpoint and is not finished.
      profile: trace some steps of the first process into `out`/profile.
      programs: where compiled ones are kept between runs.

    Raises:
      UsageError: for data, folders or checkpoints that will not do, before anything is written; later on, for shards
        that change and files that cannot be written, with the last checkpoint intact.
      DivergedError: if a loss is not finite; the last checkpoint stays.
    """
    split = split_sequences(mesh)
    with distributed.together():
        checkpoint.require_usable(out)
        metadata = {} if resume_step is None else checkpoint.latest(out, resume_step).metadata
        own = fingerprint(data)
        if resume_step is not None and (found := difference(metadata["data"], own)) is not None:
            raise UsageError(
                f"--data {data}: not the data that the run was trained on, in {metadata['data']['folder']}: {found}; "
                "give the same shards"
            )
    fingerprints = [json.loads(text) for text in distributed.exchange(json.dumps(own))]
    with distributed.together():
        require_same(fingerprints)
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
        if resume_step is not None:
            batches.seek(metadata["data_position"])
        if profile and config.steps - (resume_step or 0) <= TRACED_STEPS.stop:
            raise UsageError(f"--profile: needs more than {TRACED_STEPS.stop} steps; raise --steps, or leave it out")

    with contextlib.ExitStack() as folder:
        log = None
        with distributed.together():
            if distributed.is_main_process():
                folder.enter_context(locked(out))
                if resume_step is not None:
                    checkpoint.verify(out, resume_step)
                log = folder.enter_context(
                    RunLog(
                        out,
                        steps=config.steps,
                        tokens_per_step=config.tokens_per_step,
                        config=to_dict(config),
                        data=fingerprints[0],
                        resume_step=resume_step,
                        replace=replace,
                    )
                )
                checkpoint.discard_after(out, -1 if resume_step is None else resume_step)
        checkpoints = folder.enter_context(Checkpoints(out))

        program = make_program(config, mesh)
        tokens, targets, weights = (distributed.place(split, total, rows) for rows in held_out)
        validation = tokens, targets, weights
        functions = compile_functions(program, config, mesh, validation, programs)
        if resume_step is None:
            state = functions.init(np.uint32(config.seed))
        else:
            state = program.from_checkpoint(checkpoint.restore(out, resume_step, program.saved))
        clock = StepClock(**metadata.get("clock", {}))
        trace = out / "profile" if profile and distributed.is_main_process() else None
        loop = Loop(config, mesh, program, functions, log, checkpoints, clock, fingerprints[0], trace)
        outcome = loop.run(state, batches, validation, resume_step)
    distributed.exchange("")  # none ends, which may end the others, while the first still has something to write
    return outcome


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
