"""SIGTERM and Ctrl-C: their effects while a service starts, answers and ends."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 1.0
"""Seconds after which `Stopped` is raised again, if it was lost."""


class Stopped(BaseException):
    """Raised by a signal while there is nothing that should end first."""


class StopSignals:
    """Counts the signals, and raises `Stopped` at each while `is_raising` is True.

    While a service starts, other code replaces our handlers (`ray.init`) and loses exceptions
    (callbacks of C++, finalizers). So a thread learns of each signal from the interpreter itself,
    whatever its handler is, and makes the main thread raise `Stopped` until that has an effect.
    """

    def __init__(self) -> None:
        self.count = 0
        self.is_raising = True
        self._main = threading.main_thread().ident
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGALRM, self._raise)
        threading.Thread(target=self._listen, daemon=True).start()
        self.install()

    def install(self) -> None:
        """Make the signals do nothing else; call it again after `ray.init`."""
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)

    def _raise(self, signum: int, frame: FrameType | None) -> None:
        if self.is_raising:
            raise Stopped

    def _listen(self) -> None:
        while heard := self._ear.recv(1):
            if heard[0] in SIGNALS:
                self.count += 1
                threading.Thread(target=self._insist, daemon=True).start()

    def _insist(self) -> None:
        pause = threading.Event()
        while self.is_raising and self._main is not None:
            signal.pthread_kill(self._main, signal.SIGALRM)
            pause.wait(REPEAT_S)


@contextmanager
def until_stopped() -> Iterator[StopSignals]:
    """Run a `with` block until `Stopped` is raised, and restore the signals' handlers."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    signals = StopSignals()
    try:
        yield signals
    except Stopped:
        pass
    except SystemExit:
        if not signals.count:  # otherwise Ray has raised it because of our signal
            raise
    finally:
        signals.is_raising = False
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
