"""Tile sizes and resources of the Hopper attention kernels, in one place, with the reason for each."""

import dataclasses

# The block of the mask is the tile a program owns: two warpgroups of 64 rows, the height of one wgmma.
BLOCK = 128
HALF = 64
COMPUTE_WARPGROUPS = 2
PRODUCER = COMPUTE_WARPGROUPS  # the third warpgroup only issues copies
MULTIPROCESSORS = 132  # H100 SXM and H200; with another number only the balance suffers
# Share of the tiles that go in rounds to one program per multiprocessor. 0.5 was 3-9 % slower forward; handing
# each a run of neighbouring tiles, 40-50 %: the programs then read all over the sequence, and L2 holds nothing.
STEADY = 0.75


@dataclasses.dataclass(frozen=True)
class HopperConfig:
    """Resources of one kernel.

    `stages`: streamed tiles in flight. `slots`: resident tiles, at least 2; the
    second arrives while the first is in use. Registers per thread:
    128 (2 compute + producer) <= 65,536; 240 and 24 spill least.
    """

    stages: int
    slots: int = 2
    compute_registers: int = 240
    producer_registers: int = 24


# Shared memory at head width 128, of 227 KiB: 2 x 32 (queries) + 2 x 64 (128 keys and values) = 192 KiB.
FORWARD = HopperConfig(stages=2)
# 2 x 64 (queries and output gradients, or keys and values) + 2 x 32 (64 rows of the other two) = 192 KiB.
# Measured with one slot, 3 stages were up to 14 % slower than 2, and 4 no faster.
DQ = HopperConfig(stages=2)
DKV = HopperConfig(stages=2)
