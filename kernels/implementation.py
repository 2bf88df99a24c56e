"""Which implementation of an op runs: one vocabulary for all of them, and one answer to "can it run here, and why not".

    hopper      kernels for H100 and H200, written in Pallas
    xla         plain JAX, on any device
    reference   the shortest way to say what is computed (attention only: with a dense matrix of scores)
    auto        hopper where it runs and supports the arguments, else xla

An op is called with any of these names and resolves it by `choose`. What its kernels need of the arguments, the family
says in a function `unsupported(...)`: a phrase such as "T a multiple of 128, got 100", or None.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.typing import ArrayLike

Implementation = Literal["auto", "hopper", "xla", "reference"]

_target: contextvars.ContextVar[Literal["here", "interpreter", "elsewhere"]] = contextvars.ContextVar(
    "target", default="here"
)


@contextlib.contextmanager
def interpret_kernels() -> Iterator[None]:
    """Run every Hopper kernel traced inside in Pallas' GPU interpreter, on any device: slow, for tests and for study.

    It needs a CPU thread for each warpgroup of a kernel: set `jax_num_cpu_devices` to 8 on a small machine. Gradients
    are part of it: what is differentiated inside must be pulled back inside.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu  # not part of every jaxlib

    token = _target.set("interpreter")
    try:
        with plgpu.force_gpu_interpret_mode():  # which is part of the key under which jit caches a trace
            yield
    finally:
        _target.reset(token)


def interpreting() -> bool:
    """Whether the caller is inside `interpret_kernels`."""
    return _target.get() == "interpreter"


@contextlib.contextmanager
def compiling_for_hopper() -> Iterator[None]:
    """Let ops be traced for an H100 or H200 that this machine does not have: to compile ahead of time."""
    token = _target.set("elsewhere")
    try:
        yield
    finally:
        _target.reset(token)


def choose(
    op: str,
    implementation: Implementation,
    unsupported: Callable[[], str | None],
    *,
    arrays: Iterable[jax.Array] = (),
    device: jax.Device | None = None,
    names: tuple[Implementation, ...] = ("auto", "hopper", "xla"),
) -> Implementation:
    """Return which implementation stands behind a name: `auto` becomes `hopper` or `xla`, others stay.

    Args:
      op: its name, for messages.
      implementation: what was asked for.
      unsupported: what the Hopper kernels need of the arguments; asked only where they could run at all.
      arrays: of the arguments, those that kernels would read.
      device: where it is to run; by default this process's first device.
      names: those that the op has.

    Raises:
      ValueError: for a name that the op lacks, or for `hopper` where it cannot run.
    """
    check_name(op, implementation, names)
    if implementation not in ("auto", "hopper"):
        return implementation
    reason = _no_hopper(device) or _no_mesh(arrays) or unsupported()
    if reason is None:
        return "hopper"
    if implementation == "auto":
        return "xla"
    raise ValueError(f"{op}: implementation 'hopper' needs {reason}; use 'xla' or 'auto'")


def check_name(op: str, implementation: str, names: tuple[Implementation, ...]) -> None:
    """Raise ValueError for a name that an op lacks."""
    if implementation not in names:
        raise ValueError(f"{op}: unknown implementation {implementation!r}; choose one of {', '.join(names)}")


def known_number(op: str, name: str, value: ArrayLike) -> float:
    """Return a number that is compiled into kernels.

    Raises:
      ValueError: for one that a trace does not know, and for an array of several.
    """
    if isinstance(value, jax.core.Tracer) or np.ndim(value) != 0:
        raise ValueError(
            f"{op}: {name} must be a number that is known when it is traced, got {value}; it is compiled into kernels"
        )
    return float(value)  # type: ignore[arg-type]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def first_order[Tree](op: str, tree: Tree) -> Tree:
    """Return `tree`, arrays that a backward pass works on: whoever differentiates it again gets one clear line."""
    del op
    return tree


@first_order.defjvp
def _refuse_second_order(op: str, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    del primals, tangents
    raise TypeError(
        f"{op}: this implementation can be differentiated once, in reverse mode; for more, see docs/limits.md"
    )


def vary_together[*Trees](*trees: *Trees) -> tuple[*Trees]:
    """Return arrays of which each varies over all mesh axes that any of them varies over: for `jax.shard_map`.

    A backward pass of ours makes gradients of all arguments from all of them. If so the arguments vary alike, they have
    the type that JAX wants, and it sums what goes back to an argument that did not vary. Elsewhere nothing happens.
    """
    axes: set[Any] = set()
    axes.update(*(_varying(leaf) for leaf in jax.tree.leaves(trees)))

    def vary(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, trees) if axes else trees


def check_whole(op: str, *arrays: jax.Array | None, by_token: tuple[jax.Array, ...] = ()) -> None:
    """Refuse arrays that an Explicit mesh splits, but for the first axis of those in `by_token`.

    Raises:
      ValueError: for one that is split.
    """
    types = [(jax.typeof(x), 0) for x in arrays if x is not None] + [(jax.typeof(x), 1) for x in by_token]
    for array_type, free in types:
        if any(axis is not None for axis in array_type.sharding.spec[free:]):
            raise ValueError(
                f"{op} cannot take {array_type} as it is split over the mesh; call it inside jax.shard_map, "
                "vmap over the axis that is split, or make the mesh with AxisType.Auto"
            )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def constant[Tree](op: str, name: str, tree: Tree) -> Tree:
    """Return `tree`, whose numbers have no gradient: whoever asks for one gets one clear line."""
    del op, name
    return tree


@constant.defjvp
def _refuse_gradient(op: str, name: str, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    del primals, tangents
    raise TypeError(f"{op}: {name} has no gradient here; implementation='reference' has it, or use stop_gradient")


def check_ids(op: str, name: str, ids: ArrayLike) -> jax.Array:
    """Return token ids as int32, (T,).

    Raises:
      ValueError: for another rank or kind of number.
    """
    ids_T = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if ids_T.ndim != 1 or not jnp.issubdtype(ids_T.dtype, jnp.integer):
        raise ValueError(
            f"{op}: {name} must be integers of shape (T,), got {ids_T.dtype} {ids_T.shape}; for a batch, use jax.vmap"
        )
    own, narrow = jnp.iinfo(ids_T.dtype), jnp.iinfo(jnp.int32)
    if own.max > narrow.max:  # what int32 cannot hold stays outside of every vocabulary
        ids_T = ids_T.clip(max(own.min, narrow.min), narrow.max)
    return jnp.asarray(ids_T.astype(np.int32))


def _no_hopper(device: jax.Device | None) -> str | None:
    """Return what the device lacks for the kernels, if anything."""
    if _target.get() != "here":
        return None
    device = device or jax.devices()[0]
    return None if on_hopper(device) else f"an H100 or H200, not {device.device_kind}"


def _no_mesh(arrays: Iterable[jax.Array]) -> str | None:
    """Return what arrays on an Explicit mesh lack for the kernels, which see a device's own part of them."""
    for array in arrays:
        mesh = jax.typeof(array).sharding.mesh
        axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        if any(size > 1 and kind == AxisType.Explicit for size, kind in axes):
            return f"arrays of one device, got {jax.typeof(array)} on an Explicit mesh (call it inside jax.shard_map)"
    return None


def _varying(array: jax.Array) -> frozenset[Any]:
    varying: frozenset[Any] = jax.typeof(array).manual_axis_type.varying
    return varying


def on_hopper(device: jax.Device) -> bool:
    """Whether `device` is an H100 or H200 (compute capability 9.0)."""
    return getattr(device, "compute_capability", None) == "9.0"
