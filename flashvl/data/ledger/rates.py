"""Rates over the last seconds of a job."""

import math
import time
from collections import deque

WINDOW_S = 30.0
"""Seconds over which rates are taken: the last ones."""


class RateWindow:
    """Measures how fast amounts grow over the last `WINDOW_S` seconds, from the first ones on: the
    time in which a job starts says nothing about its speed."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, tuple[int, ...]]] = deque()

    def add(self, *amounts: int) -> None:
        """Count further amounts; each call gives the same number of them."""
        before = self._points[-1][1] if self._points else (0,) * len(amounts)
        now_s = time.monotonic()
        totals = tuple(total + amount for total, amount in zip(before, amounts, strict=True))
        self._points.append((now_s, totals))
        while len(self._points) > 2 and self._points[0][0] < now_s - WINDOW_S:
            self._points.popleft()

    def read(self) -> tuple[float, ...]:
        """The amounts a second, NaN until the second call of `add`, which must have been called."""
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        seconds = last_s - first_s or math.nan
        return tuple((end - start) / seconds for start, end in zip(first, last, strict=True))
