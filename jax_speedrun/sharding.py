"""The mesh, and where each array of a run lives on it.

One axis, `data`: sequences are split over it, and so is the optimiser's state;
parameters are on every device.
"""

import contextlib
import dataclasses
import os

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .banks import round_up
from .errors import UsageError

DATA_AXIS = "data"


def start_devices(count: int | None) -> list[jax.Device]:
    """Return the machine's devices. Without an accelerator: `count` virtual CPU devices, or one a core, at most 8.

    Must come before JAX's first computation: it starts the backends.

    Raises:
      UsageError: JAX finds none.
    """
    # Once JAX has started the number is fixed, and what there is has to do.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count or min(os.cpu_count() or 1, 8))
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        named = f" for JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}" if "JAX_PLATFORMS" in os.environ else ""
        reason = str(error).strip().partition("\n")[0] or "it does not say why"
        raise UsageError(f"JAX finds no device to run on{named} ({reason}); JAX_PLATFORMS=cpu always works") from error


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


@dataclasses.dataclass(frozen=True)
class Shards:
    """How an optimiser shares its work: over the `devices` of the mesh axis `axis`, along each array's first axis.

    `reduce_mean` and `gather` are collectives, so they must run inside a `jax.shard_map` over `axis`.
    """

    axis: str
    devices: int

    def pad(self, rows: Array) -> Array:
        """Zeros behind the rows, up to a multiple of the devices."""
        missing = round_up(rows.shape[0], self.devices) - rows.shape[0]
        return jnp.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1)))

    def reduce_mean(self, rows: Array) -> Array:
        """The mean over all devices of their `rows`: this device's share of it (a reduce-scatter)."""
        share: Array = jax.lax.psum_scatter(rows, self.axis, scatter_dimension=0, tiled=True)
        return share / self.devices

    def gather(self, share: Array) -> Array:
        """Every device's share, one behind the other (an all-gather)."""
        rows: Array = jax.lax.all_gather(share, self.axis, tiled=True)
        return rows


def shards_of(mesh: Mesh) -> Shards | None:
    """For the optimiser of a run on `mesh`; None on a single device, which has nothing to share."""
    return Shards(DATA_AXIS, mesh.size) if mesh.size > 1 else None


def compiler_options(mesh: Mesh) -> dict[str, bool | int] | None:
    """XLA's options for a step, where the backend knows them: how matmuls are made, and what overlaps."""
    if mesh.devices.flat[0].platform != "gpu":
        return None
    # By default XLA gives every matmul to Triton, in the end finds cuBLAS faster for most, and has left the sums around
    # them as passes of their own. This leaves plain matmuls to cuBLAS from the start, which adds while it multiplies,
    # and sums FP8 products as coarsely or exactly as it is told: Triton's kernels do not look. In jax 0.12 only the
    # switch for all of Triton's matmuls keeps FP8 from them; in 0.11 that one makes a step 0.4 ms longer.
    triton = "xla_gpu_enable_triton_gemm" if jax.__version_info__ >= (0, 12) else "xla_gpu_triton_gemm_any"
    options: dict[str, bool | int] = {triton: False}
    if mesh.size > 1:
        options["xla_gpu_enable_latency_hiding_scheduler"] = True
        # Combined into one, the buckets of gradients would all wait for the last of them.
        options["xla_gpu_reduce_scatter_combine_threshold_bytes"] = 0
        options["xla_gpu_all_gather_combine_threshold_bytes"] = 0
    return options
