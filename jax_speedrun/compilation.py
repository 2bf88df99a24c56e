"""How programs are compiled: several side by side, their kernels first, and kept between runs."""

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled, Lowered, Wrapped

MAX_BYTES = 4 << 30
"""The least recently used programs go when there is more."""

KERNEL_CALL = "mosaic_gpu_v2"
"""What XLA calls to compile and launch a Pallas kernel on a GPU."""


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


def compile_together(*lower: Callable[[], Lowered]) -> list[Compiled]:
    """Compile programs side by side, on all cores.

    XLA would compile the kernels of a program one after the other, a second or two each. But a process compiles no
    kernel that it has compiled before. So each is first compiled as a program of its own, all at the same time, while
    Python lowers the next program.

    Args:
      lower: for each program, what lowers it.
    """
    kernels: dict[bytes, Future[Compiled]] = {}

    def compile_kernel(call: dict[str, Any]) -> Compiled:
        return kernel_program(call).lower().compile()

    def compile_after(needed: list[Future[Compiled]], program: Lowered) -> Compiled:
        wait(needed)
        return program.compile()

    # Threads take what was submitted first, so those that wait never keep the kernels from being compiled.
    with ThreadPoolExecutor() as pool:
        programs = []
        for lower_program in lower:
            program = lower_program()
            for call in kernel_calls(program):
                if (key := call["kernel_hash"]) not in kernels:
                    kernels[key] = pool.submit(compile_kernel, call)
            programs.append(pool.submit(compile_after, list(kernels.values()), program))
        return [compiled.result() for compiled in programs]


def kernel_calls(program: Lowered) -> Iterator[dict[str, Any]]:
    """The attributes of each call of a Pallas kernel in a program lowered for a GPU: its hash, its code, its flags."""

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

    yield from walk(program.compiler_ir("stablehlo").operation)


def kernel_program(attributes: dict[str, Any]) -> Wrapped:
    """A program with nothing but one kernel, to be compiled and never run, so it needs none of the kernel's arrays."""
    call = jax.ffi.ffi_call(KERNEL_CALL, jax.ShapeDtypeStruct((), jnp.float32), has_side_effect=True)
    return jax.jit(lambda: call(**attributes))


def _value(attribute: Any) -> Any:
    """An MLIR attribute as `jax.ffi.ffi_call` takes it."""
    return attribute.value_bytes if hasattr(attribute, "value_bytes") else attribute.value
