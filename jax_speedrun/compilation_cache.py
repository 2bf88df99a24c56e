"""Compiled programs kept between runs, in a folder of the user's own."""

import os
import stat
from pathlib import Path

import jax

MAX_BYTES = 4 << 30
"""The least recently used programs go when there is more."""


def keep_compiled_programs() -> Path | None:
    """Switch JAX's persistent compilation cache on, unless the user has chosen a folder (JAX_COMPILATION_CACHE_DIR).

    A cached program is executed without question, so the folder must be one that nobody else can
    write: `$XDG_CACHE_HOME/jax_speedrun`, by default `~/.cache/jax_speedrun`, made with mode 0700.

    Returns:
      The folder, or None if there is no such folder to be had. Then every run compiles anew.
    """
    if chosen := jax.config.jax_compilation_cache_dir:
        return Path(chosen)
    folder = _cache_home() / "jax_speedrun"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    return folder


def _cache_home() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~")) / ".cache"
