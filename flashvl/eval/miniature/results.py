"""Makes a table of the miniature: trains its models, asks them, and compares their answers."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashvl.data.storage import locate
from flashvl.eval.miniature.answers import COLUMNS, Answers, Examiner
from flashvl.eval.miniature.designs import TABLES, Table
from flashvl.eval.miniature.stages import Trainer
from flashvl.eval.miniature.verdicts import Comparison, compare
from flashvl.train.run.export import read_log, read_totals


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The values of a figure by seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The standard deviation; 0 of one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        is_one = len(set(self.values)) == 1
        return f"{self.mean:.3f}" if is_one else f"{self.mean:.3f} +- {self.deviation:.3f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedStage:
    """The compute of a stage, over all seeds."""

    name: str
    rows: int
    """Rows of each seed."""
    seconds: tuple[float, ...]
    """Time in the training loop by seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A table that was made."""

    name: str
    table: Table
    seeds: tuple[int, ...]
    rows: dict[str, dict[str, Spread]]
    """Figures by row and column."""
    items: int
    """Questions that each model of a seed was asked."""
    comparisons: tuple[Comparison, ...]
    stages: tuple[TrainedStage, ...]
    asking_s: float
    """Time that the questions took."""

    @property
    def training_s(self) -> float:
        return sum(sum(stage.seconds) for stage in self.stages)


def make_table(name: str, trainer: Trainer, examiner: Examiner, seeds: Sequence[int]) -> Result:
    """Train and ask what is not there yet, on the Ray cluster that this process is connected to."""
    table = TABLES[name]
    asked: dict[str, list[Answers]] = {}
    for seed in seeds:
        for row, stage in table.rows.items():
            model = trainer.make(stage, seed)
            with trainer.show(f"asking seed-{seed}/{stage}") as on_progress:
                answers = examiner.examine(model, table.questions, seed, on_progress)
            asked.setdefault(row, []).append(answers)
    return Result(
        name=name,
        table=table,
        seeds=tuple(seeds),
        rows={
            row: {
                **_accuracies(table, answers),
                **_logged(table, [trainer.folder(table.rows[row], seed) for seed in seeds]),
            }
            for row, answers in asked.items()
        },
        items=sum(map(len, next(iter(asked.values()))[0].right.values())),
        comparisons=tuple(_compare(table, asked)),
        stages=tuple(_compute(table, trainer, seeds)),
        asking_s=sum(each.seconds for answers in asked.values() for each in answers),
    )


def _accuracies(table: Table, answers: Sequence[Answers]) -> dict[str, Spread]:
    """Exact match by column."""
    return {
        column: Spread(
            values=tuple(statistics.fmean(each.of(column, table.questions)) for each in answers)
        )
        for column in COLUMNS[table.questions]
    }


def _logged(table: Table, folders: Sequence[Path | None]) -> dict[str, Spread]:
    """The last figures of the logs that the table shows as well."""
    if not table.logged or None in folders:
        return {}
    last = [read_log(folder)[-1] for folder in folders if folder is not None]
    return {name: Spread(values=tuple(each[name] for each in last)) for name in table.logged}


def _compare(table: Table, asked: Mapping[str, Sequence[Answers]]) -> Iterator[Comparison]:
    for claim in table.claims:
        better, worse = (
            [each.of(claim.column, table.questions) for each in asked[row]]
            for row in (claim.better, claim.worse)
        )
        yield compare(claim.text, claim.paper, better, worse)


def _compute(table: Table, trainer: Trainer, seeds: Sequence[int]) -> Iterator[TrainedStage]:
    for stage in trainer.chain(table.rows.values()):
        folders = dict.fromkeys(trainer.folder(stage, seed) for seed in seeds)
        totals: list[dict[str, Any]] = [read_totals(locate(folder)) for folder in folders if folder]
        yield TrainedStage(
            name=stage,
            rows=totals[0]["num_trained"],
            seconds=tuple(each["seconds"] for each in totals),
        )
