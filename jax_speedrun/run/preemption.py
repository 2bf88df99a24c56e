"""Preemption: SIGTERM, as a cluster sends before it takes a machine away, or Ctrl-C."""

import signal
from types import FrameType, TracebackType
from typing import Self

from . import distributed

LEAD = 2
"""Steps that several processes still make once one of them was asked to stop. A process begins step n when step n - 2
is over, in which all take part; so when one says that all stop before step n, none has begun a later one than n - 1."""
AGREED_STEP = "jax_speedrun/preempted_before_step"


class Preemption:
    """Listen for SIGTERM and SIGINT while entered. Several processes stop after the same step, whoever is asked.

    A second SIGINT interrupts as usual. A second SIGTERM does nothing: clusters send it to
    the launcher and to its processes.

    JAX has a service for such agreements, which stays off: Orbax asks it as well, with the step of
    a checkpoint in the background, and a signal at that moment would be agreed on for a step gone by.
    """

    def __init__(self) -> None:
        self.name = "SIGTERM"
        self._asked = False
        self._agreed: int | None = None

    def reached(self, step: int) -> bool:
        """Return whether to stop before `step`, the same in all processes; to be asked before every step."""
        if not distributed.several():
            return self._asked
        if self._agreed is None:
            if self._asked:
                distributed.announce(AGREED_STEP, str(step + LEAD))
            agreed = distributed.announced(AGREED_STEP)
            self._agreed = None if agreed is None else int(agreed)
        return self._agreed is not None and step >= self._agreed

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._listen) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _listen(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
