"""How fast a captioning job runs."""

import math
import time
from collections import deque
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

WINDOW_S = 30.0
"""Seconds over which rates are taken: the last ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a running job's line of progress says beside the number of rows."""

    num_dead: int
    """Dead letters, those of earlier runs included."""
    images_per_s: float
    """Rows answered each second by this run; NaN until its second answer."""
    tokens_per_s: float
    """Tokens of captions each second, likewise."""
    occupancy: float
    """Share of the engines' slots that is in use; NaN if unknown."""

    def __str__(self) -> str:
        """The most wanted figure comes first: a narrow terminal shows only the first ones."""
        told = [
            ("{:.1f} images/s", self.images_per_s),
            ("{} dead", self.num_dead),
            ("engines {:.0%} full", self.occupancy),
            ("{:.0f} tokens/s", self.tokens_per_s),
        ]
        return ", ".join(form.format(value) for form, value in told if not math.isnan(value))


class Meter:
    """Measures rates over the last `WINDOW_S` seconds, from the first answer on: the time in which
    engines start says nothing about their speed."""

    def __init__(self) -> None:
        self._counts: deque[_Count] = deque()
        self._rows = self._tokens = 0
        self._occupancy = math.nan

    def add(self, rows: pa.Table) -> None:
        """Count rows of `captioner.CAPTIONED`."""
        self._rows += rows.num_rows
        self._tokens += pc.sum(rows["completion_tokens"]).as_py() or 0
        occupancy = pc.mean(rows["occupancy"]).as_py()
        if occupancy is not None:
            self._occupancy = occupancy
        now_s = time.monotonic()
        self._counts.append(_Count(now_s, self._rows, self._tokens))
        while len(self._counts) > 2 and self._counts[0].time_s < now_s - WINDOW_S:
            self._counts.popleft()

    def read(self, *, num_dead: int) -> Rates:
        """The rates at the moment; `add` must have been called.

        Args:
            num_dead: dead letters in the output.
        """
        first, last = self._counts[0], self._counts[-1]
        seconds = last.time_s - first.time_s or math.nan
        return Rates(
            num_dead=num_dead,
            images_per_s=(last.rows - first.rows) / seconds,
            tokens_per_s=(last.tokens - first.tokens) / seconds,
            occupancy=self._occupancy,
        )


@dataclass(frozen=True, slots=True)
class _Count:
    time_s: float
    rows: int
    tokens: int
