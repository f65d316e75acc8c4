"""Asks the miniature's models held-out questions, each model once, and keeps what was right."""

import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flashvl.data import synthetic
from flashvl.data.synthetic import REASONING_TASKS, TASKS, PhotoScene, Task
from flashvl.engine import Engine
from flashvl.eval.miniature.designs import QuestionSet
from flashvl.eval.scenes import Item, ask, held_out_items
from flashvl.model.loading import hash_folder, resolve_checkpoint
from flashvl.progress import ShowProgress

LARGE_TASKS: tuple[Task, ...] = ("caption", "count", "read")
"""Tasks of large pictures: words and shapes."""
CUT, OFF, ON = "on a seam", "off the grid", "on the grid"
"""Where the things of a large picture lie: half a cell off the grid of visual tokens, where a seam
of the tiles cuts one of them or cuts none; or on that grid, where no seam can cut."""
PLACES = (CUT, OFF, ON)
Right = Mapping[str, tuple[bool, ...]]
"""Whether each answer of a group of questions is right."""
COLUMNS: dict[QuestionSet, dict[str, tuple[str, ...]]] = {
    "reading": {**{task: (task,) for task in TASKS}, "average": TASKS},
    "reasoning": {
        **{task: (task,) for task in REASONING_TASKS},
        "average": REASONING_TASKS,
        "reading": TASKS,
    },
    "large": {
        **{task: tuple(f"{task} {where}" for where in PLACES) for task in LARGE_TASKS},
        **{where: tuple(f"{task} {where}" for task in LARGE_TASKS) for where in PLACES},
        "average": tuple(f"{task} {where}" for task in LARGE_TASKS for where in PLACES),
    },
}
"""Columns of a table by set of questions: the groups over which each is a mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a model answered."""

    right: Right
    seconds: float
    """Time that asking took."""

    def of(self, column: str, questions: QuestionSet) -> tuple[bool, ...]:
        """The answers that count for a column of a table."""
        groups = COLUMNS[questions][column]
        return tuple(itertools.chain.from_iterable(self.right[group] for group in groups))


@dataclass(frozen=True, kw_only=True, slots=True)
class Examiner:
    """Asks models, and keeps the answers in a file."""

    file: Path
    items: int
    """Questions of each task and seed."""

    def examine(
        self, model: Path | str, questions: QuestionSet, seed: int, on_progress: ShowProgress
    ) -> Answers:
        """The answers of a model to a seed's questions, which are asked unless they were before."""
        known = json.loads(self.file.read_text()) if self.file.exists() else {}
        checkpoint = resolve_checkpoint(model)
        key = f"{hash_folder(checkpoint)}/{questions}/seed-{seed}/{self.items}"
        if key not in known:
            found = self._ask(model, questions, seed, on_progress)
            right = {
                group: "".join("01"[each] for each in marks) for group, marks in found.right.items()
            }
            known[key] = {"model": str(model), "seconds": found.seconds, "right": right}
            self.file.write_text(json.dumps(known, indent=1) + "\n")
        kept = known[key]
        return Answers(
            right={
                group: tuple(each == "1" for each in marks)
                for group, marks in kept["right"].items()
            },
            seconds=kept["seconds"],
        )

    def _ask(
        self, model: Path | str, questions: QuestionSet, seed: int, on_progress: ShowProgress
    ) -> Answers:
        began = time.monotonic()
        engine = Engine.from_pretrained(model)
        groups = dict(question_groups(questions, seed, self.items))
        right = {}
        for number, (group, items) in enumerate(groups.items(), 1):
            right[group] = tuple(ask(engine, items))
            on_progress(number, len(groups), group)
        return Answers(right=right, seconds=time.monotonic() - began)


def question_groups(
    questions: QuestionSet, seed: int, items: int
) -> Iterator[tuple[str, Iterator[Item]]]:
    """The groups of a set of questions; other seeds have other questions."""
    if questions == "large":
        for task in LARGE_TASKS:
            for where in PLACES:
                yield f"{task} {where}", large_items(task, items // 2, seed, where)
    else:
        tasks: tuple[Task, ...] = TASKS
        if questions == "reasoning":
            tasks = (*REASONING_TASKS, *TASKS)
        for each in tasks:
            yield each, held_out_items(each, items, seed)


def large_items(task: Task, count: int, seed: int, where: str) -> Iterator[Item]:
    """`count` questions about large pictures, none of which is drawn for training.

    Textures are left out, as every seam cuts them.
    """
    rng = random.Random(f"large/{task}/{seed}/{where}")
    found = 0
    for number in itertools.count():
        if found == count:
            return
        drawn = synthetic.sample("heldout", seed, number, (task,), is_large=True)
        if isinstance(drawn.scene, PhotoScene):
            continue
        picture = drawn.image()
        if place_of(drawn, picture) == where:
            turn = rng.choice(drawn.turns)
            yield Item(task=task, question=turn.question, answer=turn.answer, image=picture)
            found += 1


def place_of(drawn: synthetic.Sample, picture: Image.Image) -> str:
    """The one of `PLACES` in which the things of a large picture lie."""
    assert drawn.origin is not None
    if not any(begin % synthetic.CELL_SIDE for begin in drawn.origin):
        return ON
    return CUT if synthetic.is_cut(picture) else OFF
