"""Compiled programs that a later process finds without tracing.

JAX's compilation cache is asked with the program that XLA is to compile, and to write that program down Python has to
trace the step and lower every kernel, which takes longer than the rest of a start. This cache is asked with what the
program comes from: code, recipe, arguments, devices, versions and options.
"""

import functools
import hashlib
import os
import pickle
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh
from jax.stages import Compiled

import jax_speedrun

from .. import kernels
from ..atomic_write import atomic_write
from . import distributed

KEPT = 12
"""Programs in a folder, three of a run; those longest unused go."""

DIGEST_BYTES = hashlib.sha256().digest_size

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class ProgramCache:
    """Programs for `devices` in `folder`, to which only the user may be able to write: what is found there is run."""

    def __init__(self, folder: Path, devices: Iterable[jax.Device]):
        self.folder = folder
        self.devices = tuple(devices)

    def load(self, name: str, cache_key: str, arguments: tuple[Any, ...]) -> Compiled | None:
        """Return the program saved under the same name, for the same code and the same arguments; None without one.

        Args:
          name: of the function.
          cache_key: what the function depends on beside its arguments, in words; the code of this package is seen to.
          arguments: trees of arrays, or of their shapes with shardings.
        """
        path = self._path(name, cache_key, arguments)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
        if digest != hashlib.sha256(content).digest():
            print(f"{path}: damaged, so {name} is compiled anew", file=sys.stderr)
            return None
        try:
            executable, in_tree, out_tree = pickle.loads(content)
            program: Compiled = serialize_executable.deserialize_and_load(
                executable, in_tree, out_tree, backend=self.devices[0].client, execution_devices=self.devices
            )
            os.utime(path)
        except Exception as error:  # what a backend raises for a program that it will not load is its own affair
            print(f"{path}: not loaded ({error}), so {name} is compiled anew", file=sys.stderr)
            return None
        return program

    def save(self, name: str, cache_key: str, arguments: tuple[Any, ...], program: Compiled) -> None:
        """Keep a program for `load`. If that fails, on a full disk say, a line on stderr is all that happens."""
        path = self._path(name, cache_key, arguments)
        try:
            content = pickle.dumps(serialize_executable.serialize(program))
            whole = hashlib.sha256(content).digest() + content
            atomic_write(path, lambda partial: partial.write_bytes(whole))
            for old in sorted(self.folder.glob("*.program"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
                old.unlink(missing_ok=True)
        except Exception as error:  # as above
            print(f"{path}: not written ({error}), so the next run compiles {name} again", file=sys.stderr)

    def _path(self, name: str, cache_key: str, arguments: tuple[Any, ...]) -> Path:
        leaves, structure = jax.tree.flatten(arguments)
        facts = [
            cache_key,
            _source_digest(),
            sys.version,
            *(f"{package} {metadata.version(package)}" for package in PACKAGES),
            *(f"{device.id} {device.device_kind} {device.client.platform_version}" for device in self.devices),
            os.environ.get("XLA_FLAGS", ""),
            repr(sorted((option, str(value)) for option, value in jax.config.values.items())),
            str(structure),
            *(f"{leaf.shape} {leaf.dtype} {leaf.sharding}" for leaf in leaves),
        ]
        digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()
        return self.folder / f"{name}-{digest[:32]}.program"


def cache_for(mesh: Mesh, folder: Path | None) -> ProgramCache | None:
    """Return the cache in `folder`, if there is one, for runs on `mesh`; None where such a run keeps no programs.

    On a CPU there are no kernels to lower, and a program might not run on another CPU. Of several processes all would
    have to find their programs, or none.
    """
    if folder is None or not folder.is_dir() or mesh.devices.flat[0].platform == "cpu" or distributed.several():
        return None
    return ProgramCache(folder, mesh.devices.flat)


@functools.cache
def _source_digest() -> str:
    """Return the SHA-256 of all code in jax_speedrun and its kernels, which a checkout has behind a link."""
    digest = hashlib.sha256()
    for folder in (Path(jax_speedrun.__file__).parent, Path(kernels.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
