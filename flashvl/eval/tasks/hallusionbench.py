"""HallusionBench: questions of yes or no, several about a figure, and each about several figures.

aAcc counts right answers, fAcc figures of which all answers are right, and qAcc questions of which
all answers are right; the paper's figure is their mean. A row's index ends in the numbers of its
set, figure and question.
"""

from collections.abc import Sequence

from flashvl.errors import DataError
from flashvl.eval.tasks.prompts import SHORT
from flashvl.eval.tasks.task import Marked, group_by, percent, percent_whole
from flashvl.eval.tasks.tsv import Fields
from flashvl.eval.tasks.yes_no import YesNo

SET, FIGURE, QUESTION = 3, 4, 5
"""Places of the numbers in an index that is split at its underscores."""


class HallusionBench(YesNo):
    name = "hallusionbench"
    title = "HallusionBench"
    file = "HallusionBench"
    needed = ("index", "question", "answer", "l2-category")

    def check(self, fields: Fields) -> None:
        super().check(fields)
        if len(fields["index"].split("_")) <= QUESTION:
            raise DataError(
                f"index {fields['index']!r} lacks the numbers of set, figure and question; write"
                " them after its third underscore"
            )

    def prompt(self, fields: Fields) -> str:
        return f"{fields['question']} Please answer yes or no. {SHORT.strip()}"

    def figures(self, marked: Sequence[Marked]) -> dict[str, float]:
        accuracies = {
            "aAcc": percent(marked),
            "fAcc": percent_whole(group_by(marked, lambda fields: _key(fields, FIGURE)).values()),
            "qAcc": percent_whole(group_by(marked, lambda fields: _key(fields, QUESTION)).values()),
        }
        return {"mean": sum(accuracies.values()) / len(accuracies), **accuracies}


def _key(fields: Fields, place: int) -> str:
    numbers = fields["index"].split("_")
    return f"{fields['l2-category']}_{numbers[SET]}_{numbers[place]}"
