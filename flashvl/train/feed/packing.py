"""Packs the rows of a step into micro-batches, the same number for each worker.

A micro-batch is filled with whole rows up to a budget of tokens. Workers wait for each other, so
micro-batches that are computed at the same time are to take the same time.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bins = list[list[int]]
"""For each micro-batch, the places of its rows in the step."""


def pack(
    lengths: Sequence[int], costs: Sequence[float], num_workers: int, token_budget: int
) -> list[Bins]:
    """The micro-batches of each worker, as few as possible, some perhaps empty.

    Args:
        lengths: tokens of each row, none above `token_budget`.
        costs: what computing each row takes, in any unit.

    Returns:
        For each worker its micro-batches; all have the same number of them, at least one. What is
        packed together does not depend on the order of the rows, apart from rows that are alike.
    """
    tokens, work = np.asarray(lengths, np.int64), np.asarray(costs, np.float64)
    if tokens.max(initial=0) > token_budget:
        raise ValueError(f"a row has {tokens.max()} tokens, more than token_budget={token_budget}")
    fewest = max(1, -(-int(tokens.sum()) // (token_budget * num_workers)))
    for num_rounds in itertools.count(fewest):
        num_bins = num_rounds * num_workers
        bins = _spread(tokens, work, num_bins, token_budget)
        if bins is None:
            bins = _fit(tokens, work, num_bins, token_budget)
        if bins is not None:
            return _deal(bins, work, num_workers)
    raise AssertionError  # a bin for each row always suffices


def _spread(
    tokens: npt.NDArray[np.int64], work: npt.NDArray[np.float64], num_bins: int, token_budget: int
) -> Bins | None:
    """Each row, the most work first, goes where the least work is, of the bins with room for it."""
    bins: Bins = [[] for _ in range(num_bins)]
    free, load = np.full(num_bins, token_budget), np.zeros(num_bins)
    for row in np.lexsort((-tokens, -work)).tolist():
        chosen = int(np.where(free >= tokens[row], load, np.inf).argmin())
        if free[chosen] < tokens[row]:
            return None
        bins[chosen].append(row)
        free[chosen] -= tokens[row]
        load[chosen] += work[row]
    return bins


def _fit(
    tokens: npt.NDArray[np.int64], work: npt.NDArray[np.float64], num_bins: int, token_budget: int
) -> Bins | None:
    """Each row, the longest first, goes where it leaves the least room (best fit, decreasing)."""
    bins: Bins = [[] for _ in range(num_bins)]
    free = np.full(num_bins, token_budget)
    for row in np.lexsort((-work, -tokens)).tolist():
        left = free - tokens[row]
        chosen = int(np.where(left >= 0, left, token_budget + 1).argmin())
        if left[chosen] < 0:
            return None
        bins[chosen].append(row)
        free[chosen] -= tokens[row]
    return bins


def _deal(bins: Bins, work: npt.NDArray[np.float64], num_workers: int) -> list[Bins]:
    """Bins of similar work are computed at the same time, the most work by who had the least."""
    load = [float(work[rows].sum()) for rows in bins]
    by_load = sorted(range(len(bins)), key=lambda n: -load[n])
    dealt: list[Bins] = [[] for _ in range(num_workers)]
    total = [0.0] * num_workers
    for turn in range(0, len(bins), num_workers):
        workers = sorted(range(num_workers), key=total.__getitem__)
        for worker, number in zip(workers, by_load[turn : turn + num_workers], strict=True):
            dealt[worker].append(bins[number])
            total[worker] += load[number]
    return dealt
