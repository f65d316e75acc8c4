"""Benchmarks' files in the layout of VLMEvalKit, written by pandas as VLMEvalKit's are."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from flashvl.data.storage import locate
from flashvl.eval.tasks.task import NO_ANSWER, DeadLetter, Item, Marked, Task, read_items
from flashvl.eval.tasks.tsv import open_table


def picture(color: str) -> bytes:
    """A PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (16, 12), color).save(file, "PNG")
    return file.getvalue()


def encoded(color: str) -> str:
    return base64.b64encode(picture(color)).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A table whose columns are those of any row; cells that a row lacks are empty."""
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return path


def items_of(task: Task, path: Path) -> tuple[list[Item], list[DeadLetter]]:
    found = list(read_items(task, open_table(locate(str(path)))))
    items = [each for each in found if isinstance(each, Item)]
    return items, [each for each in found if isinstance(each, DeadLetter)]


def mark_by_rule(task: Task, items: Iterable[Item], answers: Iterable[str | None]) -> list[Marked]:
    """The rule's verdicts; an answer of None is one that the model failed to give."""
    return [
        Marked(
            fields=item.fields,
            verdict=NO_ANSWER if answer is None else task.verdict(item.fields, answer),
        )
        for item, answer in zip(items, answers, strict=True)
    ]
