"""Which steps are skipped, and when a run that skips too many ends."""

import math

import pytest

from flashvl.errors import FlashVLError
from flashvl.train.run.guard import MIN_RECENT, NUM_RECENT, Guard


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_a_fault_from_the_first_step_on(loss: float) -> None:
    assert Guard(10.0, 3).fault_of(loss) == f"its loss is {loss}"


def test_a_spike_is_measured_by_the_median_of_the_recent_steps() -> None:
    guard = Guard(10.0, 3, recent=[2.0] * (MIN_RECENT - 1))
    assert guard.fault_of(1000.0) is None
    guard.take(2.0)
    assert guard.fault_of(20.0) is None
    assert "20.1 is above spike_factor (10) times 2" in str(guard.fault_of(20.1))
    for _ in range(NUM_RECENT):
        guard.take(3.0)
    assert guard.fault_of(29.0) is None


def test_one_step_too_many_in_a_row_ends_the_run() -> None:
    guard = Guard(10.0, 2)
    guard.skip(1, "its loss is nan")
    guard.take(1.0)
    guard.skip(3, "its loss is nan")
    guard.skip(4, "its loss is nan")
    with pytest.raises(FlashVLError, match=r"step 5 is the 3th in a row") as raised:
        guard.skip(5, "its loss is nan")
    assert "\n" not in str(raised.value)
    assert guard.num_skipped == 4


def test_a_resumed_guard_decides_like_the_one_before() -> None:
    first = Guard(10.0, 2, recent=[1.0] * NUM_RECENT)
    first.skip(9, "its loss is nan")
    second = Guard(10.0, 2, first.recent, first.num_skipped, first.num_in_a_row)
    assert second.fault_of(11.0) == first.fault_of(11.0)
    second.skip(10, "its loss is nan")
    with pytest.raises(FlashVLError):
        second.skip(11, "its loss is nan")
