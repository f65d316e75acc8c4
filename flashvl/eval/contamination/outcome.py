"""The outcome of a comparison: how many questions of each benchmark were found."""

from dataclasses import asdict, dataclass
from typing import Any

from flashvl.eval.tasks.catalogue import TASKS


@dataclass(kw_only=True, slots=True)
class Counts:
    """Questions of a benchmark."""

    items: int = 0
    pictures_found: int = 0
    """Questions with a picture that is in a table."""
    questions_found: int = 0
    """Questions whose text is in a table."""
    found_together: int = 0
    """Questions whose picture and text are in one row, which is as good as proof."""
    pictures_not_compared: int = 0
    """Questions without a picture that has enough detail to be compared."""
    questions_not_compared: int = 0
    """Questions whose text is too short, or as others', to tell where it is from."""
    unreadable: int = 0
    """Questions of which an image, or the row, could not be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contamination:
    """The outcome of a comparison."""

    rows: int
    """Rows of the tables that were compared."""
    dead: int
    """Rows of the tables that could not be read or decoded."""
    benchmarks: dict[str, Counts]
    """Counts by benchmark, in the order of the paper's tables."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.rows} rows compared, {self.dead} dead letters"]
        for name, each in self.benchmarks.items():
            lines.append(
                f"{TASKS[name].title:<16}{each.items} items: {each.pictures_found} pictures and"
                f" {each.questions_found} questions found, {each.found_together} together; not"
                f" compared: {each.pictures_not_compared} pictures,"
                f" {each.questions_not_compared} questions; {each.unreadable} unreadable"
            )
        return "\n".join(lines)
