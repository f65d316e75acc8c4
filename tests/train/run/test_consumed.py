"""The bitmap of used rows, against sets of numbers."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashvl.errors import FlashVLError
from flashvl.train.run.consumed import Consumed

NUM_ROWS = 1003


@pytest.fixture
def parts() -> list[Any]:
    """All rows in a random order, in pieces of odd sizes."""
    rows = np.random.default_rng(0).permutation(NUM_ROWS)
    return np.array_split(rows, 17)


def feed_of(parts: list[Any]) -> Any:
    """A feed whose steps are `parts`."""

    def rows_of_steps(start: int, stop: int) -> Any:
        return np.concatenate([np.empty(0, np.int64), *parts[start:stop]])

    return SimpleNamespace(num_numbers=NUM_ROWS, rows_of_steps=rows_of_steps)


def marked(parts: Iterator[Any] | list[Any]) -> Consumed:
    consumed = Consumed(NUM_ROWS)
    for part in parts:
        consumed.mark(part)
    return consumed


def test_the_bits_are_those_of_packbits(parts: list[Any]) -> None:
    truth = np.zeros(NUM_ROWS, bool)
    truth[np.concatenate(parts[:5])] = True
    consumed = marked(parts[:5])
    assert consumed.to_bytes() == np.packbits(truth).tobytes()
    assert consumed.num_rows == truth.sum()
    assert Consumed(NUM_ROWS, consumed.to_bytes()).to_bytes() == consumed.to_bytes()
    assert len(Consumed(24_000_000).to_bytes()) == 3_000_000


def test_a_row_that_is_used_twice_is_named(parts: list[Any]) -> None:
    consumed = marked(parts[:2])
    with pytest.raises(FlashVLError, match=f"row {parts[1][3]} was used twice"):
        consumed.mark(np.array([parts[2][0], parts[1][3]]))
    with pytest.raises(FlashVLError, match=f"row {parts[3][0]} was used twice"):
        consumed.mark(parts[3][[0, 1, 0]])


def test_the_audit_finds_a_row_too_few_or_too_many(parts: list[Any]) -> None:
    feed = feed_of(parts)
    marked(parts[:4]).check(feed, 4)
    marked(parts).check(feed, len(parts))
    lacking = [*parts[:3], parts[3][1:]]
    with pytest.raises(FlashVLError, match=f"row {parts[3][0]} was not used"):
        marked(lacking).check(feed, 4)
    with pytest.raises(FlashVLError, match=f"row {parts[4][0]} was used"):
        marked([*parts[:4], parts[4][:1]]).check(feed, 4)


def test_bits_of_another_stage_are_refused() -> None:
    with pytest.raises(FlashVLError, match="the stage 2000 rows"):
        Consumed(2000, Consumed(NUM_ROWS).to_bytes())
