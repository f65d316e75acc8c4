"""The metrics of captioning jobs for Prometheus, exported by Ray on each node.

Ray puts `ray_` before the names. They change once a block, not once a row.
"""

import asyncio
import time

import pyarrow as pa
from ray.util.metrics import Counter, Gauge

from flashvl.data.gauges import LastingGauge

REPORT_S = 2.0
"""Seconds between two reports of an engine."""


class JobMetrics:
    """What the driver of a job has written."""

    def __init__(self, output: str, num_left: int) -> None:
        """
        Args:
            output: folder of the job's output, which tells jobs apart.
            num_left: rows that are to be answered.
        """
        self.rows = Counter(
            "flashvl_caption_rows_total",
            description="Rows that were answered, with a caption or by a dead letter.",
        )
        self.tokens = Counter("flashvl_caption_tokens_total", description="Tokens of all captions.")
        self.dead_letters = Counter(
            "flashvl_caption_dead_letters_total",
            description="Dead letters, by the step that failed and the class of the error.",
            tag_keys=("step", "error"),
        )
        self.left = LastingGauge(
            "flashvl_caption_rows_left",
            description="Rows that a running job has not answered yet.",
            tag_keys=("output",),
        )
        self._output, self._num_left = output, num_left
        self.left.set(num_left, {"output": output})

    def count(self, rows: pa.Table) -> None:
        """Count rows of `captioner.CAPTIONED`."""
        failures = rows.group_by(["step", "error"]).aggregate([([], "count_all")])
        for failed in failures.to_pylist():
            if failed["step"] is not None:
                tags = {"step": failed["step"], "error": failed["error"]}
                self.dead_letters.inc(failed["count_all"], tags=tags)
        tokens = sum(filter(None, rows["completion_tokens"].to_pylist()))
        for counter, new in ((self.rows, rows.num_rows), (self.tokens, tokens)):
            if new:
                counter.inc(new)
        self._num_left -= rows.num_rows
        self.left.set(self._num_left, {"output": self._output})


class EngineMetrics:
    """How busy the engine of one actor is."""

    def __init__(self) -> None:
        self.idle = Counter(
            "flashvl_caption_engine_idle_seconds_total",
            description="Seconds for which an engine had no rows to caption.",
        )
        self.occupancy = Gauge(
            "flashvl_caption_engine_occupancy_ratio",
            description="Share of the engine's slots in use, the mean since its last block.",
        )
        self._num_blocks = 0
        self._occupancy: float | None = None
        self._counted_s = time.monotonic()

    def begin(self) -> None:
        """Note that the engine gets a block of rows."""
        self._count_idle()
        self._num_blocks += 1

    def end(self, occupancy: float | None) -> None:
        """Note that a block is captioned."""
        self._num_blocks -= 1
        self._counted_s = time.monotonic()
        if occupancy is not None:
            self._occupancy = occupancy

    def report(self) -> None:
        """Tell how busy the engine is at the moment."""
        self._count_idle()
        if self._occupancy is not None:
            self.occupancy.set(self._occupancy if self._num_blocks else 0.0)

    async def keep_reporting(self) -> None:
        """Report for ever: Ray forgets gauges, and an engine may wait for rows for hours."""
        while True:
            self.report()
            await asyncio.sleep(REPORT_S)

    def _count_idle(self) -> None:
        if not self._num_blocks:
            now_s = time.monotonic()
            self.idle.inc(max(now_s - self._counted_s, 1e-6))
            self._counted_s = now_s
