"""The prompts with which the released Flash-VL was scored, word for word.

Images come before the text, in which a question's own `<image 1>` stays as it is.
"""

import re
import string

from flashvl.eval.tasks.tsv import Fields

LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
DIRECTLY = "\nAnswer the question directly."
DIRECTLY_CN = "\n\u8bf7\u76f4\u63a5\u56de\u7b54\u95ee\u9898\u3002"
SHORT = "\nAnswer the question using a single word or phrase."
REASON = " Anylyze the reason for the answer."
"""The spelling is the released model's."""

HAN = re.compile(r"[\u4e00-\u9fff]")


def options_of(fields: Fields) -> dict[str, str]:
    """The options of a row by their letters; empty: its answer is free."""
    return {letter: fields[letter] for letter in string.ascii_uppercase if letter in fields}


def multiple_choice_prompt(fields: Fields) -> str:
    """A question with its hint and its options, in Chinese if any of them is."""
    options = options_of(fields)
    parts = [fields["hint"]] if "hint" in fields else []
    parts.append(fields["question"])
    parts += [f"{letter}. {text}" for letter, text in options.items()]
    prompt = "\n".join(parts)
    if HAN.search(prompt):
        return prompt + (LETTER_CN if options else DIRECTLY_CN)
    return prompt + (LETTER if options else DIRECTLY)
