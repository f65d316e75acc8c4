"""MathVerse, testmini: each problem in five versions, with ever more of it in the figure.

A judge compares the meaning of an answer with the reference, as in VLMEvalKit.
"""

from collections.abc import Sequence

from flashvl.eval.tasks.free_form import FreeForm
from flashvl.eval.tasks.task import Marked, Verdict, by_field, percent
from flashvl.eval.tasks.tsv import Fields


class MathVerse(FreeForm):
    name = "mathverse"
    title = "MathVerse"
    file = "MathVerse_MINI"

    def question(self, fields: Fields, answer: str) -> str:
        return (
            "Does this answer to a question of mathematics end in the reference, whatever its form?"
            " An option's letter must be the same letter, and an interval the same interval. Reply"
            " with 1 if it does, and with 0 if not.\n\nQuestion:"
            f" {fields.get('question_for_eval', fields['question'])}\nReference:"
            f" {fields['answer']}\nAnswer: {answer}\n\n1 or 0:"
        )

    def judged(self, fields: Fields, answer: str, reply: str) -> Verdict:
        return Verdict(mark=reply.strip() == "1", extracted=answer, by="judge")

    def details(self, marked: Sequence[Marked]) -> dict[str, float]:
        return by_field(marked, "problem_version", percent)
