"""The ring's arithmetic, and a kernel in the interpreter whose two warpgroups stream tiles through one."""

import functools
from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_speedrun.kernels.hopper.config import WARPGROUP_ROWS, WARPGROUPS
from jax_speedrun.kernels.hopper.pipeline import Ring, Steps, ring_barriers
from jax_speedrun.kernels.hopper.primitives import launch
from jax_speedrun.kernels.implementation import interpret_kernels

ROWS, COLUMNS = WARPGROUPS * WARPGROUP_ROWS, 64


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_steps_go_round_the_slots(slots, first):
    ready = SimpleNamespace(shape=(slots,))
    ring = Ring(ready, ready, jnp.int32(first % slots))
    assert ring.slots == slots
    for step in range(3 * slots):
        slot = ring.slot(jnp.int32(step))
        assert slot == (first + step) % slots
        assert ring.after(slot) == ring.slot(jnp.int32(step + 1))


def test_both_barriers_of_a_ring_count_their_arrivals():
    ready, free = ring_barriers(copies=5, slots=3)
    assert (ready.num_arrivals, ready.num_barriers) == (5, (3,))
    assert (free.num_arrivals, free.num_barriers) == (WARPGROUPS, (3,))


@functools.partial(jax.jit, static_argnames=("slots", "first"))
def streamed(x_TC, steps, *, slots, first):
    """Twice the first `steps` tiles of x, a run-time number; what lies beyond is not written."""

    def body(x, steps, out, *, smem, result, barriers):
        warpgroup, total = lax.axis_index("warpgroup"), steps[0]
        own = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def copy(number, slot, ready):
            plgpu.copy_gmem_to_smem(x.at[pl.ds(number * ROWS, ROWS)], smem.at[slot], ready)

        ring = Steps(Ring(*barriers, jnp.int32(first)), total, copy)
        ring.start()

        def step(number, slot):
            ring.ring.wait(slot)
            result[warpgroup] = 2 * smem[slot, own]
            ring.release(number, slot)
            plgpu.commit_smem()
            rows = pl.ds(number * ROWS + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            plgpu.copy_smem_to_gmem(result.at[warpgroup], out.at[rows])
            plgpu.wait_smem_to_gmem(0)
            return ring.ring.after(slot)

        lax.fori_loop(0, total, step, ring.ring.slot(jnp.int32(0)))
        ring.ring.drain(total)

    scratch = {
        "smem": plgpu.SMEM((slots, ROWS, COLUMNS), jnp.float32),
        "result": plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS, COLUMNS), jnp.float32),
        "barriers": ring_barriers(1, slots),
    }
    return launch(body, "streamed", jax.ShapeDtypeStruct(x_TC.shape, x_TC.dtype), scratch, programs=1)(x_TC, steps)


@pytest.mark.parametrize(("slots", "first"), [(2, 0), (2, 1), (3, 2)])
def test_every_step_arrives_once_and_in_its_place(slots, first):
    x = np.random.default_rng(0).standard_normal((8 * ROWS, COLUMNS)).astype(np.float32)
    with interpret_kernels():
        for steps in (0, 1, slots, slots + 1, 8):
            got = streamed(x, np.array([steps], np.int32), slots=slots, first=first)
            np.testing.assert_array_equal(got[: steps * ROWS], 2 * x[: steps * ROWS])
