"""What every benchmark says: what is asked, what an answer is worth, and what the figure is.

A benchmark reads cells and texts alone: it knows neither images, nor models, nor where answers come
from. An answer is marked by a rule first. Where the rule cannot tell what the answer says, a judge
may be asked, another language model; without one the answer counts as wrong, and the score says so.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flashvl.data.inputs.image_reader import failure
from flashvl.errors import DataError
from flashvl.eval.tasks.tsv import Fields, MissingImageError, Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A question of a benchmark, as a model is asked it."""

    row: int
    """Number of the row in the benchmark's file, from 0."""
    id: str
    """What the file has as the row's `index`."""
    prompt: str
    images: list[bytes]
    """Encoded images in their order; the released model was scored with the first one alone."""
    fields: Fields
    """The row's other cells, with which an answer is marked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """A row that cannot be asked, with the columns of `flashvl.data.schema.DEAD_LETTERS`."""

    row: int
    id: str
    step: str
    error: str
    reason: str

    @property
    def is_left_out(self) -> bool:
        """Whether the row has no image, so that VLMEvalKit leaves it out of the benchmark."""
        return self.error == MissingImageError.__name__


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What an answer is worth."""

    mark: float
    """1: right; 0: wrong; a judge may give less than 1."""
    extracted: str | None
    """What the answer was taken to say; None: that could not be told."""
    by: Literal["rule", "judge", "nobody"]
    """The decider; nobody: the rule could not, and no judge was asked, so the mark is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """A question's cells and its answer's verdict."""

    fields: Fields
    verdict: Verdict

    @property
    def is_right(self) -> bool:
        return self.verdict.mark == 1


NO_ANSWER = Verdict(mark=0, extracted=None, by="rule")
"""The verdict on a row that the model could not answer: it counts as wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A benchmark's figures, and how they came about."""

    task: str
    figure: float
    """What the paper's tables have: percent, except for OCRBench (of 1000) and MME (of 2800)."""
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
        return f"{self.task}: {self.figure:.2f} of {self.items} items{lost} ({self.rule})"


class Task(ABC):
    """A benchmark."""

    name: ClassVar[str]
    """Name on the command line."""
    title: ClassVar[str]
    """Name in the paper's tables."""
    file: ClassVar[str]
    """Name of the benchmark's file in VLMEvalKit, without `.tsv`."""
    needed: ClassVar[tuple[str, ...]] = ("question", "answer")
    """Columns without which a row cannot be asked or marked."""
    rule: ClassVar[str]
    """How an answer is marked, in a few words."""

    def check(self, fields: Fields) -> None:
        """
        Raises:
            DataError: a cell is missing, or not what the benchmark needs.
        """
        if missing := [name for name in self.needed if name not in fields]:
            raise DataError(f"row has no {missing[0]!r}; fill in the cell")

    def is_asked(self, fields: Fields) -> bool:
        """Whether a row of the file belongs to the benchmark."""
        return True

    @abstractmethod
    def prompt(self, fields: Fields) -> str:
        """The text that the model is asked, after the images."""

    @abstractmethod
    def verdict(self, fields: Fields, answer: str) -> Verdict:
        """What the rule makes of an answer; by `nobody` where it leaves that open."""

    def figures(self, marked: Sequence[Marked]) -> dict[str, float]:
        """The figures of at least one answer; the first one is what the paper's tables have."""
        return {"accuracy": percent(marked), **by_field(marked, "category", percent)}


class JudgedTask(Task):
    """A benchmark with answers that its rule cannot mark."""

    @abstractmethod
    def question(self, fields: Fields, answer: str) -> str:
        """What a judge is asked about an answer."""

    @abstractmethod
    def judged(self, fields: Fields, answer: str, reply: str) -> Verdict:
        """What an answer is worth by a judge's reply; a reply that is none of the allowed is 0."""


def read_items(task: Task, table: Table) -> Iterator[Item | DeadLetter]:
    """The questions of a benchmark, and its rows that cannot be asked, in the file's order."""
    for row in table.rows():
        if row.problem is None and not task.is_asked(row.fields):
            continue
        try:
            if row.problem is not None:
                raise row.problem
            task.check(row.fields)
        except DataError as error:
            yield DeadLetter(row=row.row, id=row.id, **failure("read", error))
            continue
        yield Item(
            row=row.row,
            id=row.id,
            prompt=task.prompt(row.fields),
            images=row.images,
            fields=row.fields,
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
    found = task.figures(marked)
    name = next(iter(found))
    if judge is None:
        rule = f"{task.rule}; no judge: {undecided} answers that this leaves open count as wrong"
    else:
        rule = f"{task.rule}; {judged} answers judged by {judge}"
    return Score(
        task=task.name,
        figure=found[name],
        figures=found,
        items=len(marked),
        num_judged=judged,
        num_undecided=undecided,
        num_lost=num_lost,
        num_left_out=num_left_out,
        rule=rule,
    )


def percent(marked: Sequence[Marked]) -> float:
    """The mean mark, in percent."""
    return 100 * sum(each.verdict.mark for each in marked) / len(marked)


def group_by(
    marked: Iterable[Marked], key: Callable[[Fields], str | None]
) -> dict[str, list[Marked]]:
    """Answers by what `key` makes of their cells; those for which it is None are left out."""
    groups: dict[str, list[Marked]] = defaultdict(list)
    for each in marked:
        if (found := key(each.fields)) is not None:
            groups[found].append(each)
    return dict(groups)


def by_field(
    marked: Sequence[Marked], name: str, figure: Callable[[Sequence[Marked]], float]
) -> dict[str, float]:
    """A figure for each value of a column, by that value."""
    groups = group_by(marked, lambda fields: fields.get(name))
    return {value: figure(groups[value]) for value in sorted(groups)}


def percent_whole(groups: Iterable[Sequence[Marked]]) -> float:
    """Groups in which every answer is right, in percent."""
    rights = [all(each.is_right for each in group) for group in groups]
    return 100 * sum(rights) / len(rights)
