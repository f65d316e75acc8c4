"""MathVista, testmini: mathematics in figures; answers are letters, integers, decimals, or texts.

A judge's copy of an answer is compared by its type, as in VLMEvalKit; texts, which VLMEvalKit never
finds right, are compared whatever their case.
"""

from collections.abc import Sequence

from flashvl.eval.tasks.free_form import FreeForm, listed_options
from flashvl.eval.tasks.task import Marked, by_field, percent
from flashvl.eval.tasks.tsv import Fields

MULTIPLE_CHOICE = "multi_choice"


class MathVista(FreeForm):
    name = "mathvista"
    title = "MathVista"
    file = "MathVista_MINI"
    needed = ("question", "answer", "question_type", "answer_type")

    def check(self, fields: Fields) -> None:
        super().check(fields)
        self.options(fields)

    def prompt(self, fields: Fields) -> str:
        return fields["question"]

    def options(self, fields: Fields) -> dict[str, str]:
        return listed_options(fields) if fields["question_type"] == MULTIPLE_CHOICE else {}

    def right_option(self, fields: Fields) -> str:
        return fields["answer_option"]

    def is_same(self, fields: Fields, copied: str) -> bool:
        number = {"integer": int, "float": float}.get(fields["answer_type"])
        if number is None:
            return copied.casefold() == fields["answer"].strip().casefold()
        try:
            return number(copied) == number(fields["answer"])
        except ValueError:
            return False

    def details(self, marked: Sequence[Marked]) -> dict[str, float]:
        return by_field(marked, "task", percent)
