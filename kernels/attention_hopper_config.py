"""Tile sizes and resources of the Hopper attention kernels, in one place, with the reason for each."""

import dataclasses

QUERY_BLOCK = KEY_BLOCK = 128  # the block of the mask
HALF = 64  # rows of one wgmma, so rows of one warpgroup
COMPUTE_WARPGROUPS = 2
PRODUCER = COMPUTE_WARPGROUPS  # the third warpgroup only issues copies
MULTIPROCESSORS = 132  # H100 SXM and H200; elsewhere the portions below balance less well


@dataclasses.dataclass(frozen=True)
class HopperConfig:
    """Resources of one kernel.

    `stages`: streamed tiles in flight. `slots`: resident tiles, of which the
    second loads while the first is in use. Registers per thread:
    128 (2 compute + producer) <= 65,536.
    """

    stages: int
    slots: int
    compute_registers: int = 240
    producer_registers: int = 24


FORWARD = HopperConfig(stages=2, slots=2)
DQ = HopperConfig(stages=2, slots=2)
DKV = HopperConfig(stages=2, slots=2)
