"""What the demo's job left, read back and set beside the truth."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One captioned picture."""

    id: str
    image: bytes
    caption: str
    answer: str

    @property
    def is_right(self) -> bool:
        return self.caption == self.answer


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """One picture that could not be captioned."""

    id: str
    step: str
    reason: str


def read_results(table: Path, captions: Path) -> list[Result]:
    """The captioned rows of `table`, in its order; ids are unique in a demo's table."""
    caption_of = {
        row["id"]: row["caption"] for row in pq.read_table(captions / "captions").to_pylist()
    }
    return [
        Result(**row, caption=caption_of[row["id"]])
        for row in pq.read_table(table).to_pylist()
        if row["id"] in caption_of
    ]


def read_dead_letters(captions: Path) -> list[DeadLetter]:
    """The rows that could not be captioned, by id."""
    rows = pq.read_table(captions / "dead_letters", columns=["id", "step", "reason"]).to_pylist()
    return sorted((DeadLetter(**row) for row in rows), key=lambda letter: letter.id)
