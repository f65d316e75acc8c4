"""WeMath, testmini: problems of two or three steps, whose steps are asked by themselves as well.

The figure is the accuracy over all questions, which the paper's column fits (its figures are whole
numbers of 1740). `strict` and `loose` are the benchmark's own: of a problem whose steps and whole
are right, 1 (complete mastery); of right steps with a wrong whole, 1/2 (inadequate generalization);
of anything else, 0. Strict wants all steps to be right for mastery, loose one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flashvl.errors import DataError
from flashvl.eval.tasks.multiple_choice import MultipleChoice
from flashvl.eval.tasks.task import Marked, group_by, percent
from flashvl.eval.tasks.tsv import Fields


@dataclass(frozen=True, slots=True)
class Problem:
    """Whether the answers to a problem's steps, and to the whole problem, are right."""

    steps: list[bool]
    whole: bool


class WeMath(MultipleChoice):
    name = "wemath"
    title = "WeMath"
    file = "WeMath"
    needed = ("question", "answer", "key", "id")

    def check(self, fields: Fields) -> None:
        super().check(fields)
        steps, _, part = fields["key"].partition("steps_")
        if not steps.isdigit() or not (part == "multi" or part.isdigit()):
            raise DataError(f"key is {fields['key']!r}; write it as 2steps_1 or 2steps_multi")

    def unit(self, fields: Fields) -> str:
        return _problem_key(fields)

    def details(self, marked: Sequence[Marked]) -> dict[str, float]:
        problems = [_problem(group) for group in group_by(marked, _problem_key).values()]
        parts = group_by(marked, _part)
        return {
            "strict": _mastery(problems, is_strict=True),
            "loose": _mastery(problems, is_strict=False),
            **{part: percent(parts[part]) for part in sorted(parts)},
        }


def _problem_key(fields: Fields) -> str:
    return f"{fields['key'].partition('_')[0]} {fields['id']}"


def _part(fields: Fields) -> str:
    """The number of steps that a question takes."""
    steps, _, part = fields["key"].partition("steps_")
    return f"{steps} steps" if part == "multi" else "1 step"


def _problem(group: Sequence[Marked]) -> Problem:
    """A problem from its questions; one that is not there counts as wrong."""
    rights = {each.fields["key"].partition("_")[2]: each.is_right for each in group}
    num_steps = int(group[0].fields["key"].partition("steps_")[0])
    return Problem(
        steps=[rights.get(str(step), False) for step in range(1, num_steps + 1)],
        whole=rights.get("multi", False),
    )


def _mastery(problems: Sequence[Problem], *, is_strict: bool) -> float:
    total = 0.0
    for problem in problems:
        if problem.whole:
            total += all(problem.steps) if is_strict else any(problem.steps)
        elif all(problem.steps):
            total += 0.5
    return 100 * total / len(problems)
