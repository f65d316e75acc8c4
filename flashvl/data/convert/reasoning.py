"""Distilled reasoning as JSON Lines: `input` is asked, and `content` is the answer.

`reasoning_content`, the longer thoughts of the model that was distilled, is not read: the paper
trains on `content` only.
"""

from flashvl.data.convert.conversations import as_text, build_question
from flashvl.data.convert.family import CONVERSATIONS_TABLE, Converted, Family, Record


def convert(record: Record) -> Converted:
    """
    Raises:
        DataError: the row has no question or no answer.
    """
    fields = record.fields
    question = as_text(fields.get("input"), "input")
    answer = as_text(fields.get("content"), "content")
    return build_question(question, answer, [], fields.get("repo_name"))


FAMILY = Family(
    table=CONVERSATIONS_TABLE,
    kinds=("json", "parquet"),
    needed=("input", "content"),
    used=("id", "repo_name"),
    convert=convert,
)
