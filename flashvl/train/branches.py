"""Documents with branches: a prompt once, followed by several continuations of it.

A branch sees the prompt and its own tokens, not those of other branches, and its positions continue
those of the prompt. So a branch has the log-probabilities of the same continuation alone after the
same prompt, while the prompt and its images are computed once. A document without branches is a
prompt alone.
"""

import numpy as np
import numpy.typing as npt

from flashvl.train.feed.shares import MicroBatch

Int64s = npt.NDArray[np.int64]


def list_parts(micro_batch: MicroBatch) -> tuple[Int64s, Int64s]:
    """Lengths of the parts of all documents, and the number of parts of each document.

    The parts of a document are its prompt and its branches, in the order of their tokens.
    """
    num_parts = micro_batch.num_branches.astype(np.int64) + 1
    is_prompt = np.zeros(int(num_parts.sum()), bool)
    is_prompt[_starts(num_parts)] = True
    parts = np.empty(len(is_prompt), np.int64)
    parts[~is_prompt] = micro_batch.branches
    parts[is_prompt] = micro_batch.lengths - _sum_branches(micro_batch)
    return parts, num_parts


def place_tokens(micro_batch: MicroBatch) -> Int64s:
    """(tokens,): position of each token; those of a branch continue those of its prompt."""
    parts, num_parts = list_parts(micro_batch)
    prompts = np.repeat(parts[_starts(num_parts)], num_parts)
    origins = np.where(_are_prompts(num_parts), 0, prompts)
    within = np.arange(int(parts.sum())) - np.repeat(_starts(parts), parts)
    return within + np.repeat(origins, parts)


def find_predictors(micro_batch: MicroBatch) -> Int64s:
    """(tokens,): place of the token whose logits predict each token; -1 for a document's first.

    The first token of each branch is predicted by the last one of the prompt.
    """
    parts, num_parts = list_parts(micro_batch)
    predictors = np.arange(-1, int(parts.sum()) - 1)
    starts, are_prompts = _starts(parts), _are_prompts(num_parts)
    ends_of_prompts = np.repeat((starts + parts)[are_prompts], num_parts)
    first = np.where(are_prompts, -1, ends_of_prompts - 1)
    has_tokens = parts > 0  # the start of an empty part is that of the next
    predictors[starts[has_tokens]] = first[has_tokens]
    return predictors


def number_documents(micro_batch: MicroBatch) -> Int64s:
    """(tokens,): number of the document of each token."""
    return np.repeat(np.arange(len(micro_batch.lengths)), micro_batch.lengths)


def number_branches(micro_batch: MicroBatch) -> Int64s:
    """(tokens,): number of the branch of each token among all branches; -1 in prompts."""
    parts, num_parts = list_parts(micro_batch)
    are_prompts = _are_prompts(num_parts)
    numbers = np.where(are_prompts, -1, np.cumsum(~are_prompts) - 1)
    return np.repeat(numbers, parts)


def _starts(lengths: Int64s) -> Int64s:
    return np.cumsum(lengths) - lengths


def _are_prompts(num_parts: Int64s) -> npt.NDArray[np.bool_]:
    """(parts,): whether each part is a prompt."""
    found = np.zeros(int(num_parts.sum()), bool)
    found[_starts(num_parts)] = True
    return found


def _sum_branches(micro_batch: MicroBatch) -> Int64s:
    """(documents,): tokens of the branches of each."""
    ends = np.concatenate([[0], np.cumsum(micro_batch.branches, dtype=np.int64)])
    last = np.cumsum(micro_batch.num_branches)
    return ends[last] - ends[last - micro_batch.num_branches]
