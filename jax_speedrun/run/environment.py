"""What a run's results depend on beside its configuration: versions, devices, commit."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax

DISTRIBUTIONS = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
)


def environment() -> dict[str, object]:
    """Return versions, devices and git commit (None outside a checkout; `-dirty` where files have changed)."""
    installed = {distribution.name for distribution in metadata.distributions()}
    versions = {name: metadata.version(name) for name in DISTRIBUTIONS if name in installed}
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version(), **versions},
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "git_commit": _git_commit(Path(__file__)),
    }


def _git_commit(file: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # Installed into an environment inside somebody else's checkout, we must not report their commit.
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
