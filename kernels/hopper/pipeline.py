"""The ring of buffers between a producer's copies and the warpgroups that compute: one for all kernels.

    producer     wait free[slot] -> copy into slot, which completes ready[slot]
    consumers    wait ready[slot] -> compute -> arrive free[slot]

Both go round the slots in the same order, so a step's number is all they need to agree on. All counts of a barrier are
per use of its slot, so its phases alternate, and no use begins before everyone has seen the last:

    ready[slot]    one arrival a copy                 the consumers wait for it before they read
    free[slot]     one arrival a compute warpgroup    the producer waits for it before it fills it again, and at the end
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from .config import COMPUTE_WARPGROUPS
from .primitives import Ref


def ring_barriers(copies: int, slots: int) -> list[plgpu.Barrier]:
    """Return the barriers of a ring of slots that `copies` copies fill: its `ready` ones, then its `free` ones."""
    return [plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots) for arrivals in (copies, COMPUTE_WARPGROUPS)]


class Ring(NamedTuple):
    """Slots that are filled again and again, and the barriers of each.

    first: the slot of step 0. Not the number 0, where a kernel walks over the slots in a loop that the compiler could
      unroll: it would know each step's slot, and keep all their addresses in registers.
    """

    ready: Ref
    free: Ref
    first: Array | None = None

    @property
    def slots(self) -> int:
        return self.ready.shape[0]

    def slot(self, step: Array) -> Array:
        """Where step number `step` goes."""
        return lax.rem(step if self.first is None else self.first + step, self.slots)

    def after(self, slot: Array) -> Array:
        """The next step's slot, without a division."""
        return jnp.where(slot == self.slots - 1, 0, slot + 1)

    def fill(self, step: Array, copy: Callable[[Array, Ref], None]) -> None:
        """Have `copy(slot, ready)` start its copies of step number `step`, once the slot is free."""
        slot = self.slot(step)
        pl.when(step >= self.slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        copy(slot, self.ready.at[slot])

    def drain(self, steps: Array | None = None) -> None:
        """Wait until the last of `steps` steps is free; None: at least one for each slot.

        Every completion of a barrier must be awaited, the last one too.
        """
        for slot in range(self.slots):
            wait = functools.partial(plgpu.barrier_wait, self.free.at[slot])
            if steps is None:
                wait()
            else:
                pl.when(slot < steps)(wait)

    def wait(self, slot: Array) -> None:
        """Until a slot's copies have arrived."""
        plgpu.barrier_wait(self.ready.at[slot])

    def release(self, slot: Array) -> None:
        """Tell the producer that this warpgroup has read a slot."""
        plgpu.barrier_arrive(self.free.at[slot])
