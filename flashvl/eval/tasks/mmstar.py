"""MMStar: questions that cannot be answered without their image."""

from collections.abc import Sequence

from flashvl.eval.tasks.multiple_choice import MultipleChoice
from flashvl.eval.tasks.task import Marked, by_field, percent


class MMStar(MultipleChoice):
    name = "mmstar"
    title = "MMStar"
    file = "MMStar"

    def details(self, marked: Sequence[Marked]) -> dict[str, float]:
        return {
            **by_field(marked, "category", percent),
            **by_field(marked, "l2_category", percent),
        }
