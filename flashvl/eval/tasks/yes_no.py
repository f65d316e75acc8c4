"""Benchmarks whose questions are answered by yes or no, and the rule by which an answer says so.

The rule gives what VLMEvalKit gives, so that figures can be compared: an answer says yes if the
word "yes" is in it and the word "no" is not, and the reverse. Signs are taken out as in the
evaluation of VQA (https://visualqa.org/evaluation.html), which leaves colons and asterisks at their
words.
"""

import re
from typing import ClassVar

from flashvl.data.answers import final_answer
from flashvl.eval.tasks.task import JudgedTask, Verdict
from flashvl.eval.tasks.tsv import Fields

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")


def find_yes_or_no(answer: str) -> str | None:
    """`Yes` or `No`, as an answer says; None: it says neither, or both."""
    said = answer.lower()
    bare = said
    for sign in _SIGNS:
        is_loose = f"{sign} " in said or f" {sign}" in said or _THOUSANDS.search(said)
        bare = bare.replace(sign, "" if is_loose else " ")
    words = _LONE_PERIOD.sub("", bare).split()
    found = [word for word in ("yes", "no") if word in words]
    return found[0].capitalize() if len(found) == 1 else None


class YesNo(JudgedTask):
    """A benchmark whose answers are `Yes` and `No`."""

    rule: ClassVar[str] = "exact match of the words yes and no"

    def verdict(self, fields: Fields, answer: str) -> Verdict:
        found = find_yes_or_no(final_answer(answer))
        if found is None:
            return Verdict(mark=0, extracted=None, by="nobody")
        return Verdict(mark=found == fields["answer"], extracted=found, by="rule")

    def question(self, fields: Fields, answer: str) -> str:
        return (
            "Somebody answered a question of yes or no in their own words. Do they mean yes or no?"
            " Reply with one word: Yes, No, or Unknown if it is neither.\n\nQuestion:"
            f" {fields['question']}\nTheir answer: {answer}\n\nYes, No or Unknown:"
        )

    def judged(self, fields: Fields, answer: str, reply: str) -> Verdict:
        found = find_yes_or_no(reply)
        return Verdict(mark=found == fields["answer"], extracted=found, by="judge")
