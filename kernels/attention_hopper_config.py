"""Tile sizes and resources of the Hopper attention kernels, in one place, with the reason for each."""

import dataclasses

QUERY_BLOCK = KEY_BLOCK = 128  # the block of the mask
HALF = 64  # rows of one wgmma, so rows of one warpgroup
COMPUTE_WARPGROUPS = 2
THREADS = COMPUTE_WARPGROUPS + 1  # and one that only issues copies
PRODUCER = COMPUTE_WARPGROUPS


@dataclasses.dataclass(frozen=True)
class HopperConfig:
    """Resources of one kernel.

    `stages`: streamed tiles in flight. `slots`: resident tiles (2 lets the next
    tile load while the last one is stored). `tiles`: tiles one program walks.
    Registers per thread: 2 x 128 x compute + 128 x producer <= 65,536.
    """

    stages: int
    slots: int
    tiles: int
    strided: bool = False
    compute_registers: int = 240
    producer_registers: int = 24


FORWARD = HopperConfig(stages=2, slots=2, tiles=4)
DQ = HopperConfig(stages=3, slots=1, tiles=1)
DKV = HopperConfig(stages=3, slots=1, tiles=1)
