"""The superuser without a superuser's powers: permission bits count, as they do for everybody else."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

CAPABILITY_VERSION_3 = 0x20080522
OVERRIDES = 1 << 1 | 1 << 2 | 1 << 3  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER


@contextlib.contextmanager
def without_powers() -> Iterator[None]:
    """Take the overrides from this thread, and those that it starts, while entered. Other users have none."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, before):
        raise OSError(ctypes.get_errno(), "capget")
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~OVERRIDES  # of the effective set; the permitted one is kept, to come back
    try:
        if libc.capset(header, without):
            raise OSError(ctypes.get_errno(), "capset")
        yield
    finally:
        libc.capset(header, before)
