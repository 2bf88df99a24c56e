"""The mesh, and where each array of a run lives on it.

One axis, `data`: sequences are split over it, everything else is replicated.
"""

import contextlib
import os

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .errors import UsageError

DATA_AXIS = "data"


def start_devices(count: int | None) -> list[jax.Device]:
    """The machine's devices. Without an accelerator: `count` virtual CPU devices, or one a core, at most 8.

    Must come before JAX's first computation: it starts the backends.
    """
    # Once JAX has started the number is fixed, and what there is has to do.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count or min(os.cpu_count() or 1, 8))
    return jax.devices()


def make_mesh(devices: int | None, sequences: int) -> Mesh:
    """A mesh of `devices` devices over the axis `data`.

    Args:
      devices: how many; None takes as many as there are, up to a divisor of `sequences`.
      sequences: the sequences of a step, which the devices share evenly.

    Raises:
      UsageError: if `devices` does not divide `sequences`, or there are not so many.
    """
    if devices is not None and (devices < 1 or sequences % devices):
        divisors = [n for n in range(1, sequences + 1) if sequences % n == 0]
        raise UsageError(
            f"--mesh {devices} does not divide the {sequences} sequence(s) of a step; "
            f"choose one of {', '.join(map(str, divisors))}"
        )
    available = start_devices(devices)
    fitting = max(n for n in range(1, len(available) + 1) if sequences % n == 0)
    if devices is not None and devices > len(available):
        raise UsageError(
            f"--mesh {devices} asks for {devices} devices but this machine has {len(available)} "
            f"({available[0].device_kind}); use --mesh {fitting}"
        )
    count = devices or fitting
    return jax.make_mesh((count,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=available[:count])


def split_sequences(mesh: Mesh) -> NamedSharding:
    """For arrays whose first axis counts sequences."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicate(mesh: Mesh) -> NamedSharding:
    """For arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
