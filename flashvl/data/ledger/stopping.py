"""SIGTERM, which a spot machine gets before it is taken away, and a job when it is cancelled."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_S = 20.0
"""Seconds for which a job waits for rows that it has begun; spot machines give 30 s."""

Drain = Callable[[], int]
"""Lets no further rows begin, and returns the number of rows that were begun."""


def begin_nothing() -> int:
    """A `Drain` for jobs whose rows under way are thrown away, as the next run makes them again."""
    return 0


class Stop:
    """Whether a job must stop, and whether the rows that it has begun are answered."""

    def __init__(self, drain: Drain):
        self._drain = drain
        self._asked = threading.Event()
        self._num_let_in: int | None = None
        self._deadline_s = 0.0
        threading.Thread(target=self._wait_to_drain, daemon=True).start()

    def ask(self) -> None:
        """Ask the job to stop; safe to call in a signal's handler."""
        self._deadline_s = time.monotonic() + GRACE_S
        self._asked.set()

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    def is_over(self, num_answered: int) -> bool:
        """Whether the rows that were begun are answered, or the time is up."""
        if not self.is_asked:
            return False
        is_drained = self._num_let_in is not None and num_answered >= self._num_let_in
        return is_drained or time.monotonic() > self._deadline_s

    def _wait_to_drain(self) -> None:
        # In a thread, as the signal's handler may have interrupted Ray anywhere.
        self._asked.wait()
        self._num_let_in = self._drain()


@contextmanager
def stopped_by_sigterm(drain: Drain = begin_nothing) -> Iterator[Stop]:
    """Let SIGTERM ask the job to stop, in the main thread, which alone may handle signals."""
    stop = Stop(drain)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.ask())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
