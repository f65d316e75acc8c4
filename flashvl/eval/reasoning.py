"""What preference training and reasoning gain in miniature: tables over several seeds.

The models of `make reasoning`: `tiny` after DPO; and the base, which mostly answers problems at
once, after supervised training on worked solutions (SFT), after GRPO (RL), and after both.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashvl.data.synthetic import REASONING_TASKS, TASKS
from flashvl.eval.scenes import TaskScore

Scores = Mapping[Any, TaskScore]
"""Scores by task."""

TOLERANCE = 0.02
"""Exact match that the reading tasks may lose."""
LEAST_ACCURACY = 0.8
"""Accuracy on held-out pairs that DPO is to reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """What DPO changed, for one seed."""

    seed: int
    accuracy: float
    """Share of the held-out pairs whose faithful caption has the higher implicit reward."""
    margin: float
    """Mean implicit reward of the faithful captions less that of the others."""
    scores: Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Reasoner:
    """A model of one seed that was trained to reason."""

    seed: int
    way: str
    """How it was trained, from the base: `SFT`, `RL` or `SFT+RL`."""
    scores: Scores


WAYS = ("SFT", "RL", "SFT+RL")


def mean_over(scores: Scores, tasks: Sequence[str]) -> float:
    """Mean exact match over some tasks."""
    return sum(scores[task].exact_match for task in tasks) / len(tasks)


def render_preferences(before: Scores, after: Sequence[Preference]) -> str:
    """A Markdown table: held-out pairs and exact match before and after DPO."""
    items = sum(before[task].items for task in TASKS)
    lines = [
        f"| | accuracy on held-out pairs | margin | exact match, {items} items |",
        "|---|---|---|---|",
        # Policy and reference are one model, all rewards are 0, and zero counts half.
        f"| tiny | 0.500 | 0.000 | {mean_over(before, TASKS):.3f} |",
    ]
    for each in after:
        lines.append(
            f"| + DPO, seed {each.seed} | {each.accuracy:.3f} | {each.margin:.3f} |"
            f" {mean_over(each.scores, TASKS):.3f} |"
        )
    columns = (
        [each.accuracy for each in after],
        [each.margin for each in after],
        [mean_over(each.scores, TASKS) for each in after],
    )
    lines.append(f"| + DPO, mean and spread | {' | '.join(map(spread, columns))} |")
    return "\n".join(lines) + "\n"


def render_reasoning(base: Scores, trained: Sequence[Reasoner]) -> str:
    """A Markdown table like the paper's Table 7: each way of training, mean and spread."""
    items = sum(base[task].items for task in REASONING_TASKS)
    columns = ["model", *REASONING_TASKS, f"mean of {items} items", "reading tasks"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows: list[tuple[str, list[Scores]]] = [("base", [base])]
    for way in WAYS:
        own = [each for each in trained if each.way == way]
        rows += [(f"+ {way}, seed {each.seed}", [each.scores]) for each in own]
        rows.append((f"+ {way}, mean and spread", [each.scores for each in own]))
    for name, scores in rows:
        cells = [
            *(spread([each[task].exact_match for each in scores]) for task in REASONING_TASKS),
            spread([mean_over(each, REASONING_TASKS) for each in scores]),
            spread([mean_over(each, TASKS) for each in scores]),
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation of more than one value."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.3f}"


def judge(
    before: Scores, after: Sequence[Preference], base: Scores, trained: Sequence[Reasoner]
) -> dict[str, bool]:
    """Whether what was to be shown has come out, claim by claim, for the means over the seeds."""

    def mean(value: Callable[[Scores], float], way: str) -> float:
        return statistics.fmean(value(each.scores) for each in trained if each.way == way)

    def reasoning(scores: Scores) -> float:
        return mean_over(scores, REASONING_TASKS)

    def reading(scores: Scores) -> float:
        return mean_over(scores, TASKS)

    accuracy = statistics.fmean(each.accuracy for each in after)
    kept = statistics.fmean(reading(each.scores) for each in after)
    sft, rl, both = (mean(reasoning, way) for way in WAYS)
    return {
        f"DPO: accuracy on held-out pairs is at least {LEAST_ACCURACY}": (
            accuracy >= LEAST_ACCURACY
        ),
        "DPO: exact match is not lower": kept >= reading(before),
        "base < SFT": reasoning(base) < sft,
        "base < RL": reasoning(base) < rl,
        "SFT+RL is best": both > max(sft, rl),
        f"reading tasks stay within {TOLERANCE} of the base": all(
            mean(reading, way) >= reading(base) - TOLERANCE for way in WAYS
        ),
    }
