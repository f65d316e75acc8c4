"""How fast a captioning job runs."""

import math
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from flashvl.batch.metrics import JobMetrics
from flashvl.data.ledger.rates import RateWindow


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
    """Measures rates of captioned rows, and counts them for Prometheus."""

    def __init__(self, output: str, num_left: int) -> None:
        """
        Args:
            output: folder of the job's output.
            num_left: rows that are to be answered.
        """
        self._window = RateWindow()
        self._metrics = JobMetrics(output, num_left)
        self._occupancy = math.nan

    def add(self, rows: pa.Table) -> None:
        """Count rows of `captioner.CAPTIONED`."""
        self._metrics.count(rows)
        self._window.add(rows.num_rows, pc.sum(rows["completion_tokens"]).as_py() or 0)
        occupancy = pc.mean(rows["occupancy"]).as_py()
        if occupancy is not None:
            self._occupancy = occupancy

    def read(self, *, num_dead: int) -> Rates:
        """The rates at the moment; `add` must have been called.

        Args:
            num_dead: dead letters in the output.
        """
        images_per_s, tokens_per_s = self._window.read()
        return Rates(
            num_dead=num_dead,
            images_per_s=images_per_s,
            tokens_per_s=tokens_per_s,
            occupancy=self._occupancy,
        )
