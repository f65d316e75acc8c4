"""How far a job is and how fast it goes."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

WINDOW_S = 30.0
"""Rates are of the last so many seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A job's state, as its driver sees it."""

    num_done: int
    """Rows with a caption or a dead letter, those of earlier runs with them."""
    num_rows: int
    num_dead: int
    images_per_s: float
    """Of this run, since its first answer; NaN until the next."""
    tokens_per_s: float
    """Of captions; as `images_per_s`."""
    occupancy: float
    """The part of the engines' slots that is in use; NaN if unknown."""

    def __str__(self) -> str:
        """What one looks for first comes first, as a narrow terminal shows no more."""
        told = [
            ("{:.1f} images/s", self.images_per_s),
            ("{} dead", self.num_dead),
            ("engines {:.0%} full", self.occupancy),
            ("{:.0f} tokens/s", self.tokens_per_s),
        ]
        return ", ".join(form.format(value) for form, value in told if not math.isnan(value))


OnProgress = Callable[[Progress], None]


class Meter:
    """Rates over the last `WINDOW_S` seconds, from the first answer on: engines take time to start,
    which says nothing of how fast they are."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()
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
        self._samples.append(_Sample(now_s, self._rows, self._tokens))
        while len(self._samples) > 2 and self._samples[0].time_s < now_s - WINDOW_S:
            self._samples.popleft()

    def read(self, num_done: int, num_rows: int, num_dead: int) -> Progress:
        """Once rows were added."""
        first, last = self._samples[0], self._samples[-1]
        seconds = last.time_s - first.time_s or math.nan
        return Progress(
            num_done=num_done,
            num_rows=num_rows,
            num_dead=num_dead,
            images_per_s=(last.rows - first.rows) / seconds,
            tokens_per_s=(last.tokens - first.tokens) / seconds,
            occupancy=self._occupancy,
        )


@dataclass(frozen=True, slots=True)
class _Sample:
    time_s: float
    rows: int
    tokens: int
