"""MMBench, in English and in Chinese: each question is asked once for each rotation of its options.

The rotations of question i have the indices i, i + 1,000,000, i + 2,000,000 ... and refer to its
image. A question counts if the answers to all of its rotations are right.

The answers of the test split, which the paper used, are not public: the development split is the
one that can be marked here.
"""

from collections.abc import Sequence

from flashvl.errors import DataError
from flashvl.eval.tasks.multiple_choice import MultipleChoice
from flashvl.eval.tasks.task import Marked, Tally, by_field, group_by, percent, percent_whole
from flashvl.eval.tasks.tsv import Fields

ROTATION = 1_000_000
"""Distance between the indices of a question's rotations."""


class MMBench(MultipleChoice):
    """MMBench in one language."""

    needed = ("index", "question", "answer")
    figure_name = "circular"

    def check(self, fields: Fields) -> None:
        super().check(fields)
        if not fields["index"].isdigit():
            raise DataError(f"index {fields['index']!r} is not a number; number the questions")

    def unit(self, fields: Fields) -> str:
        return _question(fields)

    def tally(self, unit: Sequence[Marked]) -> Tally:
        return {"": (all(each.is_right for each in unit), 1)}

    def details(self, marked: Sequence[Marked]) -> dict[str, float]:
        return {
            "single": percent(marked),
            **by_field(marked, "category", _circular),
            **by_field(marked, "l2-category", _circular),
        }


class MMBenchEnglish(MMBench):
    name = "mmbench_en"
    title = "MMBench (en)"
    file = "MMBench_DEV_EN"


class MMBenchChinese(MMBench):
    name = "mmbench_cn"
    title = "MMBench (cn)"
    file = "MMBench_DEV_CN"


def _circular(marked: Sequence[Marked]) -> float:
    return percent_whole(group_by(marked, _question).values())


def _question(fields: Fields) -> str:
    """The index of a rotation's question."""
    if "g_index" in fields:
        return fields["g_index"]
    return str(int(fields["index"]) % ROTATION)
