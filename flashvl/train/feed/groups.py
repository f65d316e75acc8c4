"""Divides the completions of a step's prompts among the workers."""

import dataclasses
import json
from collections.abc import Sequence

from flashvl.train.feed.shares import Document


def share_groups(
    prompts: Sequence[Document], num_generations: int, num_workers: int
) -> list[list[Document]]:
    """The prompts of each worker, with the completions that it is to make of them.

    All completions of the step, prompt by prompt, are cut into runs of the same length, one for
    each worker: a worker has at most one completion more than another. A prompt whose completions
    several workers make is given to each of them, and counts as the first one's.

    Returns:
        For each worker its prompts, in whose `extra` are `first_completion` and `num_completions`.
    """
    total = len(prompts) * num_generations
    ends = [total * (rank + 1) // num_workers for rank in range(num_workers)]
    return [
        _run(prompts, num_generations, start, end)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _run(prompts: Sequence[Document], num_generations: int, start: int, end: int) -> list[Document]:
    """The prompts of the completions from `start` up to, not including, `end`."""
    own = []
    while start < end:
        number, first = divmod(start, num_generations)
        count = min(num_generations - first, end - start)
        extra = json.loads(prompts[number].extra)
        extra |= {"first_completion": first, "num_completions": count}
        own.append(
            dataclasses.replace(prompts[number], extra=json.dumps(extra), is_owned=first == 0)
        )
        start += count
    return own
