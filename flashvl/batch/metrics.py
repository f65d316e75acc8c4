"""The metrics of captioning jobs for Prometheus, exported by Ray on each node.

Ray puts `ray_` before the names. They change once a block, not once a row.
"""

import time

import pyarrow as pa
from ray.util.metrics import Counter, Gauge


class JobMetrics:
    """What the driver of a job has written."""

    def __init__(self) -> None:
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
        self._idle_since_s = time.monotonic()

    def begin(self) -> None:
        """Note that the engine gets a block of rows."""
        if not self._num_blocks:
            self.idle.inc(max(time.monotonic() - self._idle_since_s, 1e-6))
        self._num_blocks += 1

    def end(self, occupancy: float | None) -> None:
        """Note that a block is captioned."""
        self._num_blocks -= 1
        self._idle_since_s = time.monotonic()
        if occupancy is not None:
            self.occupancy.set(occupancy)
