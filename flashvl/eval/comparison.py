"""Two models on the same questions: how much better one is, and how sure that is."""

import json
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from flashvl.data.storage import Location
from flashvl.errors import ConfigError
from flashvl.eval.tasks.catalogue import TASKS
from flashvl.eval.tasks.score import ratios_of, resample, tally_units
from flashvl.eval.tasks.task import Marked, Task, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The second evaluation's figure minus the first one's, on the questions that both have."""

    task: str
    first: float
    second: float
    low: float
    high: float
    """Bounds of the difference's 95 % confidence interval, by the paired bootstrap."""
    items: int
    """Questions that both have."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        title = TASKS[self.task].title
        verdict = ("better" if self.low > 0 else "worse") if self.is_clear else "undecided"
        span = f"{self.low:+.1f} to {self.high:+.1f}"
        return (
            f"{title:<16}{self.first:8.1f} {self.second:8.1f} {self.second - self.first:+8.1f}"
            f"  {span:<18}{self.items} items; {verdict}"
        )


def compare(first: Location, second: Location) -> list[Difference]:
    """The differences of two evaluations' outputs, by benchmark.

    Raises:
        ConfigError: an output is not a finished evaluation's, or no question is in both.
    """
    one, other = _read_marked(first), _read_marked(second)
    found = []
    for name, task in TASKS.items():
        common = [id for id in one.get(name, {}) if id in other.get(name, {})]
        if common:
            pairs = [one[name][id] for id in common], [other[name][id] for id in common]
            found.append(_difference(task, *pairs))
    if not found:
        raise ConfigError(
            f"no question is in both {first} and {second}; evaluate both models on one benchmark"
        )
    return found


def _difference(task: Task, one: list[Marked], other: list[Marked]) -> Difference:
    tallies = tally_units(task, one), tally_units(task, other)
    figures = [float(task.combine(ratios_of(*each))) for each in tallies]
    # Both draw the same units, since the draws depend on their number alone.
    drawn = [task.combine(resample(*each)) for each in tallies]
    low, high = np.percentile(drawn[1] - drawn[0], (2.5, 97.5))
    return Difference(
        task=task.name,
        first=figures[0],
        second=figures[1],
        low=float(low),
        high=float(high),
        items=len(one),
    )


def _read_marked(folder: Location) -> dict[str, dict[str, Marked]]:
    """Marked answers by benchmark and by question."""
    file = folder / "verdicts.parquet"
    if not file.is_file():
        raise ConfigError(
            f"{folder} holds no verdicts.parquet; name the output of a finished evaluation"
        )
    with file.open() as stream:
        rows = pq.read_table(stream).to_pylist()
    marked: dict[str, dict[str, Marked]] = defaultdict(dict)
    for row in rows:
        verdict = Verdict(mark=row["mark"], extracted=row["extracted"], by=row["by"])
        fields = json.loads(row["fields"])
        marked[row["task"]][row["id"]] = Marked(fields=fields, verdict=verdict)
    return dict(marked)
