"""The ring of buffers through which tiles stream from memory to the warpgroups that multiply: one for all kernels.

There is no warpgroup that only copies. One of the two that multiply, the filler, starts the copies for both: all slots
before the first step, and from then on, each time both are done with a step, the one that takes its slot next:

    filler      fill 0 1 2 3 | step 0, refill 4 | step 1, refill 5 | step 2, refill 6 | ...
    the other                | step 0           | step 1           | step 2           | ...

    ready[slot]   one arrival a copy         both wait for it before they read
    free[slot]    one arrival a warpgroup    the filler waits for it before it refills the slot

All counts of a barrier are per use of its slot, so its phases alternate, and no use begins before both have seen the
last. Nobody waits in a circle: the filler waits for a step of the other, whose copies it has started long before; the
other waits for copies alone.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .config import FILLER, WARPGROUPS
from .primitives import Ref


def ring_barriers(copies: int, slots: int) -> list[plgpu.Barrier]:
    """Return the barriers of a ring of slots that `copies` copies fill: its `ready` ones, then its `free` ones."""
    return [plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots) for arrivals in (copies, WARPGROUPS)]


class Ring(NamedTuple):
    """Slots that are filled again and again, and the barriers of each.

    first: the slot of step 0. Not the number 0, where a kernel walks over the slots in a loop that the compiler could
      unroll: it would know each step's slot, and keep all their addresses in registers.
    """

    ready: Ref
    free: Ref
    first: Array

    @property
    def slots(self) -> int:
        return self.ready.shape[0]

    def slot(self, step: Array) -> Array:
        """Where step number `step` goes."""
        return lax.rem(self.first + step, self.slots)

    def after(self, slot: Array) -> Array:
        """The next step's slot, without a division."""
        return jnp.where(slot == self.slots - 1, 0, slot + 1)

    def wait(self, slot: Array) -> None:
        """Until a slot's copies have arrived."""
        plgpu.barrier_wait(self.ready.at[slot])

    def release(self, slot: Array) -> None:
        """Say that this warpgroup has read a slot."""
        plgpu.barrier_arrive(self.free.at[slot])

    def refill(self, slot: Array, used: Array | bool, copy: Callable[[Array, Ref], None]) -> None:
        """Start `copy(slot, ready)`, once both warpgroups have let go of the slot if it is `used`. For the filler."""
        pl.when(used)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        copy(slot, self.ready.at[slot])

    def drain(self, steps: Array) -> None:
        """Have the filler wait for the last of `steps` steps to end: each completion of a barrier must be awaited."""

        @pl.when(is_filler())
        def _drain() -> None:
            for slot in range(self.slots):
                pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, self.free.at[self.slot(jnp.int32(slot))]))


class Steps(NamedTuple):
    """A ring whose steps are known by their numbers alone.

    total: of this program.
    copy: starts the copies of a step: (its number, slot, the slot's `ready` barrier).
    """

    ring: Ring
    total: Array
    copy: Callable[[Array, Array, Ref], None]

    def start(self) -> None:
        """Have the filler start the copies of the first steps, one for each slot."""

        @pl.when(is_filler())
        def _fill() -> None:
            for number in range(self.ring.slots):
                self._fill(jnp.int32(number), self.ring.slot(jnp.int32(number)), used=False)

    def release(self, number: Array, slot: Array) -> None:
        """Let go of step `number`, which this warpgroup has read; the filler refills its slot."""
        self.ring.release(slot)
        pl.when(is_filler())(lambda: self._fill(number + self.ring.slots, slot, used=True))

    def _fill(self, number: Array, slot: Array, *, used: bool) -> None:
        @pl.when(number < self.total)
        def _start() -> None:
            self.ring.refill(slot, used, functools.partial(self.copy, number))


def is_filler() -> Array:
    """Whether this warpgroup is the one that fills the rings."""
    return lax.axis_index("warpgroup") == FILLER
