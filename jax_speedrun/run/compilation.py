"""How programs are compiled: several side by side, their kernels first, and kept between runs."""

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.stages import Compiled, Lowered, Wrapped

from ..errors import system_reason
from . import distributed
from .program_cache import ProgramCache

MAX_BYTES = 4 << 30
"""The least recently used programs go when there is more."""

KERNEL_CALL = "mosaic_gpu_v2"
"""What XLA calls to compile and launch a Pallas kernel on a GPU."""


def keep_compiled_programs() -> Path | None:
    """Switch JAX's persistent compilation cache on, unless the user has chosen a folder (JAX_COMPILATION_CACHE_DIR).

    A cached program is executed without question, so the folder must be one that nobody else can
    write: `$XDG_CACHE_HOME/jax_speedrun`, by default `~/.cache/jax_speedrun`, made with mode 0700.

    Returns:
      The folder, or None if there is no such folder to be had. Then every run compiles anew, and says why.
    """
    if chosen := jax.config.jax_compilation_cache_dir:
        return Path(chosen)
    try:
        folder = _cache_home() / "jax_speedrun"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(errno.EPERM, "others can write there", str(folder))
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        distributed.say(f"cache:      none, so every run compiles anew ({system_reason(error)})")
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    return folder


def _cache_home() -> Path:
    """Raises OSError where the user has no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if os.path.isabs(named):
        return Path(named)
    home = os.path.expanduser("~")
    if os.environ.get("HOME") == "" or not os.path.isabs(home):
        raise FileNotFoundError(errno.ENOENT, "no home folder, and no XDG_CACHE_HOME")
    return Path(home) / ".cache"


class Call(NamedTuple):
    """A jitted function and arguments to compile it for: trees of arrays, or of shapes with shardings."""

    function: Wrapped
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "program")


def compile_together(*calls: Call, cache: ProgramCache | None = None, cache_key: str = "") -> list[Compiled]:
    """Compile programs side by side, on all cores, or take them from `cache`.

    XLA would compile the kernels of a program one after the other, a second or two each. But a process compiles no
    kernel that it has compiled before. So each is first compiled as a program of its own, all at the same time, while
    Python lowers the next program.

    Args:
      calls: what to compile.
      cache: where to look first, and to keep what was compiled; what came from JAX's own cache stays there alone.
      cache_key: for the cache: what the functions depend on beside their arguments, in words.
    """
    kernels: dict[bytes, Future[Compiled]] = {}

    def load(call: Call) -> Compiled | None:
        return None if cache is None else cache.load(call.name, cache_key, call.arguments)

    def compile_kernel(attributes: dict[str, Any]) -> Compiled:
        return kernel_program(attributes).lower().compile()

    def compile_after(needed: list[Future[Compiled]], call: Call, lowered: Lowered) -> Compiled:
        wait(needed)
        hits.count = 0
        program = lowered.compile()
        # What JAX's cache has read back need not survive being written again: on a CPU it loses its functions.
        if cache is not None and not hits.count:
            cache.save(call.name, cache_key, call.arguments, program)
        return program

    # Threads take what was submitted first, so those that wait never keep the kernels from being compiled.
    with CacheHits() as hits, _threads() as pool:
        programs: list[Compiled | Future[Compiled]] = []
        for call, loaded in zip(calls, pool.map(load, calls), strict=True):
            if loaded is not None:
                programs.append(loaded)
                continue
            lowered = call.function.lower(*call.arguments)
            for attributes in kernel_calls(lowered):
                if (key := attributes["kernel_hash"]) not in kernels:
                    kernels[key] = pool.submit(compile_kernel, attributes)
            programs.append(pool.submit(compile_after, list(kernels.values()), call, lowered))
        return [program.result() if isinstance(program, Future) else program for program in programs]


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Make threads to be waited for, except by what an interrupt or an error ends: a compilation may take a minute."""
    pool = ThreadPoolExecutor()
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


class CacheHits(threading.local):
    """Counts, while entered, the programs that JAX's own cache gives to each thread."""

    count = 0

    def __enter__(self) -> Self:
        jax.monitoring.register_event_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._listen)

    def _listen(self, event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.count += 1


def kernel_calls(program: Lowered) -> Iterator[dict[str, Any]]:
    """Yield the attributes of each call of a Pallas kernel in a program lowered for a GPU: hash, code and flags."""

    def walk(operation: Any) -> Iterator[dict[str, Any]]:
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    found = inner.operation
                    if found.name == "stablehlo.custom_call":
                        if found.attributes["call_target_name"].value == KERNEL_CALL:
                            yield {item.name: _value(item.attr) for item in found.attributes["mhlo.backend_config"]}
                    else:
                        yield from walk(found)

    module: Any = program.compiler_ir("stablehlo")
    yield from walk(module.operation)


def kernel_program(attributes: dict[str, Any]) -> Wrapped:
    """Return a program of one kernel alone, to be compiled and never run, so it needs none of the kernel's arrays."""
    call = jax.ffi.ffi_call(KERNEL_CALL, jax.ShapeDtypeStruct((), jnp.float32), has_side_effect=True)
    return jax.jit(lambda: call(**attributes))


def _value(attribute: Any) -> Any:
    """Return an MLIR attribute as `jax.ffi.ffi_call` takes it."""
    return attribute.value_bytes if hasattr(attribute, "value_bytes") else attribute.value
