"""Order: every row once, a function of the seed alone, tables spread evenly, 16 bytes a row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvl.train.feed.order import WINDOW_ROWS, Order, keep_order, shuffle_tables

GROUPS = st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(any)
TABLES = st.lists(GROUPS, min_size=1, max_size=4)


def all_of(tables: list[list[int]], rows_per_step: int = 7, seed: int = 0) -> Order:
    return shuffle_tables(tables, list(map(sum, tables)), rows_per_step, seed)


def rows_of(order: Order) -> list[int]:
    return order.rows_of_steps(0, order.num_steps).tolist()


@given(tables=TABLES, rows_per_step=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_every_row_comes_once(tables: list[list[int]], rows_per_step: int, seed: int) -> None:
    order = all_of(tables, rows_per_step, seed)
    assert sorted(rows_of(order)) == list(range(sum(map(sum, tables))))
    sizes = [len(order.rows_of_steps(step, step + 1)) for step in range(order.num_steps)]
    assert set(sizes[:-1]) <= {rows_per_step}
    assert 0 < sizes[-1] <= rows_per_step


@given(tables=TABLES, rows_per_step=st.integers(1, 300), data=st.data())
def test_a_resume_reads_the_rest(
    tables: list[list[int]], rows_per_step: int, data: st.DataObject
) -> None:
    order = all_of(tables, rows_per_step)
    start = data.draw(st.integers(0, order.num_steps))
    stop = data.draw(st.integers(start, order.num_steps))
    parts = [order.rows_of_steps(*span) for span in ((0, start), (start, stop))]
    parts.append(order.rows_of_steps(stop, order.num_steps))
    assert np.concatenate(parts).tolist() == rows_of(order)


@given(tables=TABLES, seed=st.integers(0, 2**32))
def test_the_order_is_a_function_of_the_seed(tables: list[list[int]], seed: int) -> None:
    assert rows_of(all_of(tables, seed=seed)) == rows_of(all_of(tables, seed=seed))


def test_another_seed_gives_another_order() -> None:
    tables = [[64] * 40]
    assert rows_of(all_of(tables, seed=0)) != rows_of(all_of(tables, seed=1))


@given(tables=TABLES, rows_per_step=st.integers(1, 3000))
def test_windows_are_whole_steps(tables: list[list[int]], rows_per_step: int) -> None:
    order = all_of(tables, rows_per_step)
    steps = [step for n in range(order.num_windows) for step in order.steps_of_window(n)]
    assert steps == list(range(order.num_steps))
    size = order.steps_per_window * rows_per_step
    assert order.steps_per_window == 1 or WINDOW_ROWS / 2 < size <= WINDOW_ROWS


@given(counts=st.lists(st.integers(20, 200), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_tables_are_spread_evenly(counts: list[int], seed: int) -> None:
    """In any prefix of whole windows a table's share is its own, to a group and a window's cut."""
    tables = [[8] * count for count in counts]
    order = all_of(tables, rows_per_step=64, seed=seed)
    rows = np.array(rows_of(order))
    ends = np.cumsum(list(map(sum, tables)))
    sources = np.searchsorted(ends, rows, side="right")
    window = order.steps_per_window * order.rows_per_step
    for stop in range(window, len(rows), window):
        for source, table in enumerate(tables):
            expected = stop * sum(table) / len(rows)
            assert abs((sources[:stop] == source).sum() - expected) <= 8 * len(tables)


def test_rows_of_a_window_are_mixed() -> None:
    order = all_of([[64] * 160], rows_per_step=64)
    first = order.rows_of_steps(0, 1)
    assert len(set(first // 64)) >= 12  # of the window's sixteen row groups
    assert (np.diff(first) == 1).mean() < 0.1


@given(tables=TABLES, seed=st.integers(0, 99), data=st.data())
def test_a_count_takes_whole_groups_and_a_part_of_one(
    tables: list[list[int]], seed: int, data: st.DataObject
) -> None:
    counts = [data.draw(st.integers(1, sum(table))) for table in tables]
    order = shuffle_tables(tables, counts, 7, seed)
    rows = np.sort(rows_of(order))
    assert len(np.unique(rows)) == len(rows) == sum(counts)
    first = 0
    for table, count in zip(tables, counts, strict=True):
        taken = rows[(rows >= first) & (rows < first + sum(table))]
        assert len(taken) == count
        ends = first + np.cumsum(table)
        held = np.bincount(np.searchsorted(ends, taken, side="right"), minlength=len(table))
        assert sum(0 < got < size for got, size in zip(held, table, strict=True)) <= 1
        first += sum(table)


def test_independent_draws_keep_their_order() -> None:
    order = keep_order(20, rows_per_step=6)
    assert rows_of(order) == list(range(20))
    assert [len(order.rows_of_steps(n, n + 1)) for n in range(4)] == [6, 6, 6, 2]


@pytest.mark.parametrize("size", [1, 64])
def test_a_row_takes_at_most_16_bytes(size: int) -> None:
    count = 2**17
    order = all_of([[size] * (count // size)], rows_per_step=240)
    assert order.starts.nbytes + order.ends.nbytes <= 16 * count / size
    assert order.starts.base is None and order.ends.base is None
