"""Times of functions on a device."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def milliseconds(
    runs: Mapping[str, Callable[[], Any]],
    *,
    calls: int,
    rounds: int,
    wait: Callable[[Any], object] = jax.block_until_ready,
) -> dict[str, float]:
    """Return for each function the time of a call: the median over `rounds` of the mean of `calls` calls in a row.

    A round runs all functions in turn. A GPU under load lowers its clock within seconds: if one function were measured
    to the end before the next, what comes first would look best.

    Args:
      runs: each dispatches work and returns its arrays.
      wait: returns when the work behind such a result is done.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        wait(run())
    for _ in range(rounds):
        for name, run in runs.items():
            wait(run())
            start = time.perf_counter()
            for _ in range(calls):
                result = run()
            wait(result)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: 1e3 * float(np.median(of_rounds)) for name, of_rounds in times.items()}
