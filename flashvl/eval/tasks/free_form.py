"""Benchmarks of mathematics, whose answers are numbers, formulas or letters in free text.

An answer is right by `flashvl.data.answers.is_right`, that is, by math-verify. An answer that this
does not find right is shown to a judge, if there is one, who only copies out what it says in the
end; the copy is compared by a rule again.
"""

import string
from typing import ClassVar

from flashvl.data.answers import final_answer, is_right
from flashvl.errors import DataError
from flashvl.eval.tasks.multiple_choice import ask_for_option, find_option
from flashvl.eval.tasks.prompts import SHORT
from flashvl.eval.tasks.task import JudgedTask, Verdict
from flashvl.eval.tasks.tsv import Fields, read_list


def ask_for_answer(question: str, answer: str) -> str:
    """What a judge is asked: the final answer alone."""
    return (
        "Somebody worked out an answer to a question. Copy the final answer that they arrive at:"
        " the number, letter, formula or list alone, without words or units, in the form that the"
        " question asks for. Reply with None if there is none.\n\nQuestion:"
        f" {question}\n\nWhat they wrote: {answer}\n\nFinal answer:"
    )


class FreeForm(JudgedTask):
    """A benchmark of mathematics."""

    rule: ClassVar[str] = "exact match by math-verify, or of the option's letter or text"

    def prompt(self, fields: Fields) -> str:
        return fields["question"] + SHORT

    def options(self, fields: Fields) -> dict[str, str]:
        """The options of a question that has some, by their letters."""
        return {}

    def right_option(self, fields: Fields) -> str:
        """The letter of the right one of a question's options."""
        return fields["answer"]

    def is_same(self, fields: Fields, copied: str) -> bool:
        """Whether a judge's copy of an answer is the right answer."""
        return is_right(copied, fields["answer"])

    def verdict(self, fields: Fields, answer: str) -> Verdict:
        said = final_answer(answer)
        if options := self.options(fields):
            found = find_option(said, options)
            if found is not None:
                return Verdict(mark=found == self.right_option(fields), extracted=found, by="rule")
        elif is_right(said, fields["answer"]):
            return Verdict(mark=1, extracted=said, by="rule")
        return Verdict(mark=0, extracted=None, by="nobody")

    def question(self, fields: Fields, answer: str) -> str:
        if options := self.options(fields):
            return ask_for_option(fields["question"], options, answer)
        return ask_for_answer(fields["question"], answer)

    def judged(self, fields: Fields, answer: str, reply: str) -> Verdict:
        if options := self.options(fields):
            found = find_option(reply, options)
            return Verdict(mark=found == self.right_option(fields), extracted=found, by="judge")
        copied = reply.strip()
        return Verdict(mark=self.is_same(fields, copied), extracted=copied, by="judge")


def listed_options(fields: Fields) -> dict[str, str]:
    """Options by their letters, from a list in the column `choices`.

    Raises:
        DataError: the cell is not a list, or has more values than there are letters.
    """
    choices = read_list(fields.get("choices", "[]"))
    if len(choices) > len(string.ascii_uppercase):
        raise DataError(f"row has {len(choices)} choices; give at most 26")
    return dict(zip(string.ascii_uppercase, choices, strict=False))
