"""MME: two questions of yes or no about each image, in fourteen categories.

A category's figure is acc, the right answers, plus acc+, the images with two right answers, each in
percent; MME's is the sum over the categories, 2800 at most.
"""

from collections.abc import Sequence
from typing import Any

from flashvl.eval.tasks.prompts import SHORT
from flashvl.eval.tasks.task import (
    Marked,
    Ratios,
    Tally,
    by_field,
    group_by,
    percent,
    percent_whole,
)
from flashvl.eval.tasks.tsv import Fields
from flashvl.eval.tasks.yes_no import YesNo

REASONING = (
    "code_reasoning",
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
)
"""Categories of reasoning; all others are perception."""


class MME(YesNo):
    name = "mme"
    title = "MME"
    file = "MME"
    figure_name = "total"
    needed = ("question", "answer", "category", "image_path")

    def prompt(self, fields: Fields) -> str:
        return fields["question"] + " " + SHORT.strip()

    def unit(self, fields: Fields) -> str:
        return f"{fields['category']} {fields['image_path']}"

    def tally(self, unit: Sequence[Marked]) -> Tally:
        category = unit[0].fields["category"]
        rights = [each.is_right for each in unit]
        return {f"{category} acc": (sum(rights), len(rights)), f"{category} acc+": (all(rights), 1)}

    def combine(self, ratios: Ratios) -> Any:
        return 100 * ratios.sum(axis=-1)

    def details(self, marked: Sequence[Marked]) -> dict[str, float]:
        found = by_field(marked, "category", _category)
        reasoning = sum(found.get(name, 0) for name in REASONING)
        total = sum(found.values())
        return {"perception": total - reasoning, "reasoning": reasoning, **found}


def _category(marked: Sequence[Marked]) -> float:
    images = group_by(marked, lambda fields: fields["image_path"])
    return percent(marked) + percent_whole(images.values())
