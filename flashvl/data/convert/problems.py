"""Problems with answers that can be checked, as multimodal-open-r1: `image, problem, solution`.

A solution is `<think>...</think> <answer>...</answer>`; only what is in `<answer>` is kept. Each
problem ends with the instruction to answer in that form, which the reward `format` asks for.
"""

import re

from flashvl.data.convert.conversations import as_images, as_text, check_places, with_places
from flashvl.data.convert.family import PROMPTS_TABLE, Converted, Family, Record
from flashvl.errors import DataError

ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
"""An answer, which may have several lines."""
INSTRUCTION = (
    "Write the reasoning in <think> </think>, and after it the final answer alone in <answer>"
    " </answer>."
)
"""Last line of each problem."""


def convert(record: Record) -> Converted:
    """
    Raises:
        DataError: the row has no problem, no image, or no answer.
    """
    fields = record.fields
    images = as_images(fields.get("image"))
    if not images:
        raise DataError("row has no image; give it one")
    problem = as_text(fields.get("problem"), "problem")
    found = ANSWER.findall(as_text(fields.get("solution"), "solution"))
    if not found or not found[-1].strip():
        raise DataError("solution has no <answer>...</answer>; there is nothing to compare with")
    if not problem.strip():
        raise DataError("problem is empty; leave the row out")
    question = f"{problem.rstrip()}\n{INSTRUCTION}"
    prompt = [{"role": "user", "content": with_places(question, len(images))}]
    check_places(prompt, len(images))
    return {"prompt": prompt, "answer": found[-1].strip(), "images": images, "source": None}


FAMILY = Family(
    table=PROMPTS_TABLE,
    kinds=("parquet", "json"),
    needed=("problem", "solution"),
    used=("id", "image"),
    convert=convert,
)
