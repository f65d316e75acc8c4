"""DynaMath: questions that are asked in ten variants each, with other numbers or figures.

The figure is the mean over all variants; `worst case` counts the questions all variants of which
are right. Answers are letters, numbers (right within 0.001) or texts (right if the reference
contains them, as in VLMEvalKit, but not if they are empty). An answer may be JSON with a `short
answer`.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from flashvl.data.answers import final_answer
from flashvl.eval.tasks.free_form import ask_for_answer
from flashvl.eval.tasks.prompts import SHORT
from flashvl.eval.tasks.task import (
    JudgedTask,
    Marked,
    Verdict,
    by_field,
    group_by,
    percent,
    percent_whole,
)
from flashvl.eval.tasks.tsv import Fields

LETTERS = "ABCDE"
TOLERANCE = 0.001
NUMBER, CHOICE = "float", "multiple choice"
"""Types of answers; all others are texts."""


class DynaMath(JudgedTask):
    name = "dynamath"
    title = "DynaMath"
    file = "DynaMath"
    figure_name = "average"
    needed = ("question", "answer", "answer_type", "qid")
    rule = "exact match of the letter, the number or the text"

    def prompt(self, fields: Fields) -> str:
        return fields["question"] + SHORT

    def verdict(self, fields: Fields, answer: str) -> Verdict:
        kind = fields["answer_type"]
        whole = _json_part(final_answer(answer))
        short = _short_answer(whole)
        said = None if short is None else _parse(short, kind)
        if said is None:
            said = _parse(whole, kind)
        if said is None:
            return Verdict(mark=0, extracted=None, by="nobody")
        return Verdict(mark=_is_same(said, fields), extracted=said, by="rule")

    def question(self, fields: Fields, answer: str) -> str:
        return ask_for_answer(fields["question"], answer)

    def judged(self, fields: Fields, answer: str, reply: str) -> Verdict:
        said = _parse(reply, fields["answer_type"])
        if said is None:
            # VLMEvalKit's last resort: the letter at the very beginning.
            begin = _json_part(answer)[:3].upper()
            is_letter = fields["answer_type"] == CHOICE and fields["answer"] in begin
            return Verdict(mark=is_letter, extracted=None, by="judge")
        return Verdict(mark=_is_same(said, fields), extracted=said, by="judge")

    def unit(self, fields: Fields) -> str:
        return fields["qid"]

    def details(self, marked: Sequence[Marked]) -> dict[str, float]:
        return {
            "worst case": percent_whole(group_by(marked, lambda fields: fields["qid"]).values()),
            **by_field(marked, "subject", percent),
            **by_field(marked, "knowledge_level", percent),
        }


def _json_part(text: str) -> str:
    """What is between the first and the last curly bracket, or the text; without backslashes."""
    begin, end = text.find("{"), text.rfind("}")
    part = text[begin : end + 1] if 0 <= begin < end else text
    return part.replace("\\", "")


def _short_answer(text: str) -> str | None:
    try:
        found: Any = json.loads(text, strict=False)
    except ValueError:
        return None
    short = found.get("short answer") if isinstance(found, dict) else None
    return None if short is None else str(short)


def _parse(text: str, kind: str) -> str | None:
    """The letter, the number or the text that an answer says; None: that cannot be told."""
    if kind == NUMBER:
        number = text if text.isdigit() else text.split(" ")[0]
        return None if _value(number) is None else number
    if kind == CHOICE:
        if len(text) == 1:
            return text.upper()
        found = [letter for letter in LETTERS if letter in text.upper()]
        return found[0] if len(found) == 1 else None
    return text


def _value(number: str) -> float | None:
    """The value of a number, perhaps of times pi."""
    digits, pi, _ = number.partition("\u03c0")
    try:
        return float(digits) * (math.pi if pi else 1)
    except ValueError:
        return None


def _is_same(said: str, fields: Fields) -> bool:
    answer = fields["answer"]
    if fields["answer_type"] == NUMBER:
        value, right = _value(said), _value(answer)
        return value is not None and right is not None and abs(value - right) <= TOLERANCE
    if fields["answer_type"] == CHOICE:
        return said == answer
    return bool(said.strip()) and said.lower() in answer.lower()
