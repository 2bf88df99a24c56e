"""Preemption: SIGTERM, as a cluster sends before it takes a machine away, Ctrl-C, or the terminal going away."""

import signal
from types import FrameType, TracebackType
from typing import Self

from ..errors import SIGNALS
from . import distributed

LEAD = 2
"""Steps that several processes still make once one of them was asked to stop. A process begins step n when step n - 2
is over, in which all take part; so when one says that all stop before step n, none has begun a later one than n - 1."""
AGREED_STEP = "jax_speedrun/preempted_before_step"


class Preemption:
    """Listen for the `SIGNALS` while entered. Several processes stop after the same step, whoever is asked.

    A second SIGINT interrupts as usual. A second SIGTERM does nothing: clusters send it to
    the launcher and to its processes. What nohup has had ignored stays so.

    JAX has a service for such agreements, which stays off: Orbax asks it as well, with the step of
    a checkpoint in the background, and a signal at that moment would be agreed on for a step gone by.
    """

    def __init__(self) -> None:
        self.signal = signal.SIGTERM
        """Which it was, once `reached`; the same in all processes."""
        self._asked = False
        self._agreed: int | None = None

    def reached(self, step: int) -> bool:
        """Return whether to stop before `step`, the same in all processes; to be asked before every step."""
        if not distributed.several():
            return self._asked
        if self._agreed is None:
            if self._asked:
                distributed.announce(AGREED_STEP, f"{step + LEAD} {self.signal.name}")
            if (agreed := distributed.announced(AGREED_STEP)) is not None:
                number, name = agreed.split()
                self._agreed, self.signal = int(number), signal.Signals[name]
        return self._agreed is not None and step >= self._agreed

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self._before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._listen)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _listen(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            self.signal = signal.Signals(number)
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
