"""The output of the demo's job, read back and compared with the true captions."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One captioned picture."""

    id: str
    """The picture's file name."""
    image: bytes
    """The picture's file."""
    caption: str
    """The model's caption."""
    answer: str
    """The true caption."""

    @property
    def is_right(self) -> bool:
        return self.caption == self.answer


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """One picture that could not be captioned."""

    id: str
    """The picture's file name."""
    step: str
    """The step of the job that failed."""
    reason: str
    """The error, in words for people."""


def read_results(table: Path, captions: Path) -> list[Result]:
    """The captioned rows in the order of `table`, whose ids are unique."""
    caption_of = {
        row["id"]: row["caption"] for row in pq.read_table(captions / "captions").to_pylist()
    }
    return [
        Result(**row, caption=caption_of[row["id"]])
        for row in pq.read_table(table).to_pylist()
        if row["id"] in caption_of
    ]


def read_dead_letters(captions: Path) -> list[DeadLetter]:
    """The rows that could not be captioned, sorted by id."""
    rows = pq.read_table(captions / "dead_letters", columns=["id", "step", "reason"]).to_pylist()
    return sorted((DeadLetter(**row) for row in rows), key=lambda letter: letter.id)
