"""An evaluation's page, one self-contained HTML file: scores, and wrong answers with pictures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashvl.batch.report import THUMBNAIL_SIDE, render_page
from flashvl.data.images import decode_image, make_thumbnail
from flashvl.errors import DataError
from flashvl.eval.questions import Questions
from flashvl.eval.tasks.catalogue import TASKS
from flashvl.eval.tasks.score import Score

NUM_WRONG = 8
"""Wrong answers that are shown of each benchmark, at even distances."""
MAX_CHARACTERS = 400
"""Characters of a text that are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrongAnswer:
    """A question whose answer is wrong."""

    id: str
    question: str
    reference: str
    answer: str
    extracted: str
    by: str
    picture: str | None
    """Thumbnail of the first image, as a data URI."""


def build_page(
    questions: Questions,
    model: str,
    scores: Mapping[str, Score],
    averages: Mapping[str, float],
    verdicts: Sequence[Mapping[str, Any]],
) -> str:
    """The page of an evaluation.

    Args:
        verdicts: rows of `job.VERDICTS`.
    """
    wrong = {}
    for name in scores:
        those = [each for each in verdicts if each["task"] == name and each["mark"] < 1]
        step = max(len(those) / NUM_WRONG, 1)
        chosen = [those[int(n * step)] for n in range(min(NUM_WRONG, len(those)))]
        wrong[TASKS[name].title] = [_as_wrong(questions, each) for each in chosen]
    return render_page(
        "flashvl.eval",
        model=model,
        scores=[(TASKS[name].title, each) for name, each in scores.items()],
        averages=averages,
        wrong=wrong,
    )


def _as_wrong(questions: Questions, verdict: Mapping[str, Any]) -> WrongAnswer:
    return WrongAnswer(
        id=verdict["id"],
        question=_cut(verdict["question"]),
        reference=_cut(verdict["reference"]),
        answer="(no answer)" if verdict["answer"] is None else _cut(verdict["answer"]),
        extracted="nothing" if verdict["extracted"] is None else _cut(verdict["extracted"]),
        by=verdict["by"],
        picture=_picture(questions, verdict["row"]),
    )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."


def _picture(questions: Questions, row: int) -> str | None:
    benchmark, place = questions.locate(row)
    found: Iterable[bytes] = next(benchmark.table.rows([place])).images[:1]
    for image in found:
        try:
            return make_thumbnail(decode_image(image, benchmark.table.image_limits), THUMBNAIL_SIDE)
        except DataError:
            return None
    return None
