"""Benchmarks whose questions have options, and the one rule by which an answer names an option.

The rule gives what VLMEvalKit's `can_infer` gives, so that figures can be compared:

1. The signs .()[],:;!*#{} count as spaces. If exactly one option's letter is a word of the answer,
   and is first among its last four words, that option is named. "A" counts as a letter even where
   it is an article.
2. If no letter is a word of the answer, but "Z" is, the answer names none of the options.
3. Otherwise, if exactly one option's text is in the answer, upper and lower case being equal, that
   option is named; but not if the answer is more than twice as long as all options together.

Everything else cannot be told. An answer in <answer>...</answer> is what stands there.
"""

from typing import ClassVar

from flashvl.data.answers import final_answer
from flashvl.eval.tasks.prompts import multiple_choice_prompt, options_of
from flashvl.eval.tasks.task import JudgedTask, Verdict
from flashvl.eval.tasks.tsv import Fields

NONE = "Z"
"""The letter for an answer that names none of the options."""
NUM_LAST_WORDS = 4

_SIGNS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def find_option(answer: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an answer names, or `NONE`; None: that cannot be told."""
    words = answer.translate(_SIGNS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - NUM_LAST_WORDS:
        return named[0]
    if not named and NONE in words:
        return NONE
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    said = answer.lower()
    found = [letter for letter, text in options.items() if text.lower() in said]
    return found[0] if len(found) == 1 else None


def ask_for_option(question: str, options: dict[str, str], answer: str) -> str:
    """What a judge is asked: which option an answer means."""
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return (
        "Somebody answered a multiple choice question in their own words. Which option do they"
        f" mean? Reply with its letter alone, or with {NONE} if the answer means none of them, is a"
        f" refusal, or could mean several.\n\nQuestion: {question}\n{lines}\n\nTheir answer:"
        f" {answer}\n\nLetter:"
    )


class MultipleChoice(JudgedTask):
    """A benchmark whose answers are letters of options."""

    rule: ClassVar[str] = "exact match of the option's letter or text"

    def options(self, fields: Fields) -> dict[str, str]:
        """The options between which an answer is told."""
        return options_of(fields)

    def right_option(self, fields: Fields) -> str:
        return fields["answer"]

    def prompt(self, fields: Fields) -> str:
        return multiple_choice_prompt(fields)

    def verdict(self, fields: Fields, answer: str) -> Verdict:
        found = find_option(final_answer(answer), self.options(fields))
        if found is None:
            return Verdict(mark=0, extracted=None, by="nobody")
        return Verdict(mark=found == self.right_option(fields), extracted=found, by="rule")

    def question(self, fields: Fields, answer: str) -> str:
        return ask_for_option(fields["question"], self.options(fields), answer)

    def judged(self, fields: Fields, answer: str, reply: str) -> Verdict:
        found = find_option(reply, self.options(fields))
        return Verdict(mark=found == self.right_option(fields), extracted=found, by="judge")
