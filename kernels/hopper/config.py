"""How a kernel with a producer is laid out on a Hopper multiprocessor: warpgroups, registers, slots."""

import dataclasses

WARPGROUP_ROWS = 64
"""Rows of a tile that one warpgroup computes: the height of one `wgmma`."""
COMPUTE_WARPGROUPS = 2
PRODUCER = COMPUTE_WARPGROUPS
"""Number of the third warpgroup, which only issues copies."""
MULTIPROCESSORS = 132
"""Of an H100 SXM or H200; with another number only the balance suffers."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Resources of one kernel.

    `stages`: streamed tiles in flight. `slots`: resident tiles, at least 2; the
    second arrives while the first is in use. Registers per thread:
    128 (2 compute + producer) <= 65,536; 240 and 24 spill least.
    """

    stages: int
    slots: int = 2
    compute_registers: int = 240
    producer_registers: int = 24
