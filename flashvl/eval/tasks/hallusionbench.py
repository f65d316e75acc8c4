"""HallusionBench: questions of yes or no, several about a figure, and each about several figures.

aAcc counts right answers, fAcc figures of which all answers are right, and qAcc questions of which
all answers are right; the paper's figure is their mean. A row's index ends in the numbers of its
set, figure and question.
"""

from collections.abc import Sequence

from flashvl.errors import DataError
from flashvl.eval.tasks.prompts import SHORT
from flashvl.eval.tasks.score import ratios_of, tally_units
from flashvl.eval.tasks.task import Marked, Tally, group_by
from flashvl.eval.tasks.tsv import Fields
from flashvl.eval.tasks.yes_no import YesNo

SET, FIGURE, QUESTION = 3, 4, 5
"""Places of the numbers in an index that is split at its underscores."""


class HallusionBench(YesNo):
    name = "hallusionbench"
    title = "HallusionBench"
    file = "HallusionBench"
    figure_name = "mean"
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

    def unit(self, fields: Fields) -> str:
        return f"{fields['l2-category']} {fields['index'].split('_')[SET]}"

    def tally(self, unit: Sequence[Marked]) -> Tally:
        rights = [each.is_right for each in unit]
        return {
            "aAcc": (sum(rights), len(rights)),
            "fAcc": _whole(unit, FIGURE),
            "qAcc": _whole(unit, QUESTION),
        }

    def details(self, marked: Sequence[Marked]) -> dict[str, float]:
        ratios = ratios_of(*tally_units(self, marked))
        return dict(zip(("aAcc", "fAcc", "qAcc"), (100 * ratios).tolist(), strict=True))


def _whole(unit: Sequence[Marked], place: int) -> tuple[float, float]:
    """Figures or questions of a set of which all answers are right, and all of them."""
    groups = group_by(unit, lambda fields: fields["index"].split("_")[place]).values()
    return sum(all(each.is_right for each in group) for group in groups), len(groups)
