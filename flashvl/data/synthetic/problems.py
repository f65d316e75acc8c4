"""Problems: questions whose answer takes steps beyond what the picture shows.

Each has a solution in words: the steps, of two numbers each, that lead to the answer.
"""

import itertools
import random
import zlib

from flashvl.data.synthetic.scenes import (
    COLORS,
    GRID,
    MAX_SIDE,
    ChartScene,
    ReasoningTask,
    RectangleScene,
    Scene,
    TextScene,
    Turn,
    chart_scene,
    start_of,
)

REASONING_TASKS: tuple[ReasoningTask, ...] = ("sum", "total", "difference", "area", "perimeter")
"""Tasks of problems; the shipped models were not trained on them."""
QUESTIONS: dict[ReasoningTask, str] = {
    "sum": "What is the sum of the digits?",
    "total": "What is the total of the bars?",
    "difference": "What is the tallest bar minus the shortest?",
    "area": "What is the area of the rectangle?",
    "perimeter": "What is the perimeter of the rectangle?",
}


def problem_scene(task: ReasoningTask, rng: random.Random) -> Scene:
    """A scene that a problem of `task` can be about."""
    if task == "sum":
        digits = "".join(rng.choices("0123456789", k=3))
        return TextScene("board", digits, start_of(3, rng), rng.choice(list(COLORS)))
    if task in ("total", "difference"):
        return chart_scene(rng)
    corner = (rng.randrange(GRID - 1), rng.randrange(GRID - 1))
    width, height = rng.randint(2, MAX_SIDE), rng.randint(2, MAX_SIDE)
    return RectangleScene(width, height, corner, rng.choice(list(COLORS)))


def numbers_of(scene: Scene) -> tuple[int, ...]:
    """The numbers that a problem's answer follows from, in the order in which they stand."""
    match scene:
        case TextScene(text=text):
            return tuple(map(int, text))
        case ChartScene(bars=bars):
            return tuple(value for _, value in bars)
        case RectangleScene(width=width, height=height):
            return width, height
    raise AssertionError(f"no problem is about {scene}")


def hash_problem(scene: Scene) -> int:
    """A hash by which a problem is held out.

    For digits and bars it is of the numbers alone, so that those of a held-out problem are in no
    training problem. A rectangle's two numbers recur at other places and in other colours, as a
    product cannot be inferred from others.
    """
    is_rectangle = isinstance(scene, RectangleScene)
    return zlib.crc32(repr(scene if is_rectangle else numbers_of(scene)).encode())


def ask(task: ReasoningTask, scene: Scene) -> Turn:
    """The problem of `task` about `scene`."""
    numbers = numbers_of(scene)
    match task:
        case "area":
            width, height = numbers
            answer = width * height
            steps = [f"{width}*{height}={answer}"]
        case "perimeter":
            half = sum(numbers)
            answer = 2 * half
            steps = [f"{numbers[0]}+{numbers[1]}={half}", f"{half}+{half}={answer}"]
        case "difference":
            answer = max(numbers) - min(numbers)
            steps = [f"{max(numbers)}-{min(numbers)}={answer}"]
        case _:
            sums = list(itertools.accumulate(numbers))
            answer = sums[-1]
            steps = [
                f"{before}+{number}={after}"
                for before, number, after in zip(sums, numbers[1:], sums[1:], strict=False)
            ]
    return Turn(task, QUESTIONS[task], str(answer), solution=", ".join(steps))
