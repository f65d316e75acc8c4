"""Exact match on held-out scenes of the procedural world, by task.

flashvl eval scenes --model tiny --json scores.json
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from flashvl.data import synthetic
from flashvl.data.answers import final_answer, is_exact
from flashvl.data.features import ask_about_image
from flashvl.engine import Engine, Request
from flashvl.errors import ConfigError
from flashvl.progress import ShowProgress, ignore_progress

BATCH_SIZE = 50
"""Questions that the engine gets at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A question about a picture, and its true answer."""

    task: synthetic.Task
    question: str
    answer: str
    image: Image.Image


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """The score of one task."""

    items: int
    """Questions that were asked."""
    exact_match: float
    """Share of the answers that equal the true one letter by letter; of a worked answer, what
    stands in its tags counts."""


def held_out_items(task: synthetic.Task, count: int, seed: int = 0) -> Iterator[Item]:
    """`count` questions of `task`, each about a scene that is never drawn for training."""
    rng = random.Random(f"{task}/{seed}")
    for drawn in synthetic.samples("heldout", seed, count, tasks=(task,)):
        turn = rng.choice(drawn.turns)
        yield Item(task=task, question=turn.question, answer=turn.answer, image=drawn.image())


def evaluate_scenes(
    engine: Engine,
    items_per_task: int = 120,
    on_progress: ShowProgress = ignore_progress,
    tasks: Sequence[synthetic.Task] = synthetic.TASKS,
) -> dict[synthetic.Task, TaskScore]:
    """Ask `engine` `items_per_task` held-out questions of each of `tasks`."""
    scores = {}
    done, total = 0, items_per_task * len(tasks)
    for task in tasks:
        correct = 0
        answers = enumerate(ask(engine, held_out_items(task, items_per_task)), 1)
        for number, is_right in answers:
            correct += is_right
            done += 1
            if number % BATCH_SIZE == 0 or number == items_per_task:
                on_progress(done, total, task)
        scores[task] = TaskScore(items=items_per_task, exact_match=correct / items_per_task)
    return scores


def ask(engine: Engine, items: Iterable[Item]) -> Iterator[bool]:
    """Whether the engine's answer to each question is right."""
    items = iter(items)
    while batch := list(itertools.islice(items, BATCH_SIZE)):
        completions = engine.generate([_request(item) for item in batch])
        for completion, item in zip(completions, batch, strict=True):
            yield _is_right(completion.text, item)


def _is_right(text: str, item: Item) -> bool:
    """Whether the answer is the true one; that of a problem may follow its solution, in tags."""
    is_problem = item.task in synthetic.REASONING_TASKS
    return is_exact(final_answer(text) if is_problem else text, item.answer)


def find_tasks(names: Sequence[str]) -> tuple[synthetic.Task, ...]:
    """The tasks of these names; all reading tasks if there are none.

    Raises:
        ConfigError: no task has one of the names.
    """
    known: dict[str, synthetic.Task] = {
        task: task for task in (*synthetic.TASKS, *synthetic.REASONING_TASKS)
    }
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"task {unknown[0]} must be one of {', '.join(known)}")
    return tuple(known[name] for name in names) or synthetic.TASKS


def average(scores: dict[synthetic.Task, TaskScore]) -> float:
    """The mean exact match over the tasks."""
    return sum(score.exact_match for score in scores.values()) / len(scores)


def _request(item: Item) -> Request:
    messages = ask_about_image(item.question)
    return Request(messages=messages, images=[item.image], max_new_tokens=48)
