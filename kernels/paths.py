"""The two paths of an op: plain JAX, which runs anywhere and says what is computed, and kernels for Hopper GPUs."""

from typing import Literal

import jax

KernelPath = Literal["plain", "fast"]
"""`plain` is XLA on any device; `fast` the kernels for H100 and H200."""

SPILLING_JAX = ("0.12.0", "0.12.0.1")
"""Releases that compile kernels as units to be linked, by nvJitLink. `setmaxnreg` is then ignored (ptxas' note C7504):
the warps that multiply have 168 registers where the kernels count on 240, and spill; for dK and dV even the products
run one after the other. The extras for GPUs in pyproject.toml leave these releases out."""


def on_hopper(device: jax.Device) -> bool:
    """Whether `device` is an H100 or H200 (compute capability 9.0)."""
    return getattr(device, "compute_capability", None) == "9.0"


def slow_kernels_note(attention: str) -> str | None:
    """Why a run with this attention is slow under this jax, and what to do about it; None where it is not."""
    if attention != "hopper" or jax.__version__ not in SPILLING_JAX:
        return None
    return (
        f"jax {jax.__version__} compiles kernels for Hopper with too few registers: correct, but a step takes 1.19 "
        "times as long as with 0.11.2; pip install 'jax[cuda13]==0.11.2'"
    )
