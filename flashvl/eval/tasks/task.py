"""What every benchmark says: what is asked, what an answer is worth, and what the figure is.

A benchmark reads cells and texts alone: it knows neither images, nor models, nor where answers come
from. An answer is marked by a rule first. Where the rule cannot tell what the answer says, a judge
may be asked, another language model; without one the answer counts as wrong, and the score says so.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

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
    fields: Fields | None
    """The row's cells, if they are whole: then the row counts as wrong; else it is lost."""

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


Tally = dict[str, tuple[float, float]]
"""Marks and how many they are, by what is counted; a benchmark's figure is made of their ratios."""
Ratios = npt.NDArray[np.float64]
"""(..., names of a tally)."""

NO_ANSWER = Verdict(mark=0, extracted=None, by="rule")
"""The verdict on a row that the model could not answer: it counts as wrong."""


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
    figure_name: ClassVar[str] = "accuracy"
    """Name of the figure that the paper's tables have."""

    def check(self, fields: Fields) -> None:
        """
        Raises:
            DataError: a cell is missing, or not what the benchmark needs.
        """
        if missing := [name for name in ("index", *self.needed) if name not in fields]:
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

    def unit(self, fields: Fields) -> str:
        """What makes an answer one with others, such as the image that they are about: they are
        counted together, and chance takes or leaves them together."""
        return fields["index"]

    def tally(self, unit: Sequence[Marked]) -> Tally:
        """What the answers of one unit add to the benchmark's counts."""
        return {"": (sum(each.verdict.mark for each in unit), len(unit))}

    def combine(self, ratios: Ratios) -> Any:
        """The figure from the ratios of the whole tally, along their last axis."""
        return 100 * ratios.mean(axis=-1)

    def details(self, marked: Sequence[Marked]) -> dict[str, float]:
        """Further figures by name."""
        return by_field(marked, "category", percent)


class JudgedTask(Task):
    """A benchmark with answers that its rule cannot mark."""

    @abstractmethod
    def question(self, fields: Fields, answer: str) -> str:
        """What a judge is asked about an answer."""

    @abstractmethod
    def judged(self, fields: Fields, answer: str, reply: str) -> Verdict:
        """What an answer is worth by a judge's reply; a reply that is none of the allowed is 0."""


def read_items(
    task: Task, table: Table, chosen: Iterable[int] | None = None
) -> Iterator[Item | DeadLetter]:
    """The questions of a benchmark, and its rows that cannot be asked.

    Args:
        chosen: rows to read, in this order; None: all that belong to the benchmark.
    """
    for row in table.rows(chosen):
        if chosen is None and row.problem is None and not task.is_asked(row.fields):
            continue
        fields: Fields | None = row.fields
        problem = row.problem
        try:
            task.check(row.fields)
        except DataError as error:
            fields, problem = None, problem or error
        if problem is not None:
            yield DeadLetter(row=row.row, id=row.id, fields=fields, **failure("read", problem))
            continue
        yield Item(
            row=row.row,
            id=row.id,
            prompt=task.prompt(row.fields),
            images=row.images,
            fields=row.fields,
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
