"""A benchmark's figures, with the confidence interval that its number of questions allows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashvl.errors import DataError
from flashvl.eval.tasks.task import Marked, Ratios, Task, group_by


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A benchmark's figures, and how they came about."""

    task: str
    figure: float
    """What the paper's tables have: percent, except for OCRBench (of 1000) and MME (of 2800)."""
    low: float
    high: float
    """Bounds of the figure's 95 % confidence interval, by the bootstrap."""
    figures: dict[str, float]
    """Further figures by name, such as those of the benchmark's categories."""
    items: int
    """Questions that were marked."""
    num_judged: int
    """Answers that the judge decided."""
    num_undecided: int
    """Answers that the rule leaves open, which count as wrong for want of a judge."""
    num_lost: int
    """Rows of the file that could not be read, which are not in the figures."""
    num_left_out: int
    """Rows without an image, which VLMEvalKit leaves out as well."""
    rule: str
    """How answers were marked: the rule, and the judge or that there was none."""

    def __str__(self) -> str:
        lost = f", {self.num_lost} rows lost" if self.num_lost else ""
        interval = f"{self.low:.2f} to {self.high:.2f}"
        return (
            f"{self.task}: {self.figure:.2f} ({interval}), {self.items} items{lost} ({self.rule})"
        )


def score(
    task: Task, marked: Sequence[Marked], *, num_lost: int, num_left_out: int, judge: str | None
) -> Score:
    """The score of a benchmark.

    Args:
        judge: name of the judge model that was asked; None: there was none.

    Raises:
        DataError: nothing was marked.
    """
    if not marked:
        raise DataError(f"{task.name} has no marked answer; ask its questions first")
    undecided = sum(each.verdict.by == "nobody" for each in marked)
    judged = sum(each.verdict.by == "judge" for each in marked)
    found = figures_of(task, marked)
    low, high = interval_of(task, *tally_units(task, marked))
    if judge is None:
        rule = f"{task.rule}; no judge: {undecided} answers that this leaves open count as wrong"
    else:
        rule = f"{task.rule}; {judged} answers judged by {judge}"
    return Score(
        task=task.name,
        figure=found[task.figure_name],
        low=low,
        high=high,
        figures=found,
        items=len(marked),
        num_judged=judged,
        num_undecided=undecided,
        num_lost=num_lost,
        num_left_out=num_left_out,
        rule=rule,
    )


def figures_of(task: Task, marked: Sequence[Marked]) -> dict[str, float]:
    """All figures by name; the first one is what the paper's tables have."""
    figure = float(task.combine(ratios_of(*tally_units(task, marked))))
    return {task.figure_name: figure, **task.details(marked)}


Counts = npt.NDArray[np.float64]
"""(units, names of a tally): marks, or how many they are."""


def tally_units(task: Task, marked: Sequence[Marked]) -> tuple[Counts, Counts]:
    """What each unit adds to the benchmark's counts: marks, and how many they are."""
    tallies = [task.tally(unit) for unit in group_by(marked, task.unit).values()]
    names = sorted({name for tally in tallies for name in tally})
    pairs = np.array([[tally.get(name, (0, 0)) for name in names] for tally in tallies], float)
    return pairs[..., 0], pairs[..., 1]


def ratios_of(marks: Counts, counts: Counts) -> Ratios:
    """The ratios of all units together."""
    ratios: Ratios = marks.sum(axis=0) / counts.sum(axis=0)
    return ratios


NUM_RESAMPLES = 1000


def resample(marks: Counts, counts: Counts) -> Ratios:
    """(NUM_RESAMPLES, names): the ratios where chance draws as many units with replacement.

    The draws depend on the number of units alone, so that those of two models are the same.
    """
    rng = np.random.default_rng(0)
    num_units = len(marks)
    found = []
    for _ in range(NUM_RESAMPLES):
        times = np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)
        with np.errstate(invalid="ignore"):
            found.append((times @ marks) / (times @ counts))
    return np.nan_to_num(np.array(found))  # of a category that was not drawn


def interval_of(task: Task, marks: Counts, counts: Counts) -> tuple[float, float]:
    """The 95 % confidence interval of the figure, by the bootstrap over units."""
    low, high = np.percentile(task.combine(resample(marks, counts)), (2.5, 97.5))
    return float(low), float(high)
