"""The page of a comparison, one self-contained HTML file: counts, and what was found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from flashvl.batch.report import THUMBNAIL_SIDE, render_page
from flashvl.data.images import decode_image, make_thumbnail
from flashvl.data.limits import ImageLimits
from flashvl.errors import DataError
from flashvl.eval.contamination.outcome import Contamination
from flashvl.eval.contamination.tables import TrainingTables
from flashvl.eval.contamination.texts import split_words
from flashvl.eval.questions import Questions
from flashvl.eval.tasks.catalogue import TASKS

NUM_PAIRS = 24
"""Pictures, and questions, that are shown: from the least sure to the surest, at even distances."""
MAX_CHARACTERS = 400
"""Characters of a text that are shown."""

Match = Mapping[str, Any]
_ROWS = pa.schema(
    [("row", pa.int64()), ("pictures", pa.list_(pa.string())), ("texts", pa.list_(pa.string()))]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A question, and the row that holds its picture or its text."""

    item: str
    place: str
    measure: str
    """How far apart the two are."""
    ours: str | None
    theirs: str | None
    """The question's picture and the row's, as data URIs, or the two texts."""


def build_page(
    tables: TrainingTables,
    questions: Questions,
    contamination: Contamination,
    matches: Sequence[Match],
    image_limits: ImageLimits,
) -> str:
    """The page of a comparison; Ray must be started where there are matches.

    Args:
        matches: rows of `job.MATCHES`, with the questions' numbers.
    """
    images = _choose([match for match in matches if match["kind"] == "image"], "distance", -1)
    texts = _choose([match for match in matches if match["kind"] == "text"], "overlap", 1)
    rows = _read_rows(tables, {match["row"] for match in (*images, *texts)}, image_limits)
    pictures = [_picture_pair(questions, each, rows[each["row"]], image_limits) for each in images]
    return render_page(
        "flashvl.eval.contamination",
        rows=contamination.rows,
        dead=contamination.dead,
        benchmarks=[(TASKS[name].title, each) for name, each in contamination.benchmarks.items()],
        pictures=[pair for pair in pictures if pair.ours and pair.theirs],
        texts=[_text_pair(questions, each, rows[each["row"]]) for each in texts],
    )


def _choose(matches: Sequence[Match], name: str, sign: int) -> list[Match]:
    """Some matches, the least sure ones first."""
    sorted_ = sorted(matches, key=lambda match: sign * match[name])
    places = np.linspace(0, len(sorted_) - 1, NUM_PAIRS, dtype=int) if sorted_ else ()
    return [sorted_[n] for n in np.unique(places)]


def _read_rows(
    tables: TrainingTables, wanted: set[int], image_limits: ImageLimits
) -> dict[int, dict[str, Any]]:
    """Pictures and texts of some rows; Ray's tasks read them again."""
    if not wanted:
        return {}
    is_left_out = np.ones(tables.num_rows, bool)
    is_left_out[list(wanted)] = False
    rows = tables.read(is_left_out).map_batches(
        _draw,
        fn_kwargs={"image_limits": image_limits},
        batch_size=None,
        batch_format="pyarrow",
    )
    rows.context.enable_progress_bars = False
    rows.context.print_on_execution_start = False
    return {row["row"]: row for row in rows.take_all()}


def _draw(rows: pa.Table, *, image_limits: ImageLimits) -> pa.Table:
    drawn = [
        {
            "row": row["row"],
            "pictures": [_thumbnail(image, image_limits) for image in row["images"]],
            "texts": row["texts"],
        }
        for row in rows.to_pylist()
    ]
    return pa.Table.from_pylist(drawn, schema=_ROWS)


def _thumbnail(data: bytes, image_limits: ImageLimits) -> str | None:
    try:
        return make_thumbnail(decode_image(data, image_limits), THUMBNAIL_SIDE)
    except DataError:
        return None  # damaged beyond the part that a comparison needs


def _picture_pair(
    questions: Questions, match: Match, row: dict[str, Any], image_limits: ImageLimits
) -> Pair:
    benchmark, place = questions.locate(match["number"])
    image = next(benchmark.table.rows([place])).images[match["item_image"]]
    return Pair(
        item=match["item"],
        place=_place(match),
        measure=f"{match['distance']} bits differ",
        ours=_thumbnail(image, image_limits),
        theirs=row["pictures"][match["image"]],
    )


def _text_pair(questions: Questions, match: Match, row: dict[str, Any]) -> Pair:
    benchmark, place = questions.locate(match["number"])
    question = next(benchmark.table.rows([place])).fields["question"]
    words = set(split_words(question))
    nearest = max(row["texts"], key=lambda text: len(words.intersection(split_words(text))))
    return Pair(
        item=match["item"],
        place=_place(match),
        measure=f"{match['overlap']:.0%} of the n-grams",
        ours=_cut(question),
        theirs=_cut(nearest),
    )


def _place(match: Match) -> str:
    return f"{match['table']}, {match['id']}"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."
