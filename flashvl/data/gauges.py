"""Gauges for Prometheus whose values last as long as the objects that set them.

Ray sends a process's gauges every ten seconds, but only those that were set since it last did, and
forgets what was not sent twice: a value that is set once is gone half a minute later.
"""

import functools
import threading
import time
import weakref

from ray.util.metrics import Gauge

REPEAT_S = 2.0
"""Seconds between two repetitions of all values."""

_lock = threading.Lock()
_gauges: "weakref.WeakSet[LastingGauge]" = weakref.WeakSet()


class LastingGauge:
    """A gauge that a thread of its process sets again and again."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...] = ()):
        self._gauge = Gauge(name, description=description, tag_keys=tag_keys)
        self._values: dict[tuple[tuple[str, str], ...], float] = {}
        with _lock:
            _gauges.add(self)
        _start()

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        with _lock:
            self._values[tuple((tags or {}).items())] = value
            self._gauge.set(value, tags)

    def repeat(self) -> None:
        for tags, value in self._values.items():
            self._gauge.set(value, dict(tags))


@functools.cache
def _start() -> None:
    threading.Thread(target=_repeat, daemon=True).start()


def _repeat() -> None:
    while True:
        time.sleep(REPEAT_S)
        with _lock:
            for gauge in _gauges:
                gauge.repeat()
