"""Golden scores of the shipped models, from a run that is larger than a test may be.

After a shipped model or the scenes have changed on purpose, this writes tests/eval/golden.json
anew, in some minutes: python -m tests.support.golden
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashvl.data import synthetic
from flashvl.data.features import ask_about_image
from flashvl.engine import Engine, Request
from flashvl.eval.scenes import evaluate_scenes, held_out_items

FILE = Path(__file__).parents[1] / "eval" / "golden.json"
MODELS = ("tiny", "tiny-dynamic", "tiny-iss")
NUM_ITEMS = 600
"""Questions of a task from which its golden figure comes."""
NUM_ASKED = 40
"""Questions of a task that a test asks, the first ones of those."""
NUM_ANSWERS = 2
"""Questions of a task whose answers must stay the same letter by letter, the first ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """Right answers of a model to a task."""

    rights: int
    """Right answers among the `NUM_ITEMS`."""
    rights_asked: int
    """Right answers among the first `NUM_ASKED` of them."""

    def has_moved(self, rights: int) -> bool:
        """Whether so different a count among the first `NUM_ASKED` is another model's: the share
        has changed by more than chance moves that of all, and by more than one answer, which
        rounding may change on another machine."""
        low, high = wilson(self.rights, NUM_ITEMS)
        change = rights - self.rights_asked
        bound = high - self.rights / NUM_ITEMS if change > 0 else self.rights / NUM_ITEMS - low
        return abs(change) > max(bound * NUM_ASKED, 1)


def wilson(rights: int, items: int, z: float = 1.959964) -> tuple[float, float]:
    """Bounds of a share's 95 % confidence interval by Wilson's score method (E. B. Wilson,
    "Probable inference, the law of succession, and statistical inference", 1927)."""
    share, weight = rights / items, z * z / items
    middle = (share + weight / 2) / (1 + weight)
    reach = z / (1 + weight) * math.sqrt(share * (1 - share) / items + weight / (4 * items))
    return middle - reach, middle + reach


def load_engine(model: str | Path) -> Engine:
    """In float32, where answers depend neither on the machine nor on the batch."""
    return Engine.from_pretrained(model, "float32")


def count_rights(
    engine: Engine, items: int, tasks: Sequence[Any] = synthetic.TASKS
) -> dict[str, int]:
    """Right answers among the first questions of each task."""
    scores = evaluate_scenes(engine, items, tasks=tasks)
    return {task: round(score.exact_match * items) for task, score in scores.items()}


def first_answers(engine: Engine) -> list[str]:
    """Answers to the first questions of each task."""
    items = [item for task in synthetic.TASKS for item in held_out_items(task, NUM_ANSWERS)]
    requests = [
        Request(messages=ask_about_image(item.question), images=[item.image], max_new_tokens=48)
        for item in items
    ]
    return [completion.text for completion in engine.generate(requests)]


def read_golden(model: str) -> tuple[dict[str, Golden], list[str]]:
    """A model's golden figures by task, and its answers to the first questions."""
    found = json.loads(FILE.read_text())["models"][model]
    return {task: Golden(**each) for task, each in found["tasks"].items()}, found["answers"]


def _measure(model: str) -> dict[str, Any]:
    engine = load_engine(model)
    whole, first = count_rights(engine, NUM_ITEMS), count_rights(engine, NUM_ASKED)
    tasks = {task: asdict(Golden(rights=whole[task], rights_asked=first[task])) for task in whole}
    return {"tasks": tasks, "answers": first_answers(engine)}


if __name__ == "__main__":
    head = {"command": "python -m tests.support.golden", "items": NUM_ITEMS, "asked": NUM_ASKED}
    found = head | {"models": {model: _measure(model) for model in MODELS}}
    FILE.write_text(json.dumps(found, indent=2) + "\n")
