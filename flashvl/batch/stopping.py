"""SIGTERM: a spot machine gets one before it is taken away, and a job when it is told to stop."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.actor import ActorHandle

from flashvl.batch.gate import close

GRACE_S = 20.0
"""Rows that the engines have taken are waited for so long; spot machines give 30 s and more."""


class Stop:
    """Whether a job is to stop, and whether what it has begun has ended."""

    def __init__(self, gate: ActorHandle):
        self._gate = gate
        self._asked = threading.Event()
        self._num_let_in: int | None = None
        self._deadline_s = 0.0
        threading.Thread(target=self._close_gate, daemon=True).start()

    def ask(self) -> None:
        """Have the job stop; a signal's handler may call it."""
        self._deadline_s = time.monotonic() + GRACE_S
        self._asked.set()

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    def is_over(self, num_answered: int) -> bool:
        """The engines have given back what they took, or the time is up."""
        if not self.is_asked:
            return False
        is_drained = self._num_let_in is not None and num_answered >= self._num_let_in
        return is_drained or time.monotonic() > self._deadline_s

    def _close_gate(self) -> None:
        # Not in the handler, which may have interrupted Ray anywhere.
        self._asked.wait()
        self._num_let_in = close(self._gate)


@contextmanager
def stopped_by_sigterm(gate: ActorHandle) -> Iterator[Stop]:
    """SIGTERM asks the job to stop, if this is the main thread, which alone may handle signals."""
    stop = Stop(gate)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.ask())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
