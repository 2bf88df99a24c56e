"""Checkpoints of a run with Orbax: written in the background, complete or not there at all.

A checkpoint holds the training state (parameters, optimiser state, step) and, as
metadata, what the host needs to go on: the configuration, the position in the
data and the clock. Orbax writes to a temporary name and renames at the end, so
one cut short is never listed.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from .errors import UsageError

KEPT = 2
"""Checkpoints kept: the last one, and the one before should the last turn out to be bad."""

Metadata = dict[str, Any]


class Checkpoints:
    """The checkpoints under a run's folder. Use as a context manager: leaving it waits for the last write."""

    def __init__(self, run_directory: Path):
        self.directory = run_directory / "checkpoints"
        self._checkpointer = ocp.training.Checkpointer(
            self.directory.resolve(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(KEPT),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def save(self, step: int, state: object, metadata: Metadata) -> None:
        """Start writing `state` (any pytree of arrays) and return once the arrays may be donated again."""
        self._checkpointer.save_async(step, state, custom_metadata=metadata, force=True)

    def wait(self) -> None:
        """Until everything saved so far is on disk."""
        self._checkpointer.wait()

    def restore[State](self, step: int, abstract_state: State) -> State:
        """The state saved at `step`, with the shapes, dtypes and shardings of `abstract_state`."""
        return self._checkpointer.load(step, abstract_state)


def latest(run_directory: Path) -> tuple[int, Metadata]:
    """Step and metadata of the newest complete checkpoint of a run.

    Raises:
      UsageError: if the folder holds none.
    """
    directory = run_directory / "checkpoints"
    if directory.is_dir():
        with ocp.training.Checkpointer(directory.resolve()) as checkpointer:
            if checkpointer.latest is not None:
                step = checkpointer.latest.step
                return step, dict(checkpointer.metadata(step).custom_metadata or {})
    raise UsageError(f"--resume {run_directory}: no complete checkpoint under {directory}; start the run anew")


def abstract[State](state: State) -> State:
    """Shapes, dtypes and shardings of `state`, as `Checkpoints.restore` wants them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
