"""What a library's error means to who started a run, and the option that helps."""

import os
import subprocess
from importlib import metadata

from .distributed import first_line

NCCL_PACKAGES = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
NEEDED_NCCL = "2.29.2"
"""For XLA's own all-reduce among GPUs, since jax 0.12, which asks for less itself."""

OUT_OF_MEMORY = (
    "resource_exhausted",
    "out of memory",
    "out_of_memory",
    "blaslt is unavailable",
    "failed to create cublas handle",
    "cudnn_status_alloc_failed",
)
"""What JAX says where no memory is left: of a GPU that another process has filled, that its libraries do not start."""


def explain(error: BaseException) -> str | None:
    """Return one line on an error of JAX, None for those that this module does not know."""
    text, lower = first_line(error), str(error).lower()
    if not isinstance(error, RuntimeError):  # JAX's own is one
        return None
    if any(sign in lower for sign in OUT_OF_MEMORY):
        held = _held_by_others()
        others = f"{held}: end it, or choose another GPU by CUDA_VISIBLE_DEVICES. Else " if held else ""
        return f"out of memory ({text}); {others}lower --sequence-length, or spread over more GPUs by --mesh"
    if "nccl" in lower:
        return (
            f"NCCL, by which GPUs talk to each other, failed ({text}); XLA needs {NEEDED_NCCL} or newer, and "
            f"{_installed_nccl()}: pip install -U nvidia-nccl-cu13 (or -cu12)"
        )
    return None


def _held_by_others() -> str | None:
    """Return which other process holds memory of this machine's GPUs, as far as nvidia-smi tells."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    held = [line.split(", ") for line in lines if line.split(",")[0] != str(os.getpid())]
    return f"process {held[0][0]} holds {held[0][-1]} of a GPU" if held else None


def _installed_nccl() -> str:
    for package in NCCL_PACKAGES:
        try:
            return f"{package} {metadata.version(package)} is installed"
        except metadata.PackageNotFoundError:
            continue
    return "none is installed by pip"
