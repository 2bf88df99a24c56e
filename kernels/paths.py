"""The two paths of an op: plain JAX, which runs anywhere and says what is computed, and kernels for Hopper GPUs."""

from typing import Literal

import jax

KernelPath = Literal["plain", "fast"]
"""`plain` is XLA on any device; `fast` the kernels for H100 and H200."""


def on_hopper(device: jax.Device) -> bool:
    """Whether `device` is an H100 or H200 (compute capability 9.0)."""
    return getattr(device, "compute_capability", None) == "9.0"
