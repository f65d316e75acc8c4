"""MM-Vet: open questions, whose answers a judge gives marks from 0 to 1.

In a reference, `<OR>` parts answers any of which is right, and `<AND>` parts what an answer must
have. Without a judge only exact matches count: answers that consist of the parts of an alternative,
whatever their case and order. That is far below what a judge gives, and says so in every score.
"""

import re
from collections.abc import Sequence

from flashvl.data.answers import final_answer
from flashvl.eval.tasks.prompts import REASON
from flashvl.eval.tasks.task import JudgedTask, Marked, Verdict, percent
from flashvl.eval.tasks.tsv import Fields

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
_CONNECTING = {"and", "or"}


class MMVet(JudgedTask):
    name = "mmvet"
    title = "MMVet"
    file = "MMVet"
    figure_name = "mean"
    rule = "exact match of the reference's parts"

    def prompt(self, fields: Fields) -> str:
        return fields["question"] + REASON

    def verdict(self, fields: Fields, answer: str) -> Verdict:
        said = final_answer(answer)
        is_same = any(_consists_of(said, each) for each in fields["answer"].split("<OR>"))
        return Verdict(mark=is_same, extracted=said, by="rule" if is_same else "nobody")

    def question(self, fields: Fields, answer: str) -> str:
        return (
            "Give a mark to an answer by comparing it with the reference: 0.0 if it is all wrong,"
            " 1.0 if it is all right, and tenths between for answers that are right in part. <AND>"
            " in a reference joins parts that must all be in the answer; <OR> joins parts of which"
            f" one is enough.\n\nQuestion: {fields['question']}\nReference: {fields['answer']}"
            f"\nAnswer: {answer}\n\nReply with the mark alone:"
        )

    def judged(self, fields: Fields, answer: str, reply: str) -> Verdict:
        try:
            mark = float(reply)
        except ValueError:
            mark = -1.0
        return Verdict(mark=mark if 0 <= mark <= 1 else 0, extracted=answer, by="judge")

    def details(self, marked: Sequence[Marked]) -> dict[str, float]:
        found = {}
        for name in CAPABILITIES:
            if those := [each for each in marked if name in each.fields.get("category", "")]:
                found[name] = percent(those)
        return found


def _consists_of(answer: str, alternative: str) -> bool:
    """Whether an answer is the parts of an alternative, and nothing else but signs between them."""
    rest = f" {' '.join(answer.lower().split())} "
    parts = sorted((part.strip().lower() for part in alternative.split("<AND>")), key=len)
    for part in reversed(parts):
        found = re.search(rf"(?<!\w){re.escape(' '.join(part.split()))}(?!\w)", rest)
        if not part or found is None:
            return False
        rest = rest[: found.start()] + " " + rest[found.end() :]
    return set(re.findall(r"[^\s.,;:]+", rest)) <= _CONNECTING
