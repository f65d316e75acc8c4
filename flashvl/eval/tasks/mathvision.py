"""MathVision: problems of mathematical competitions; answers are letters of `choices`, or free."""

from flashvl.eval.tasks.free_form import FreeForm, listed_options
from flashvl.eval.tasks.tsv import Fields


class MathVision(FreeForm):
    name = "mathvision"
    title = "MathVision"
    file = "MathVision"

    def check(self, fields: Fields) -> None:
        super().check(fields)
        self.options(fields)

    def prompt(self, fields: Fields) -> str:
        return fields["question"]

    def options(self, fields: Fields) -> dict[str, str]:
        return listed_options(fields)
