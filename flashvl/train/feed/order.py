"""The order of a stage's rows: a pure function of the tables' row groups and the seed.

The row groups of every table are shuffled, the tables interleaved so that each is spread evenly
over the stage, and the rows shuffled within windows of about a thousand. Only two numbers of each
row group are kept; the place of a row is computed when it is asked for. The order knows nothing of
workers: any number of them may train it, and any other number resume it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

WINDOW_ROWS = 1024
"""Rows that are shuffled among themselves, about: a window is a whole number of steps. One task
reads a window, with each row group of it once."""
_GROUPS, _WINDOWS = range(2)
"""Streams of random numbers of a seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The rows of a stage in the order in which they are trained."""

    starts: Int64s
    """(row groups,): number of the first row of each row group, in the order of the stage."""
    ends: Int64s
    """(row groups,): rows of the stage up to the end of each row group."""
    rows_per_step: int
    steps_per_window: int
    seed: int | None
    """Seed of the windows' shuffling; None: their rows stay as they are."""

    @property
    def num_rows(self) -> int:
        return int(self.ends[-1])

    @property
    def num_steps(self) -> int:
        """Steps in which every row is used once; the last may have fewer rows than the others."""
        return -(-self.num_rows // self.rows_per_step)

    @property
    def num_windows(self) -> int:
        return -(-self.num_steps // self.steps_per_window)

    def rows_of_steps(self, start: int, stop: int) -> Int64s:
        """The numbers of the rows of the steps from `start` up to, not including, `stop`."""
        if start >= stop:
            return np.empty(0, np.int64)
        first, last = start // self.steps_per_window, (stop - 1) // self.steps_per_window
        rows = np.concatenate([self._rows_of_window(n) for n in range(first, last + 1)])
        origin = first * self.steps_per_window
        return rows[(start - origin) * self.rows_per_step : (stop - origin) * self.rows_per_step]

    def steps_of_window(self, window: int) -> range:
        start = window * self.steps_per_window
        return range(start, min(start + self.steps_per_window, self.num_steps))

    def _rows_of_window(self, window: int) -> Int64s:
        size = self.steps_per_window * self.rows_per_step
        places = np.arange(window * size, min((window + 1) * size, self.num_rows))
        groups = np.searchsorted(self.ends, places, side="right")
        begins = np.where(groups == 0, 0, self.ends[groups - 1])
        rows = self.starts[groups] + places - begins
        if self.seed is None:
            return rows
        return rows[_shuffled(len(rows), self.seed, _WINDOWS, window)]


def keep_order(num_rows: int, rows_per_step: int) -> Order:
    """The order of rows that are independent draws: as they are numbered."""
    return Order(
        starts=np.zeros(1, np.int64),
        ends=np.array([num_rows]),
        rows_per_step=rows_per_step,
        steps_per_window=_steps_per_window(rows_per_step),
        seed=None,
    )


def shuffle_tables(
    tables: Sequence[npt.ArrayLike], counts: Sequence[int], rows_per_step: int, seed: int
) -> Order:
    """The order of the rows of some tables, numbered through.

    Args:
        tables: for each table, the number of rows in each of its row groups.
        counts: rows to take of each table, at least one; a part of a table is made of whole row
            groups, which the seed chooses, and the first rows of one more.
    """
    starts, sizes, positions = [], [], []
    first_row = 0
    for number, (table, count) in enumerate(zip(tables, counts, strict=True)):
        size_of_group = np.asarray(table, np.int64)
        start_of_group = first_row + np.cumsum(size_of_group) - size_of_group
        first_row += int(size_of_group.sum())
        chosen = _shuffled(len(size_of_group), seed, _GROUPS, number)
        ends = np.cumsum(size_of_group[chosen])
        num_groups = int(np.searchsorted(ends, count)) + 1
        chosen, ends = chosen[:num_groups], np.minimum(ends[:num_groups], count)
        taken = np.diff(ends, prepend=0)
        starts.append(start_of_group[chosen][taken > 0])
        sizes.append(taken[taken > 0])
        positions.append(((ends - taken / 2) / count)[taken > 0])
    order = np.argsort(np.concatenate(positions), kind="stable")
    return Order(
        starts=np.concatenate(starts)[order],
        ends=np.cumsum(np.concatenate(sizes)[order]),
        rows_per_step=rows_per_step,
        steps_per_window=_steps_per_window(rows_per_step),
        seed=seed,
    )


def _steps_per_window(rows_per_step: int) -> int:
    return max(1, WINDOW_ROWS // rows_per_step)


def _shuffled(count: int, *seed: int) -> npt.NDArray[np.intp]:
    """A random permutation; sorting raw bits, whose stream NumPy promises to keep, gives the same
    one in every version, so that a run may resume after an update."""
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")
