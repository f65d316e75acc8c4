"""Waits beside Erlang's tables, and beside an engine that is simulated step by step."""

import math

import numpy as np
import pytest
from ray.serve.config import AutoscalingConfig

from flashvl.plan.queueing import solve_queue
from flashvl.plan.speed import Speed
from tests.support.simulated_fleet import Work, replay


def servers(count: int, rate: float = 1.0) -> Speed:
    """As many independent servers as slots, whose requests do not slow each other down."""
    rates = tuple(rate * number for number in range(1, count + 1))
    return Speed(rates=rates, prefill_s=None, step_s=0.0, source="")


@pytest.mark.parametrize(
    ("count", "load", "expected"),
    [(1, 0.5, 0.5), (2, 1.0, 1 / 3), (3, 2.0, 4 / 9), (10, 8.0, 0.4092), (100, 90.0, 0.2169)],
)
def test_the_share_that_waits_is_erlangs(count: int, load: float, expected: float) -> None:
    """The first three follow by hand from the formula; the others from its sum, in exact terms."""
    terms = math.fsum(load**number / math.factorial(number) for number in range(count))
    last = load**count / math.factorial(count) * count / (count - load)
    assert last / (terms + last) == pytest.approx(expected, abs=1e-4)
    queue = solve_queue(load, servers(count), replicas=1)
    assert queue is not None
    assert queue.waiting_share == pytest.approx(expected, abs=1e-4)
    assert queue.drain_per_s == pytest.approx(count - load)


def test_engines_with_one_queue_are_one_engine_with_their_slots() -> None:
    one, several = solve_queue(8.0, servers(10), 1), solve_queue(8.0, servers(2), 5)
    assert one is not None and several is not None
    assert several.waiting_share == pytest.approx(one.waiting_share)


def test_the_late_share_is_one_percent_at_the_wait() -> None:
    queue = solve_queue(9.5, servers(10), 1)
    assert queue is not None
    assert queue.late_share(queue.wait_s) == pytest.approx(0.01)
    assert queue.late_share(0.0) == pytest.approx(queue.waiting_share)


def test_more_than_the_engines_can_answer_has_no_queue() -> None:
    assert solve_queue(10.0, servers(10), 1) is None
    slow_to_read = Speed(rates=(1.0, 2.0), prefill_s=2.0, step_s=0.1, source="")
    assert solve_queue(0.6, slow_to_read, 1) is None


def test_an_empty_engine_makes_a_prompt_wait_for_a_step_at_most() -> None:
    speed = Speed(rates=(1.0, 2.0), prefill_s=0.1, step_s=0.02, source="")
    queue = solve_queue(1e-9, speed, 1)
    assert queue is not None
    assert queue.wait_s == 0.02


@pytest.mark.long
@pytest.mark.parametrize("utilization", [0.6, 0.9])
def test_waits_are_those_of_a_simulated_engine(utilization: float) -> None:
    """The plan may promise less than there is, but not much more."""
    slots, prefill_s, tokens = 16, 0.4, 64
    work = Work(
        slots=slots,
        prefill_s=prefill_s,
        step_s=lambda number: 0.04 + 0.001 * number,
        group=1,
        mean_tokens=tokens,
    )
    rates = tuple(
        number / (number * prefill_s + (tokens - 1) * work.step_s(number))
        for number in range(1, slots + 1)
    )
    speed = Speed(rates=rates, prefill_s=prefill_s, step_s=work.step_s(slots), source="")
    arrivals_per_s = utilization * speed.requests_per_s
    queue = solve_queue(arrivals_per_s, speed, replicas=1)
    assert queue is not None
    fixed = AutoscalingConfig(min_replicas=1, max_replicas=1)
    day = replay(work, [arrivals_per_s] * 60, fixed, start_s=0.0)
    simulated_s = float(np.quantile(day.waits_s, 0.99))
    assert 0.9 * simulated_s < queue.wait_s < 2 * simulated_s
