"""The benchmarks' side of a comparison: small, read by tasks, and sent to every worker."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from flashvl.data.inputs.image_reader import failure
from flashvl.data.ledger.streaming import stream_tables
from flashvl.data.limits import ImageLimits
from flashvl.errors import DataError
from flashvl.eval.contamination.pictures import (
    CUTS,
    MIN_DETAIL,
    NUM_BANDS,
    THUMBNAIL_SIDE,
    PictureIndex,
    read_fingerprints,
)
from flashvl.eval.contamination.texts import QuestionIndex
from flashvl.eval.questions import Questions
from flashvl.progress import ShowProgress

MANY_IMAGES = 2**10
"""Images of a question that are compared: all."""
_PRINTS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("num_images", pa.int32()),
        ("compared", pa.list_(pa.int32())),
        ("codes", pa.binary()),
        ("thumbnails", pa.binary()),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A question of a benchmark, and what of it can be compared."""

    id: str
    task: str
    question: str | None
    num_images: int
    """Images that could be decoded; `problem` says why others could not."""
    compared: list[int]
    """Numbers of the images with enough detail to be compared."""
    problem: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmarks:
    """The questions of some benchmarks, in which pictures and texts are looked up."""

    items: list[Item]
    pictures: PictureIndex
    places: list[tuple[int, int]]
    """Item and number of its image, by the number that `pictures` gives it."""
    questions: QuestionIndex

    def is_question_compared(self, item: int) -> bool:
        return bool(self.questions.num_ngrams[item])


def read_benchmarks(
    questions: Questions, image_limits: ImageLimits, on_progress: ShowProgress
) -> Benchmarks:
    """Read all questions and their images; Ray must be started."""
    nothing = np.zeros(questions.num_rows, bool)
    prints = questions.read(nothing).map_batches(
        _read_prints,
        fn_kwargs={"image_limits": image_limits},
        batch_size=None,
        batch_format="pyarrow",
    )
    rows: list[dict[str, Any]] = []
    for table in stream_tables(prints):
        rows += table.to_pylist()
        on_progress(len(rows), questions.num_rows)
    return build_benchmarks(sorted(rows, key=lambda row: row["row"]))


def build_benchmarks(rows: Sequence[dict[str, Any]]) -> Benchmarks:
    """The benchmarks from their items in order, with the columns of `_PRINTS`."""
    codes = np.frombuffer(b"".join(row["codes"] for row in rows), np.uint16)
    thumbnails = np.frombuffer(b"".join(row["thumbnails"] for row in rows), np.uint8)
    items = [Item(**{name: row[name] for name in Item.__dataclass_fields__}) for row in rows]
    return Benchmarks(
        items=items,
        pictures=PictureIndex(
            codes.reshape(-1, NUM_BANDS), thumbnails.reshape(-1, THUMBNAIL_SIDE**2)
        ),
        places=[(item, image) for item, row in enumerate(rows) for image in row["compared"]],
        questions=QuestionIndex(item.question for item in items),
    )


def _read_prints(rows: pa.Table, *, image_limits: ImageLimits) -> Iterator[pa.Table]:
    yield pa.Table.from_pylist(
        [_read_item(row, image_limits) for row in rows.to_pylist()], schema=_PRINTS
    )


def _read_item(row: dict[str, Any], image_limits: ImageLimits) -> dict[str, Any]:
    """An item's values; a picture that cannot be decoded costs itself alone."""
    fields = json.loads(row["kept"]["fields"] or "{}")
    num_images, compared, found, problem = 0, [], [], row["reason"]
    for number, image in enumerate(row["images"] or ()):
        try:
            prints = read_fingerprints(image["image"], image_limits, CUTS)
        except DataError as error:
            problem = problem or failure("decode", error)["reason"]
            continue
        num_images += 1
        if prints.details[0] >= MIN_DETAIL:
            compared.append(number)
            found.append(prints)
    return {
        "row": row["row"],
        "id": row["id"],
        "task": row["kept"]["task"],
        "question": fields.get("question"),
        "num_images": num_images,
        "compared": compared,
        "codes": b"".join(each.codes.tobytes() for each in found),
        "thumbnails": b"".join(each.thumbnails.tobytes() for each in found),
        "problem": problem,
    }
