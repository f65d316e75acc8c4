"""Packing: every row in one micro-batch, none above the budget, as many for each worker."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvl.train.feed.packing import pack

BUDGET = 100
ROWS = st.lists(st.tuples(st.integers(1, BUDGET), st.floats(0.1, 1e6)), max_size=40)
WORKERS = st.integers(1, 6)


def packed(rows: list[tuple[int, float]], num_workers: int) -> list[list[list[int]]]:
    return pack([length for length, _ in rows], [cost for _, cost in rows], num_workers, BUDGET)


@given(rows=ROWS, num_workers=WORKERS)
def test_every_row_is_in_one_micro_batch(rows: list[tuple[int, float]], num_workers: int) -> None:
    found = chain.from_iterable(chain.from_iterable(packed(rows, num_workers)))
    assert sorted(found) == list(range(len(rows)))


@given(rows=ROWS, num_workers=WORKERS)
def test_no_micro_batch_is_above_the_budget(
    rows: list[tuple[int, float]], num_workers: int
) -> None:
    for micro_batch in chain.from_iterable(packed(rows, num_workers)):
        assert sum(rows[place][0] for place in micro_batch) <= BUDGET


@given(rows=ROWS, num_workers=WORKERS)
def test_workers_have_equally_many_micro_batches(
    rows: list[tuple[int, float]], num_workers: int
) -> None:
    counts = {len(bins) for bins in packed(rows, num_workers)}
    assert len(counts) == 1
    total = sum(length for length, _ in rows)
    fewest = max(1, -(-total // (BUDGET * num_workers)))
    # Best fit, decreasing, takes at most 11/9 of the fewest bins and 6/9 more (Dosa, 2007).
    most = -(-(11 * fewest * num_workers * 2 / 9 + 6 / 9) // num_workers)
    assert fewest <= counts.pop() <= max(most, 1)


@given(rows=ROWS, num_workers=WORKERS, seed=st.integers(0, 99))
def test_the_order_of_the_rows_does_not_matter(
    rows: list[tuple[int, float]], num_workers: int, seed: int
) -> None:
    shuffled = [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]

    def contents(rows: list[tuple[int, float]]) -> list[list[list[tuple[int, float]]]]:
        bins = packed(rows, num_workers)
        return [[sorted(rows[place] for place in micro) for micro in each] for each in bins]

    assert contents(rows) == contents(shuffled)


def test_no_rows_are_an_empty_micro_batch_each() -> None:
    assert packed([], 3) == [[[]], [[]], [[]]]


def test_a_row_above_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="101 tokens, more than token_budget=100"):
        packed([(101, 1.0)], 1)


def ragged(count: int, seed: int) -> tuple[list[int], list[float]]:
    """Lengths like those of captions, dialogues and long texts, with a cost that is not linear."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(5.5, 0.9, count), 20, 3000).astype(int)
    return lengths.tolist(), (lengths * (1 + lengths / 4000)).tolist()


@pytest.mark.parametrize("num_workers", [1, 8, 40])
def test_the_budget_is_filled_and_the_work_balanced(num_workers: int) -> None:
    lengths, costs = ragged(240 * num_workers, seed=num_workers)
    bins = pack(lengths, costs, num_workers, 4096)
    num_micro_batches = len(bins[0]) * num_workers
    assert sum(lengths) / (num_micro_batches * 4096) >= 0.95
    work = np.array([[sum(costs[n] for n in micro) for micro in each] for each in bins])
    # Workers that wait for each other after each micro-batch lose what the others take longer.
    assert work.sum(axis=0).sum() / (work.max(axis=0).sum() * num_workers) >= 0.95
