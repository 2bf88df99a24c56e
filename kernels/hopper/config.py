"""How a kernel is laid out on a Hopper multiprocessor: its warpgroups, and what the chip has."""

WARPGROUP_ROWS = 64
"""Rows of a tile that one warpgroup computes: the height of one `wgmma`."""
WARPGROUPS = 2
"""Of a program. Each thread may then have 255 of a multiprocessor's 65,536 registers, and the compiler is asked for
nothing: a third warpgroup would leave 168, unless it gave its own away by `setmaxnreg`, which ptxas ignores where it
compiles a kernel as a unit to be linked (its note C7504; jax 0.12)."""
FILLER = 0
"""The warpgroup that also starts the copies that both wait for, between its own matmuls."""
MULTIPROCESSORS = 132
"""Of an H100 SXM or H200; with another number only the balance suffers."""
