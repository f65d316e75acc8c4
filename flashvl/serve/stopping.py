"""SIGTERM and Ctrl-C: what they mean while a service starts, answers and ends."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 1.0


class Stopped(BaseException):
    """What a signal raises where nothing is under way that should end first."""


class StopSignals:
    """Counts the signals, and raises `Stopped` for as long as that is what they mean.

    A start goes through code that puts handlers of its own in our place (`ray.init`) and that loses
    exceptions (callbacks of C++, finalizers). So a thread hears of each signal from the interpreter
    itself, whatever its handler is, and has the main thread raise `Stopped` until it is heeded.
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
        """Have the signals do nothing else; to be called again after `ray.init`."""
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
    """Ends where `Stopped` is raised, and leaves the signals' handlers as they were."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    signals = StopSignals()
    try:
        yield signals
    except Stopped:
        pass
    except SystemExit:
        if not signals.count:  # else it is Ray's way to be stopped
            raise
    finally:
        signals.is_raising = False
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
