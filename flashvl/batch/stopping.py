"""SIGTERM, which a spot machine gets before it is taken away, and a job when it is cancelled."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.actor import ActorHandle

from flashvl.batch.gate import close

GRACE_S = 20.0
"""Seconds for which a job waits for rows that the engines have taken; spot machines give 30 s."""


class Stop:
    """Whether a job must stop, and whether the rows that it has begun are answered."""

    def __init__(self, gate: ActorHandle):
        self._gate = gate
        self._asked = threading.Event()
        self._num_let_in: int | None = None
        self._deadline_s = 0.0
        threading.Thread(target=self._close_gate, daemon=True).start()

    def ask(self) -> None:
        """Ask the job to stop; safe to call in a signal's handler."""
        self._deadline_s = time.monotonic() + GRACE_S
        self._asked.set()

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    def is_over(self, num_answered: int) -> bool:
        """Whether the engines have answered the rows that they took, or the time is up."""
        if not self.is_asked:
            return False
        is_drained = self._num_let_in is not None and num_answered >= self._num_let_in
        return is_drained or time.monotonic() > self._deadline_s

    def _close_gate(self) -> None:
        # In a thread, as the signal's handler may have interrupted Ray anywhere.
        self._asked.wait()
        self._num_let_in = close(self._gate)


@contextmanager
def stopped_by_sigterm(gate: ActorHandle) -> Iterator[Stop]:
    """Let SIGTERM ask the job to stop, in the main thread, which alone may handle signals."""
    stop = Stop(gate)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.ask())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
