"""OCRBench: text to read, in a thousand images of ten kinds.

An answer is right if any of the listed answers is in it, upper and lower case and line breaks being
equal; for handwritten formulas, spaces do not count and cases differ. The figure is out of 1000.
"""

from typing import Any

from flashvl.data.answers import final_answer
from flashvl.eval.tasks.prompts import REASON
from flashvl.eval.tasks.task import Ratios, Task, Verdict
from flashvl.eval.tasks.tsv import Fields, read_list

FORMULAS = "Handwritten Mathematical Expression Recognition"


class OCRBench(Task):
    name = "ocrbench"
    title = "OCRBench"
    file = "OCRBench"
    figure_name = "score"
    needed = ("question", "answer", "category")
    rule = "containment of a listed answer"

    def check(self, fields: Fields) -> None:
        super().check(fields)
        read_list(fields["answer"])

    def prompt(self, fields: Fields) -> str:
        return fields["question"] + REASON

    def verdict(self, fields: Fields, answer: str) -> Verdict:
        said = final_answer(answer)
        plain = _without_spaces if fields["category"] == FORMULAS else _lower
        found = [each for each in read_list(fields["answer"]) if plain(each) in plain(said)]
        return Verdict(mark=bool(found), extracted=found[0] if found else said, by="rule")

    def combine(self, ratios: Ratios) -> Any:
        return 1000 * ratios.mean(axis=-1)


def _lower(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
